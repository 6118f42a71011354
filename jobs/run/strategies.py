"""How the processes of a run share its training state: `hardware.strategy` to a Lightning strategy."""

import math
import warnings
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol, cast

import torch
from lightning.pytorch.plugins.precision import DeepSpeedPrecision, MixedPrecision, Precision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from callbacks.sharding import Held, Sharded, Slot
from medsynth.errors import UserError


def check_machine(hardware: Any) -> None:
    """Raise UserError where this machine has not what a `HardwareConfig` asks for, or cannot compute so."""
    kind, precision = hardware.accelerator, hardware.precision
    gpus = torch.cuda.device_count() if kind in ("auto", "gpu", "cuda") and torch.cuda.is_available() else 0
    apple = kind in ("auto", "gpu", "mps") and torch.backends.mps.is_available()
    if kind not in ("auto", "cpu") and not gpus and not apple:
        raise UserError(f"hardware.accelerator={kind}: torch finds none here; set it to cpu or auto")
    if (gpus or apple) and hardware.devices > (gpus or 1):
        raise UserError(f"hardware.devices={hardware.devices}: this machine has {gpus or 1}; set it to that or less")
    if precision == "16-mixed" and hardware.strategy in ("auto", "ddp") and not gpus and not apple:
        # Lightning would take bf16 without a word; fsdp casts by itself, and truly to float16.
        raise UserError("hardware.precision=16-mixed: a CPU does not train so; set it to 32-true or bf16-mixed")
    if precision == "bf16-mixed" and gpus and not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name()
        raise UserError(f"hardware.precision=bf16-mixed: {name} has no bfloat16; set it to 16-mixed or 32-true")


def trainer_options(hardware: Any, plugins: list[Any], find_unused: bool = False) -> dict[str, Any]:
    """The Trainer's arguments for a `HardwareConfig`; `plugins` are the run's own.

    find_unused: let ddp look, after each forward pass, for trained weights that took no part in it.
    """
    name, precision = hardware.strategy, hardware.precision
    machine = {"accelerator": hardware.accelerator, "devices": hardware.devices, "num_nodes": hardware.nodes}
    if name in ("auto", "ddp"):
        strategy = Replicated(find_unused) if name == "ddp" else "auto"
        return {**machine, "strategy": strategy, "precision": precision, "plugins": plugins}
    device = "cpu" if hardware.accelerator == "cpu" or not torch.cuda.is_available() else "cuda"
    if name == "fsdp":
        # As a plugin: by its name Lightning refuses float16 here, though torch scales sharded gradients.
        strategy, plugin = FSDP2(), Precision() if precision == "32-true" else MixedPrecision(precision, device)
    else:
        strategy, plugin = ZeRO(int(name[-1]), precision), AutocastZeRO(precision, device)
    # Parts that a validation in inference mode had gathered could not be trained afterwards.
    return {**machine, "strategy": strategy, "plugins": [*plugins, plugin], "inference_mode": False}


class Replicated(DDPStrategy):
    """Every process holds everything; gradients are averaged."""

    def __init__(self, find_unused: bool = False) -> None:
        # Validation may give the processes different numbers of batches, which buffer broadcasts would wait for.
        super().__init__(broadcast_buffers=False, find_unused_parameters=find_unused)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """The first process writes; all raise where it could not, and none waits for the others."""
        failure = None
        if self.is_global_zero:
            try:
                self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options)
            except UserError as error:
                failure = str(error)
        failure = self.broadcast(failure)
        if failure:
            raise UserError(failure)


class FSDP2(Sharded, ModelParallelStrategy):
    """Each process holds rows of the trained weights and gathers a block's when the block runs (Zhao et al. 2023).

    `GenerativeModule.configure_model` applies it. Frozen networks are whole in every process.
    """

    def __init__(self) -> None:
        super().__init__(data_parallel_size=1, tensor_parallel_size=1)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_processes * self.num_nodes
        super().setup_environment()

    def held(self, parameter: nn.Parameter) -> Held | Tensor:
        if not isinstance(parameter, DTensor):
            return parameter.detach()
        local = cast(DTensor, parameter.detach()).to_local().view(-1)
        _, offsets = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
        start = offsets[0] * math.prod(parameter.shape[1:]) if local.numel() else 0
        return Held(local, start, tuple(parameter.shape))

    def slot(self, parameter: nn.Parameter) -> Slot:
        assert isinstance(parameter, DTensor), "each trained weight is sharded"
        return Slot(self.inner_optimizer().state[parameter], parameter, 0, parameter.to_local().numel())

    def publish(self) -> None:
        """Nothing: every forward pass gathers anew."""

    def inner_optimizer(self) -> torch.optim.Optimizer:
        return self.optimizers[0]


class AutocastZeRO(DeepSpeedPrecision):
    """Autocast around DeepSpeed's engine too, so that sampling computes as training does."""

    def __init__(self, precision: Literal["32-true", "bf16-mixed"], device: str):
        super().__init__(precision)
        self._device = device

    def convert_input(self, data: Any) -> Any:
        return data  # autocast casts where it should

    def backward(self, tensor: Tensor, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        # Lightning has divided by the number of micro-batches; DeepSpeed would once more.
        super().backward(tensor, model, optimizer, *args, scale_wrt_gas=False, **kwargs)

    def forward_context(self) -> AbstractContextManager[Any]:
        return torch.autocast(self._device, dtype=torch.bfloat16, enabled=self.precision == "bf16-mixed")


class _Partitioned(Protocol):
    """What DeepSpeed adds to a parameter: `_hp_mapping` with stage 2, all else with stage 3."""

    ds_shape: torch.Size
    ds_numel: int
    ds_tensor: Any
    """This process's part, with its own ds_numel."""
    ds_zero_partition_rank: int
    ds_persist: bool
    """Whether it is so small that it stays whole."""
    _hp_mapping: Any
    """Where its float32 copy lies; None where another process has it."""

    def partition(self, param_list: list[Any]) -> None:
        """Cut the whole parameters of the list into parts again."""


class ZeRO(Sharded, DeepSpeedStrategy):
    """DeepSpeed: each process holds an equal part of the optimizer's state and float32 weights (Rajbhandari et al.
    2020), with stage 3 also of the weights that the forward pass reads. On GPUs, and on CPUs over gloo."""

    def __init__(self, stage: int, precision: str):
        super().__init__(stage=stage)
        mixed = precision == "bf16-mixed"
        assert self.config is not None, "Lightning has made it of its defaults"
        self.config["torch_autocast"] = {"enabled": mixed, "dtype": "bfloat16"}
        self.stage = stage
        warnings.filterwarnings("ignore", module="deepspeed")

    # DeepSpeed computes on CPUs as well; Lightning asks for GPUs.

    @property
    def root_device(self) -> torch.device:
        device = super().root_device
        return torch.device("cpu", self.local_rank) if device.type == "cpu" else device

    def setup_environment(self) -> None:
        assert self.parallel_devices and self.accelerator, "the Trainer has set them"
        if self.parallel_devices[0].type != "cpu":
            super().setup_environment()
            return
        self.accelerator.setup_device(torch.device("cpu"))
        self.set_world_ranks()
        _without_shared_memory()
        self._init_deepspeed_distributed()

    def setup(self, trainer: Any) -> None:
        assert self.lightning_module is not None, "the Trainer has set it"
        self.lightning_module.to(memory_format=torch.contiguous_format)  # parts are cut from the row-major tensor
        super().setup(trainer)

    def _setup_model_and_optimizer(self, model: Any, optimizer: Any, lr_scheduler: Any = None) -> tuple[Any, Any]:
        """Keep frozen networks from DeepSpeed: they stay whole, and a process may run them when another does not.

        For instance for captions that only one has not met: ZeRO-3 would wait for the other, whose weights are needed.
        """
        model.to(self.root_device)
        children = dict(model.named_children())
        changing = {id(p) for network in model.sharded_networks() for p in network.parameters()}
        shown = {name: c for name, c in children.items() if any(id(p) in changing for p in c.parameters())}
        model._modules.update(dict.fromkeys(children.keys() - shown.keys()))
        try:
            engine, optimizer = super()._setup_model_and_optimizer(model, optimizer, lr_scheduler)
        finally:
            model._modules.update(children)
        if self.stage == 3:
            _walk_only(engine.optimizer, nn.ModuleDict(shown))
            _gather_anew(engine.optimizer, [p for m in model.averaged_modules().values() for p in m.parameters()])
        return engine, optimizer

    def _format_config(self) -> None:
        self._format_batch_size_and_grad_accum_config()  # all but bf16 and fp16, which would round the weights

    def held(self, parameter: nn.Parameter) -> Held | Tensor:
        if self.stage == 2:
            return self._held_of_stage_2(parameter)
        whole = cast(_Partitioned, parameter)
        shape, tensor = tuple(whole.ds_shape), whole.ds_tensor
        start = tensor.ds_numel * whole.ds_zero_partition_rank
        length = max(0, min(tensor.ds_numel, whole.ds_numel - start))
        if parameter.requires_grad:
            group, offset, _ = self._zero.grad_position[self._zero.get_param_id(parameter)]
            tensor = self._zero.fp32_partitioned_groups_flat[group][offset:]
        return Held(tensor.detach().view(-1)[:length], start if length else 0, shape)

    def slot(self, parameter: nn.Parameter) -> Slot:
        length = self.own_part(parameter).values.numel()
        if self.stage == 2:
            flat, mapping = self._zero.single_partition_of_fp32_groups[0], cast(_Partitioned, parameter)._hp_mapping
            offset = mapping.hp_fragment_address.start if mapping else 0
        else:
            group, offset, _ = self._zero.grad_position[self._zero.get_param_id(parameter)]
            flat = self._zero.fp32_partitioned_groups_flat[group]
        return Slot(self.inner_optimizer().state[flat], flat, offset, length)

    def publish(self) -> None:
        if self.stage == 2:
            self._zero.update_lp_params()
            return
        for group in range(len(self._zero.fp32_partitioned_groups_flat)):
            self._zero._reassign_or_swap_out_partitioned_parameters(group)
        persistent = self._zero.persistent_parameters
        if persistent:
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)

    def inner_optimizer(self) -> torch.optim.Optimizer:
        return self._zero.optimizer

    @property
    def _zero(self) -> Any:
        assert self.model is not None, "set up before training"
        return self.model.optimizer

    def _held_of_stage_2(self, parameter: nn.Parameter) -> Held | Tensor:
        if not parameter.requires_grad:
            return parameter.detach()
        mapping = cast(_Partitioned, parameter)._hp_mapping
        if mapping is None:
            return Held(self._zero.single_partition_of_fp32_groups[0].detach()[:0], 0, tuple(parameter.shape))
        return Held(mapping.hp_fragment.detach(), mapping.lp_fragment_address.start, tuple(parameter.shape))


def _walk_only(zero: Any, networks: nn.Module) -> None:
    """Let ZeRO-3 look for gathered parameters, after each step, in `networks` instead of in the whole module."""
    from deepspeed.runtime.zero.partition_parameters import _init_external_params

    _init_external_params(networks)
    zero.module = zero.parameter_offload.module = networks


def _gather_anew(zero: Any, parameters: list[nn.Parameter]) -> None:
    """Keep ZeRO-3 from holding the small ones of `parameters` whole, which it renews at its own steps only."""
    for parameter in (cast(_Partitioned, parameter) for parameter in parameters):
        if parameter.ds_persist:
            parameter.ds_persist = False
            parameter.partition([parameter])
    zero.persistent_parameters[:] = [parameter for parameter in zero.persistent_parameters if parameter.ds_persist]


def _without_shared_memory() -> None:
    """Let processes on CPUs talk through gloo alone: the other way is compiled first, and spins while it waits."""
    from deepspeed.ops import __compatible_ops__
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    __compatible_ops__[ShareMemCommBuilder.NAME] = False


def is_sharded(strategy: Strategy) -> bool:
    """Whether a process's own module holds only parts of the weights."""
    return isinstance(strategy, Sharded)
