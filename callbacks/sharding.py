"""Training state that the processes hold in parts: what each holds, and how it is saved and read back.

Every part is a range of a tensor flattened in row-major order, float32, whoever cut it: FSDP2 by rows, ZeRO by equal
numbers of values. So a checkpoint says nothing of the processes or of the strategy that wrote it, and any other number
of them, or a single process, reads what it needs.
"""

import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from medsynth.files import parse_json

_LAYOUT = "layout"  # key in a shard file's metadata: where each of its ranges begins, and the whole tensor's shape


class Held(NamedTuple):
    """This process's part of a tensor.

    values: (m,), a view of what training uses: writing to it changes the tensor. start: its place in the flattened
    tensor. shape: of the whole tensor.
    """

    values: Tensor
    start: int
    shape: tuple[int, ...]

    def read(self, tensors: Mapping[str, Tensor], name: str) -> None:
        """Fill the part from the whole tensor `name` of a checkpoint."""
        stop = self.start + self.values.numel()
        if stop == self.start:
            return
        if isinstance(tensors, ShardedTensors):
            part = tensors.part(name, self.start, stop)
        else:
            part = tensors[name].reshape(-1)[self.start : stop]
        self.values.copy_(part)


class Slot(NamedTuple):
    """Where an optimizer keeps what it knows of a parameter.

    state: its dict. like: the tensor that it steps on, perhaps of many parameters. part: of such a tensor the view
    (m,) that belongs to this process's part of the parameter.
    """

    state: dict[str, Any]
    like: Tensor
    start: int
    length: int

    def part(self, tensor: Tensor) -> Tensor:
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        return local.detach().view(-1)[self.start : self.start + self.length]


class Trainable(Protocol):
    """A module that says which of its networks learn; see `GenerativeModule`."""

    def trainable_modules(self) -> dict[str, nn.Module]: ...


def trained_parameters(module: Trainable) -> dict[str, nn.Parameter]:
    """The parameters that are optimised, in the optimizer's order, by "<module>.<name>"; a shared one comes once."""
    trained = nn.ModuleDict(module.trainable_modules())
    return {name: parameter for name, parameter in trained.named_parameters() if parameter.requires_grad}


class Sharded:
    """Mixed into a Lightning strategy whose processes hold weights, optimizer state and averages in parts.

    Checkpoints go through the trainer's `DurableCheckpointIO`, into which every process writes its part.
    """

    if TYPE_CHECKING:  # what the strategy has that this is mixed into

        @property
        def lightning_module(self) -> Any: ...

        @property
        def checkpoint_io(self) -> Any: ...

        def broadcast(self, obj: Any, src: int = 0) -> Any: ...

    # What a strategy fills in

    @abstractmethod
    def held(self, parameter: nn.Parameter) -> Held | Tensor:
        """The part of a parameter, float32 where it is trained; a tensor where every process holds the whole."""

    @abstractmethod
    def slot(self, parameter: nn.Parameter) -> Slot:
        """Where the optimizer keeps its state of this part of a trained parameter."""

    @abstractmethod
    def publish(self) -> None:
        """Let the next forward pass see what was written to the parts."""

    @abstractmethod
    def inner_optimizer(self) -> torch.optim.Optimizer:
        """The torch optimizer that steps."""

    # What is the same for all

    restore_checkpoint_after_setup = True
    lightning_restore_optimizer = True

    def lightning_module_state_dict(self) -> dict[str, Held | Tensor]:
        module = self.lightning_module
        parameters = dict(module.named_parameters(remove_duplicate=False))
        buffers = dict(module.named_buffers(remove_duplicate=False))
        return {
            name: self.held(parameters[name]) if name in parameters else buffers[name]
            for name in sorted(module.saved_names())
        }

    @torch.no_grad()
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        for name, target in self.lightning_module_state_dict().items():
            if isinstance(target, Held):
                target.read(checkpoint["state_dict"], name)
            else:
                target.copy_(checkpoint["state_dict"][name])
        self.publish()

    def own_part(self, parameter: nn.Parameter) -> Held:
        """The part of a trained parameter."""
        held = self.held(parameter)
        assert isinstance(held, Held)
        return held

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """By names instead of torch's numbers: `groups`, `steps`, and `moments` as parts."""
        parameters, steps, moments = trained_parameters(self.lightning_module), {}, {}
        for name, parameter in parameters.items():
            slot, held = self.slot(parameter), self.own_part(parameter)
            for key, value in slot.state.items():
                if isinstance(value, Tensor) and value.shape == slot.like.shape and key != "step":
                    moments.setdefault(key, {})[name] = Held(slot.part(value), held.start, held.shape)
            steps[name] = float(slot.state.get("step", 0))
        groups = [_without_parameters(group) for group in self.inner_optimizer().param_groups]
        return {"names": list(parameters), "groups": groups, "steps": steps, "moments": moments}

    @torch.no_grad()
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        parameters = trained_parameters(self.lightning_module)
        (state,) = checkpoint["optimizer_states"]
        saved = state if "moments" in state else by_name(state, list(parameters))
        for group, values in zip(self.inner_optimizer().param_groups, saved["groups"], strict=True):
            group.update(values)
        fused = any(group.get("fused") or group.get("capturable") for group in self.inner_optimizer().param_groups)
        for name, parameter in parameters.items():
            if not saved["steps"].get(name):
                continue  # saved before the first step
            slot, held = self.slot(parameter), self.own_part(parameter)
            where = slot.like.device if fused else "cpu"
            slot.state["step"] = torch.tensor(saved["steps"][name], dtype=torch.float32, device=where)
            for key, tensors in saved["moments"].items():
                if key not in slot.state:
                    slot.state[key] = torch.zeros_like(slot.like)
                Held(slot.part(slot.state[key]), held.start, held.shape).read(tensors, name)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        self.checkpoint_io.save_checkpoint(checkpoint, self.broadcast(filepath), storage_options)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """What was saved, its tensors still on disk."""
        return self.checkpoint_io.open_checkpoint(checkpoint_path)


def by_name(state: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """`Sharded.optimizer_state`'s form of a torch optimizer's state dict, with whole tensors."""
    steps, moments = {}, {}
    for number, values in state["state"].items():
        steps[names[number]] = float(values["step"])
        for key, value in values.items():
            if key != "step":
                moments.setdefault(key, {})[names[number]] = value
    groups = [_without_parameters(group) for group in state["param_groups"]]
    return {"names": names, "groups": groups, "steps": steps, "moments": moments}


def by_number(state: Mapping[str, Any]) -> dict[str, Any]:
    """The torch optimizer's own state dict of `Sharded.optimizer_state`, with whole tensors."""
    moments, numbered = state["moments"], {}
    for number, name in enumerate(state["names"]):
        if state["steps"][name]:
            step = torch.tensor(state["steps"][name], dtype=torch.float32)
            numbered[number] = {"step": step} | {key: tensors[name] for key, tensors in moments.items()}
    (group,) = state["groups"]
    return {"state": numbered, "param_groups": [{**group, "params": list(range(len(state["names"])))}]}


def _without_parameters(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


# Files


def write_shard(path: Path, tensors: Mapping[str, Held | Tensor], rank: int) -> None:
    """Write this process's parts to `path`; what every process holds whole, the first one writes."""
    parts, layout = {}, {}
    for name, tensor in tensors.items():
        held = tensor if isinstance(tensor, Held) else _whole(tensor, rank)
        layout[name] = [held.start, *held.shape]
        parts[name] = held.values.detach().cpu().clone()
    save_file(parts, path, metadata={_LAYOUT: json.dumps(layout)})


def _whole(tensor: Tensor, rank: int) -> Held:
    flat = tensor.detach().contiguous().view(-1)
    return Held(flat if rank == 0 else flat[:0], 0, tuple(tensor.shape))


class ShardedTensors(Mapping[str, Tensor]):
    """Tensors that lie in parts in several files, read when they are asked for. Keys begin with `prefix`, unseen."""

    def __init__(self, files: list[Path], prefix: str = ""):
        self._files = [safe_open(file, framework="pt") for file in files]
        self._prefix = prefix
        self.shapes: dict[str, torch.Size] = {}  # of the whole tensors
        self._parts: dict[str, list[tuple[int, int, Any]]] = {}  # start, stop, file
        for file in self._files:
            for key, (start, *shape) in parse_json(file.metadata()[_LAYOUT]).items():
                if key.startswith(prefix):
                    self._add(key.removeprefix(prefix), start, shape, file)

    def part(self, name: str, start: int, stop: int) -> Tensor:
        """Values [start, stop) of the flattened tensor."""
        pieces = []
        for begin, end, file in self._parts[name]:
            first, last = max(begin, start), min(end, stop)
            if first < last:
                pieces.append(file.get_slice(self._prefix + name)[first - begin : last - begin])
        return torch.cat(pieces) if len(pieces) != 1 else pieces[0]

    def __getitem__(self, name: str) -> Tensor:
        return self.part(name, 0, self.shapes[name].numel()).view(self.shapes[name])

    def __deepcopy__(self, memo: dict) -> "ShardedTensors":
        return self  # Lightning copies what it gives to callbacks; these are read only

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def _add(self, name: str, start: int, shape: list[int], file: Any) -> None:
        length = file.get_slice(self._prefix + name).get_shape()[0]
        self.shapes[name] = torch.Size(shape)
        self._parts.setdefault(name, []).append((start, start + length, file))
        self._parts[name].sort(key=lambda part: part[0])
