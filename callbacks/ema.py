"""Exponential moving average of the trained weights."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from callbacks.lightning_types import generative
from callbacks.sharding import Held, Sharded, ShardedTensors, trained_parameters
from medsynth.errors import UserError
from medsynth.ranges import number

if TYPE_CHECKING:
    from lightning_modules.base import GenerativeModule


@dataclass
class EMAConfig:
    """How the trained weights are averaged."""

    decay: float = number(0.9999, least=0, below=1)
    """Share of the old average in each update, in [0, 1); 0 trains without an average."""
    warmup: bool = True
    """Start with a short memory: after n updates the share is at most (1 + n) / (10 + n)."""
    every: int = number(1, least=1)
    """Optimizer steps from one update to the next, at least 1."""


class EMA(L.Callback):
    """Averages the parameters of `trainable_modules()` in float32 and validates with the average.

    With w the parameters after a counted step and n the updates done before,

        average ← d · average + (1 − d) · w,    d = min(decay, (1 + n) / (10 + n)) with warm-up, else d = decay,

    from the weights that training starts with. A step is a batch after which the optimizers have moved: accumulated
    micro-batches count once, and so do the two optimizers of an adversarial method. Buffers are not averaged: running
    statistics are averages already, and counters must stay integers. A validation uses the live buffers, as the
    module's `after_swap` mends them for the average, and a saved average carries the live ones' current values.

    The average stands in the live parameters from `on_validation_start` to `on_validation_end`. Lightning calls
    checkpoint callbacks last, so they save the live weights; any other callback that saves must be listed after this
    one. One callback serves one `fit`.
    """

    state_key = "EMA"

    def __init__(self, config: EMAConfig):
        self.config = config
        self.updates = 0
        self._steps = 0  # counted optimizer steps
        self._seen = 0  # trainer.global_step when the last of them was counted
        self._trained = nn.ModuleDict()
        self._live: dict[str, Tensor] = {}  # what this process holds of each parameter
        self._held: dict[str, Held] = {}  # and which part that is, where the processes share them
        self._publish: Callable[[], None] = _nothing
        self._shadow: dict[str, Tensor] = {}  # without the names whose average stands in the live parameter
        self._kept: dict[str, Tensor] = {}  # live values while the average stands in their place
        self._kept_buffers: dict[str, Tensor] = {}  # likewise, of the buffers that `after_swap` may mend
        self._mend: Callable[[], None] = _nothing
        self._saved: Mapping[str, Tensor] | None = None  # loaded, before there are parameters

    def averaged_state(self) -> dict[str, Held | Tensor]:
        """Float32 averages and persistent buffers by "<module>.<name>"; no copies. A shared parameter comes once.

        Where the processes hold the weights in parts, averages are `Held`, this process's part.
        """
        if self._kept:
            raise RuntimeError("the averaged weights stand in the live parameters: save after the swap or validation")
        average = {name: part._replace(values=self._shadow[name]) for name, part in self._held.items()}
        return {**(average or self._shadow), **_persistent_buffers(self._trained)}

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The averaged weights in the live parameters, cast to their dtype; afterwards the live ones again, bit exact.

        Inside a validation, where they stand there already, nothing changes.
        """
        if self._kept:
            yield
            return
        try:
            self._swap_in()
            yield
        finally:
            self._restore()
        self._publish()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.strategy.restore_checkpoint_after_setup:
            self._attach(trainer, generative(pl_module))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._live:
            self._attach(trainer, generative(pl_module))
        self._seen = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._seen:
            return
        self._seen = trainer.global_step
        self._steps += 1
        if self._steps % self.config.every == 0:
            self._update()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._live:  # `trainer.validate` without a fit
            self._attach(trainer, generative(pl_module))
        self._swap_in()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restore()
        self._publish()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._restore()

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "steps": self._steps, "shadow": self.averaged_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.updates, self._steps, self._saved = state_dict["updates"], state_dict["steps"], state_dict["shadow"]
        if self._live:
            self._adopt(state_dict["shadow"])

    @torch.no_grad()
    def _attach(self, trainer: L.Trainer, module: "GenerativeModule") -> None:
        self._trained = nn.ModuleDict(module.trainable_modules())
        self._mend = module.after_swap
        parameters = trained_parameters(module)
        self._live = {**parameters}
        if isinstance(trainer.strategy, Sharded):
            self._held = {name: trainer.strategy.own_part(parameter) for name, parameter in parameters.items()}
            self._live = {name: part.values for name, part in self._held.items()}
            self._publish = trainer.strategy.publish
        self._shadow = {name: live.to(torch.float32, copy=True) for name, live in self._live.items()}
        if self._saved is not None:
            self._adopt(self._saved)

    @torch.no_grad()
    def _adopt(self, saved: Mapping[str, Tensor]) -> None:
        if self._held:
            _fill_parts(self.averaged_state(), saved)
        else:
            _fill({**self._shadow, **_persistent_buffers(self._trained)}, saved)
        self._saved = None

    @torch.no_grad()
    def _update(self) -> None:
        decay = self.config.decay
        if self.config.warmup:
            decay = min(decay, (1 + self.updates) / (10 + self.updates))
        # Narrower parameters are widened for the moment; their activations are free by now.
        current = [live.float() for live in self._live.values()]
        get_ema_multi_avg_fn(decay)([self._shadow[name] for name in self._live], current, None)
        self.updates += 1

    # A float32 parameter holds its average exactly, so the average's own memory is let go and no third copy is made.
    # A narrower one does not: its live values, as narrow, are kept beside. Each parameter is complete before the next
    # is touched, so `_restore` also mends a swap that an error cut short; then it must wait for no other process.
    # Tensors made in inference mode could not be updated afterwards.

    @torch.inference_mode(False)
    @torch.no_grad()
    def _swap_in(self) -> None:
        for name, live in self._live.items():
            self._kept[name] = live.clone()
            live.copy_(self._shadow[name])
            if live.dtype == torch.float32:
                del self._shadow[name]
        self._publish()
        self._kept_buffers = {name: buffer.clone() for name, buffer in self._trained.named_buffers()}
        self._mend()

    @torch.inference_mode(False)
    @torch.no_grad()
    def _restore(self) -> None:
        for name, kept in self._kept.items():
            live = self._live[name]
            if name not in self._shadow:
                self._shadow[name] = live.clone()
            live.copy_(kept)
        self._kept.clear()
        buffers = dict(self._trained.named_buffers())
        for name, kept in self._kept_buffers.items():
            buffers[name].copy_(kept)
        self._kept_buffers.clear()


def load_ema_weights(module: "GenerativeModule", state: Mapping[str, Any]) -> None:
    """Put a saved average, with its buffers, into the trainable modules of a freshly built `module`.

    `state` is what `EMA.state_dict` gave: `checkpoint["callbacks"]["EMA"]`. Values are cast to the module's dtypes.

    Raises:
        UserError: names or shapes of the average and of the module differ; the message names them.
    """
    trained = nn.ModuleDict(module.trainable_modules())
    _fill({**trained_parameters(module), **_persistent_buffers(trained)}, state["shadow"])
    with torch.no_grad():
        module.after_swap()


def _nothing() -> None:
    """A whole parameter is read as it is written."""


def _persistent_buffers(trained: nn.Module) -> dict[str, Tensor]:
    parameters = dict(trained.named_parameters(remove_duplicate=False))
    return {name: tensor for name, tensor in trained.state_dict().items() if name not in parameters}


@torch.no_grad()
def _fill(tensors: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Copy `saved` into `tensors` after checking that all names and shapes are the same."""
    _compare({name: tensor.shape for name, tensor in tensors.items()}, saved)
    for name, tensor in tensors.items():
        tensor.copy_(saved[name])


@torch.no_grad()
def _fill_parts(parts: Mapping[str, Held | Tensor], saved: Mapping[str, Tensor]) -> None:
    """The same, of each tensor only the part that this process holds."""
    _compare({name: torch.Size(part.shape) for name, part in parts.items()}, saved)
    for name, part in parts.items():
        if isinstance(part, Held):
            part.read(saved, name)
        else:
            part.copy_(saved[name])


def _compare(shapes: Mapping[str, torch.Size], saved: Mapping[str, Tensor]) -> None:
    given = saved.shapes if isinstance(saved, ShardedTensors) else {name: value.shape for name, value in saved.items()}
    differences = {
        "not in the checkpoint": [name for name in shapes if name not in given],
        "not in the model": [name for name in given if name not in shapes],
        "of another shape": [name for name in shapes if name in given and shapes[name] != given[name]],
    }
    found = [f"{len(names)} {what} ({', '.join(names[:5])})" for what, names in differences.items() if names]
    if found:
        mend = "Build the model from the config that it was trained with"
        raise UserError(f"the averaged weights do not fit the model: {'; '.join(found)}. {mend}")
