"""Optimizer and learning-rate schedule from a config, what a resumed run takes of it, and steps that are left out."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from medsynth.ranges import choice, number, numbers

OPTIMIZERS = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}
SCHEDULES = ("constant", "linear", "cosine", "polynomial")


@dataclass(frozen=True)
class OptimConfig:
    """How the trainable weights are optimised."""

    name: str = choice("adamw", tuple(OPTIMIZERS))
    """adamw or adam."""
    lr: float = number(1e-4, above=0)
    """Learning rate at its highest."""
    betas: list[float] = numbers([0.9, 0.999], count=2, least=0, below=1)
    """Decay rates of the two moments."""
    eps: float = number(1e-8, above=0)
    """Added to the denominator."""
    weight_decay: float = number(0.01, least=0)
    """Decoupled (adamw) or L2 (adam) weight decay; biases and norms take part, as in torch's default."""
    schedule: str = choice("constant", SCHEDULES)
    """Learning rate over time: constant, linear, cosine, polynomial (diffusers' names), after the warm-up."""
    warmup_steps: int = number(0, least=0)
    """Optimizer steps of linear warm-up from 0."""


def configure_optimizers(config: OptimConfig, modules: dict[str, nn.Module], total_steps: int) -> dict:
    """Lightning's optimizer dict over the parameters of `modules` that require gradients.

    total_steps: optimizer steps of the whole run, where a decaying schedule ends.
    """
    parameters = [p for module in modules.values() for p in module.parameters() if p.requires_grad]
    first, second = config.betas
    optimizer = OPTIMIZERS[config.name](
        parameters,
        lr=config.lr,
        betas=(first, second),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=all(p.device.type in ("cpu", "cuda") for p in parameters),
    )
    # Fused ones offer to unscale gradients themselves, and then Lightning refuses to clip in any mixed precision.
    optimizer._step_supports_amp_scaling = False
    name = "constant_with_warmup" if config.schedule == "constant" and config.warmup_steps else config.schedule
    schedule = get_scheduler(name, optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=total_steps)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def leave_out_unless_finite(optimizer: Optimizer) -> Tensor | None:
    """Have the coming step of `optimizer` change nothing, moments too, where a gradient is not finite.

    That is decided on the device, by the gradients as all processes have summed them: no process waits, and all leave
    out the same step. Optimizers that are not fused step as ever.

    Returns:
        the L2 norm of all gradients, a scalar, the same in all processes; None where they are out of reach, as under
        ZeRO, which leaves out such steps by itself.
    """
    groups = optimizer.param_groups
    gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
    if not gradients or not isinstance(optimizer, Optimizer):  # DeepSpeed's own is none of torch's
        return None
    norm = torch.nn.utils.get_total_norm(gradients)
    if isinstance(norm, DTensor):  # of the part that this process holds
        norm = norm.full_tensor()
    if all(group.get("fused") for group in groups):
        optimizer.found_inf = 1 - norm.isfinite().float()  # pyrefly: ignore[missing-attribute]  # torch reads it
    return norm


def settings_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    """What each group of parameters is stepped by: all but the parameters."""
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def resume(optimizer: Optimizer, settings: list[dict[str, Any]]) -> None:
    """After a checkpoint was restored, step by `settings` again; the moments are the checkpoint's."""
    for group, values in zip(optimizer.param_groups, settings, strict=True):
        group.update(values)


def resume_schedule(schedule: LambdaLR, step: int) -> None:
    """After a checkpoint was restored, go on with the rates of this schedule after `step` optimizer steps.

    The schedule is a function of the step, of the length of the run and of the highest rate as they are now; what the
    checkpoint says of another length or rate is let go. The groups' `initial_lr` is the highest rate.
    """
    groups = schedule.optimizer.param_groups
    schedule.base_lrs = [group["initial_lr"] for group in groups]
    schedule.last_epoch = step
    factors = [rate_at(step) for rate_at in schedule.lr_lambdas]
    for group, highest, factor in zip(groups, schedule.base_lrs, factors, strict=True):
        group["lr"] = highest * factor
    schedule._last_lr = [group["lr"] for group in groups]


def rates(optimizers: list[Optimizer], modules: Mapping[str, nn.Module]) -> dict[str, float]:
    """The learning rates by name: `lr`, or of several `lr/<name>`, by the group's own name or by what it trains.

    modules: the networks that learn, by name. What trains no one of them alone has its number for a name, from 1.
    """
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    if len(groups) == 1:
        return {"lr": float(groups[0]["lr"])}
    names = [group.get("name") or _trains(group, modules) for group in groups]
    unique = [name if name and names.count(name) == 1 else str(i) for i, name in enumerate(names, 1)]
    return {f"lr/{name}": float(group["lr"]) for name, group in zip(unique, groups, strict=True)}


def _trains(group: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> str | None:
    """The one module that all parameters of the group belong to."""
    parameters = {id(parameter) for parameter in group["params"]}
    owners = (name for name, module in modules.items() if parameters <= {id(p) for p in module.parameters()})
    return next(owners, None)
