"""The one contract every method keeps, and the pictures' ranges inside and outside a module."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, cast, final

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.optim.lr_scheduler import LambdaLR

from datamodules.batches import Conditions, ImageBatch, Sample
from lightning_modules.parts import optim
from lightning_modules.parts.optim import OptimConfig, configure_optimizers
from lightning_modules.parts.weights import Weights
from medsynth.errors import UserError


def to_model_range(images: Tensor) -> Tensor:
    """[0, 1] to [-1, 1], any shape."""
    return images * 2 - 1


def to_image_range(images: Tensor) -> Tensor:
    """[-1, 1] to [0, 1], any shape; what lies outside is clamped, but an infinity, which is no white, becomes NaN."""
    scaled = images.float() / 2 + 0.5
    return scaled.clamp(0, 1) + (scaled - scaled)


STRATEGIES = frozenset({"auto", "ddp", "fsdp", "deepspeed2", "deepspeed3"})
"""How processes can share the training state: auto (one process), ddp, fsdp (FSDP2), ZeRO's stages 2 and 3."""


@dataclass(frozen=True)
class Supports:
    """What a method can be asked for; checked before anything is launched."""

    conditions: frozenset[str]
    """Of: captions, labels, control."""
    strategies: frozenset[str] = frozenset({"auto", "ddp"})
    """Of `STRATEGIES`."""
    negatives: bool = False
    """Whether guidance can lead away from words of the caller's: `Conditions.negatives`, negative prompts."""
    unconditional: bool = False
    """Whether its pictures are of nothing in particular, so that it can be asked for a number of them."""


class GenerativeModule(L.LightningModule, ABC):
    """A method: how it learns from an `ImageBatch` and draws pictures for `Conditions`.

    Pictures are float32 (n, 3, H, W) in [0, 1] at every public method. A subclass names its `Config` (a frozen
    dataclass with a field `optim: OptimConfig`) and fills in the abstract methods; the steps, the optimizer and what
    goes into a checkpoint stand here.
    """

    Config: ClassVar[type]
    supports: Supports
    loss_is_a_mean: ClassVar[bool] = True
    """Whether the loss is a mean over samples, however they are batched; False where it compares them with each other,
    so that micro-batches do not add up to their batch."""
    uses_all_weights: ClassVar[bool] = True
    """Whether each backward pass reaches every trained weight; False has ddp look for those that it does not."""
    strict_loading = False  # frozen networks are not in the checkpoint

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        self.gradient_clip_norm: float | None = None  # train.gradient_clip_norm, for a module that steps by itself
        self.frozen_dtype = torch.float32
        """What `build` may load a network in that never learns: training sets what `setup` holds it in."""
        self.step_losses: dict[str, Tensor] = {}
        """What the newest training step gave, scalars on the device: of one micro-batch, in this process."""
        self.gradient_norm: Tensor | None = None
        """L2 norm of the newest step's gradients before clipping, of players' the greatest; None where not known."""
        self._settings: list[list[dict[str, Any]]] = []  # of each optimizer, as the config makes them
        self._built = False
        self._cut = False

    # What a method fills in

    @abstractmethod
    def build(self) -> None:
        """Make or load every network: the only place where weights come from.

        Raises:
            UserError: weights are absent, or do not fit.
        """

    @abstractmethod
    def trainable_modules(self) -> dict[str, nn.Module]:
        """The networks that learn, by attribute name: what is optimised, averaged, saved and exported."""

    @abstractmethod
    def losses(self, batch: ImageBatch) -> dict[str, Tensor]:
        """Scalars, among them "loss", which is minimised. A pure function of the weights and the batch."""

    @abstractmethod
    def sample(
        self, conditions: Conditions, seeds: list[int], *, steps: int | None = None, guidance: float | None = None
    ) -> Tensor:
        """One picture for each condition and seed: float32 (n, 3, H, W) in [0, 1].

        A picture is a function of its own condition and seed, not of the batch. `steps` and `guidance` default to the
        config's.
        """

    @abstractmethod
    def export(self, directory: Path) -> None:
        """Write the weights in the ecosystem's own layout, without any of this project's training state."""

    def required_weights(self) -> list[Weights]:
        """Pretrained weights that `build` reads and that can be fetched."""
        return []

    def read_weights(self) -> list[Weights]:
        """All weights from outside that `build` reads, exports of earlier runs among them: a run holds on to these."""
        return self.required_weights()

    def steered_by(self) -> list[str]:
        """Kinds of control (`CONTROL_CHANNELS`) that change what is drawn, where control is supported."""
        return []

    def sampling(self, steps: int | None = None, guidance: float | None = None) -> dict[str, Any]:
        """What a call of `sample` with these draws by: "sampler", "steps" and "guidance", as far as the method has
        them, the config's values in the place of None.

        Raises:
            UserError: it cannot draw so, for instance in so many steps.
        """
        return {}

    def check_samples(self, samples: Iterable[Sample]) -> None:
        """Look at what is to be learned from, before the first step: the training samples, without their pictures, as
        the first pass shows them; each is made when it is asked for.

        Raises:
            UserError: nothing can be learned from these.
        """

    def learn(self, batch: ImageBatch) -> dict[str, Tensor]:
        """What a training step does with its batch: the losses, "loss" among them, which Lightning then minimises.

        A module of several players that steps its optimizers by itself (`automatic_optimization = False`) does all of
        that here. One batch stays one step: the trainer counts each `LightningOptimizer.step`, so one player steps by
        that, and the others by `self.trainer.strategy.optimizer_step(optimizer, lambda: None, self)`, uncounted.
        """
        return self.losses(batch)

    @property
    def accumulates(self) -> bool:
        """Whether a step may be taken over several micro-batches."""
        return self.automatic_optimization and self.loss_is_a_mean

    def after_swap(self) -> None:
        """Mend what depends on the trained weights after an average was put in their place, for instance the vectors of
        spectral norm. Buffers that this changes are put back with the live weights."""

    def drawing_facts(self) -> dict[str, Any]:
        """What a picture of the untrained model depends on beside its prompt and seed, by name; plain JSON.

        Raises:
            UserError: the method does not begin with a generator that can draw.
        """
        raise UserError(f"{type(self).__name__} can draw nothing before it is trained; set data.class_pictures=0")

    def averaged_modules(self) -> dict[str, nn.Module]:
        """Modules that training changes without optimising them (a target network, numbers that a step moves), by
        attribute name: saved too."""
        return {}

    def held_as_loaded(self) -> list[nn.Module]:
        """Frozen networks that stay in the type that `build` loaded them in, whatever the others are held in."""
        return []

    def sharded_networks(self) -> list[nn.Module]:
        """Networks that fsdp shards, as they are called in a step; each is gathered whole but for its blocks."""
        return list((self.trainable_modules() | self.averaged_modules()).values())

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """`torch.compile` the networks that each step runs, in place: names of weights and hooks stay."""
        for network in (self.trainable_modules() | self.averaged_modules()).values():
            network.compile(*args, **kwargs)

    def preview(self, batch: ImageBatch, seeds: list[int]) -> tuple[Tensor, list[str]]:
        """What shows a person how good the model is at a validation batch: pictures (n, 3, H, W) and n captions."""
        names = self.datamodule.split_facts().get("classes", []) if self.datamodule is not None else []
        given = [] if batch.conditions.labels is None else batch.conditions.labels.tolist()
        labels = [names[label] if label < len(names) else f"class {label}" for label in given]
        captions = batch.conditions.captions if "captions" in self.supports.conditions else labels
        return self.sample(batch.conditions, seeds), captions or [""] * len(batch)

    # What is the same for all

    @final
    def configure_model(self) -> None:
        if not self._built:
            self.build()
            self.to(memory_format=torch.channels_last)  # what convolutions are fastest in, on CPU and GPU
            self._freeze_the_rest()
            self._built = True
            self.train(self.training)  # frozen networks evaluate from the first step on
        if self._device_mesh is not None and not self._cut:  # a strategy that shards is attached
            self._shard()
            self._cut = True

    def setup(self, stage: str) -> None:
        self.configure_model()
        self.hold_frozen(frozen_dtype(str(self.trainer.precision)))

    def hold_frozen(self, dtype: torch.dtype) -> None:
        """Hold frozen weights in the type that mixed precision computes in: half the memory, no cast at each step."""
        if dtype == torch.float32:
            return
        others = [*self.averaged_modules().values(), *self.held_as_loaded()]
        kept = {id(p) for module in others for p in module.parameters()}
        for parameter in self.parameters():
            if not parameter.requires_grad and id(parameter) not in kept:
                parameter.data = parameter.data.to(dtype)

    @final
    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        _seed(max(0, int(batch.seeds[0])), self.device)
        self.gradient_norm = None
        losses = self.learn(batch)
        self.step_losses = {name: value.detach() for name, value in losses.items()}
        return losses["loss"]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Leave out a step with a gradient that is not finite; for each of several players by itself."""
        norm, before = optim.leave_out_unless_finite(optimizer), self.gradient_norm
        self.gradient_norm = norm if norm is None or before is None else torch.maximum(norm, before)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip to a length by the norm that is known already; a strategy that hides the gradients clips by itself."""
        if gradient_clip_val and self.gradient_norm is not None:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grads_with_norm_(parameters, float(gradient_clip_val), self.gradient_norm)

    def on_fit_start(self) -> None:
        self._settings = [optim.settings_of(optimizer) for optimizer in self.trainer.optimizers]

    def on_train_start(self) -> None:
        """A run that goes on has the config's settings of the optimizer and its schedule, not the checkpoint's."""
        for optimizer, settings in zip(self.trainer.optimizers, self._settings, strict=True):
            optim.resume(optimizer, settings)
        for each in self.trainer.lr_scheduler_configs:
            if isinstance(each.scheduler, LambdaLR) and each.interval == "step":
                optim.resume_schedule(each.scheduler, self.trainer.global_step)

    def transfer_batch_to_device(self, batch: ImageBatch, device: torch.device, dataloader_idx: int) -> ImageBatch:
        """From page-locked memory without waiting for the copy: the device is still busy with the step before."""
        return batch.to(device, non_blocking=device.type == "cuda")

    @final
    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        # A float: Lightning averages the weights over the processes, and of integers it would drop the remainder.
        real_rows: Any = float((batch.seeds >= 0).sum())
        losses = {f"val/{name}": value for name, value in self.losses(batch).items()}
        self.log_dict(losses, batch_size=real_rows, on_step=False, on_epoch=True, sync_dist=True)

    def configure_optimizers(self) -> Any:
        """What Lightning takes: by default one optimizer over the trainable modules, with its schedule."""
        total_steps = int(self.trainer.estimated_stepping_batches)
        return configure_optimizers(self.config.optim, self.trainable_modules(), total_steps)

    def learning_rates(self) -> dict[str, float]:
        """What the coming step is made with: `lr`, or of several optimizers or groups `lr/<name>`."""
        return optim.rates(self.trainer.optimizers, self.trainable_modules())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = self.saved_names()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in saved}
        checkpoint["config"] = asdict(self.config)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        expected, given = self.saved_names(), set(checkpoint["state_dict"])
        if expected != given:
            key = sorted(expected ^ given)[0]
            raise UserError(
                f"the checkpoint does not fit this model: {len(expected - given)} weights are missing and "
                f"{len(given - expected)} are strange, the first is {key}; use the config it was trained with"
            )
        if self.datamodule is not None:  # resuming, not only reading weights
            self.datamodule.rescale_progress(checkpoint)

    @property
    def datamodule(self) -> Any:
        """The trainer's DataModule; None where there is no trainer, or it has none."""
        return getattr(self._trainer, "datamodule", None)

    def saved_names(self) -> set[str]:
        """Names in the state dict that training changes: not the frozen weights around an adapter."""
        frozen = {name for name, parameter in self.named_parameters() if not parameter.requires_grad}
        trained = {f"{name}.{key}" for name, module in self.trainable_modules().items() for key in module.state_dict()}
        averaged = {f"{name}.{key}" for name, module in self.averaged_modules().items() for key in module.state_dict()}
        return trained - frozen | averaged

    def _shard(self) -> None:
        """FSDP2 on the networks that change, block by block; frozen weights stay whole in every process."""
        mixed = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(str(self.trainer.precision))
        # Autocast computes; only what travels is narrow: weights to the processes. Gradients are summed in float32.
        policy = MixedPrecisionPolicy(param_dtype=mixed, reduce_dtype=torch.float32, cast_forward_inputs=False)
        averaged = {p for module in self.averaged_modules().values() for p in module.parameters()}
        mesh = cast(DeviceMesh, self.device_mesh)["data_parallel"]
        for network in self.sharded_networks():
            network.to(memory_format=torch.contiguous_format)  # FSDP2 cuts no other
            whole = {p for p in network.parameters() if not p.requires_grad and p not in averaged}
            # After each forward pass the parts alone are kept, so that the next one sees what was written to them.
            options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": True}
            for block in (*blocks(network), network):
                fully_shard(block, **options, mp_policy=policy, ignored_params=whole)

    def _freeze_the_rest(self) -> None:
        trainable = {id(p) for module in self.trainable_modules().values() for p in module.parameters()}
        for parameter in self.parameters():
            if id(parameter) not in trainable:
                parameter.requires_grad_(False)

    def train(self, mode: bool = True) -> "GenerativeModule":
        """Switch the trained networks; frozen ones stay in evaluation mode."""
        super().train(False)
        self.training = mode
        if self._built:
            for module in self.trainable_modules().values():
                module.train(mode)
        return self


class JointEmbedding(ABC):
    """What a method is beside a `GenerativeModule` that embeds pictures and captions in one space: validation then
    retrieves the ones for the others."""

    @abstractmethod
    def picture_embeddings(self, pictures: Tensor) -> Tensor:
        """float32 (n, D), each of length 1, of pictures (n, 3, H, W) in [0, 1]."""

    @abstractmethod
    def caption_embeddings(self, captions: list[str]) -> Tensor:
        """float32 (n, D) likewise, of n captions."""


def blocks(network: nn.Module) -> list[nn.Module]:
    """The parts of a network that are gathered one at a time, inner ones first: libraries name `_no_split_modules`."""
    parts = [module for module in network.modules() if module is not network and any(True for _ in module.parameters())]
    named: list[Any] = [getattr(module, "_no_split_modules", None) for module in network.modules()]
    names = {name for own in named for name in own or ()}
    return [module for module in reversed(parts) if type(module).__name__ in names]


def frozen_dtype(precision: str) -> torch.dtype:
    """What training in that precision, by Lightning's name, holds frozen weights in."""
    return {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision, torch.float32)


def _seed(seed: int, device: torch.device) -> None:
    """Tie dropout, which draws from the global generators, to the batch, so that a resumed run repeats it."""
    # Not torch.manual_seed: that notes the whole call stack for each kind of device that is not there, 1 ms a step.
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def count_parameters(module: GenerativeModule) -> tuple[int, int]:
    """(trained, frozen) weights of a built module."""
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return trained, sum(p.numel() for p in module.parameters()) - trained


__all__ = [
    "GenerativeModule",
    "JointEmbedding",
    "OptimConfig",
    "Supports",
    "count_parameters",
    "to_image_range",
    "to_model_range",
]
