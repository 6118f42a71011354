"""Optimizer and learning-rate schedule from a config, what a resumed run takes of it, and steps that are left out."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from medsynth.ranges import choice, number, numbers


class RMSprop(Optimizer):
    """RMSprop as torch has it, not centred and without momentum, that can leave out a step as its fused optimizers do:

    v ← α·v + (1 − α)·g²,    w ← w − lr·g / (√v + ε),    nothing of it where `found_inf` is 1.
    """

    found_inf: Tensor | None = None
    """1 leaves out the coming step, 0 or None does not; a scalar on the weights' device."""

    def __init__(self, parameters: Any, lr: float, alpha: float = 0.99, eps: float = 1e-8, weight_decay: float = 0.0):
        super().__init__(parameters, {"lr": lr, "alpha": alpha, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyrefly: ignore[bad-override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if not weights:
                continue
            gradients: Any = [p.grad for p in weights]
            if group["weight_decay"]:
                gradients = torch._foreach_add(gradients, weights, alpha=group["weight_decay"])
            squares = [self._squares(p) for p in weights]
            self._move(weights, gradients, squares, group)
        return loss

    def _move(self, weights: list[Any], gradients: list[Any], squares: list[Tensor], group: dict[str, Any]) -> None:
        taken: Any = 1 - group["alpha"]
        if self.found_inf is not None:
            left = self.found_inf.to(weights[0].device).bool()
            gradients = [g.masked_fill(left, 0) for g in gradients]
            taken = torch.where(left, 0, taken)
        news = torch._foreach_mul(gradients, gradients)
        torch._foreach_sub_(news, squares)
        torch._foreach_mul_(news, taken)
        torch._foreach_add_(squares, news)
        roots = torch._foreach_sqrt(squares)
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_addcdiv_(weights, gradients, roots, value=-float(group["lr"]))

    def _squares(self, weight: Tensor) -> Tensor:
        state = self.state[weight]
        if "square_avg" not in state:
            state["square_avg"] = torch.zeros_like(weight, memory_format=torch.preserve_format)
        return state["square_avg"]


OPTIMIZERS: dict[str, Any] = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "rmsprop": RMSprop}
SCHEDULES = ("constant", "linear", "cosine", "polynomial", "halving")


@dataclass(frozen=True)
class OptimConfig:
    """How the trainable weights are optimised."""

    name: str = choice("adamw", tuple(OPTIMIZERS))
    """adamw, adam or rmsprop."""
    lr: float = number(1e-4, above=0)
    """Learning rate at its highest."""
    betas: list[float] = numbers([0.9, 0.999], count=2, least=0, below=1)
    """Decay rates of the two moments; rmsprop has the second alone."""
    eps: float = number(1e-8, above=0)
    """Added to the denominator."""
    weight_decay: float = number(0.01, least=0)
    """Decoupled (adamw) or L2 (adam, rmsprop) weight decay; biases and norms take part, as in torch's default."""
    schedule: str = choice("constant", SCHEDULES)
    """Learning rate over time, after the warm-up: constant, linear, cosine, polynomial (diffusers' names), or halving,
    every `halve_every_steps`."""
    warmup_steps: int = number(0, least=0)
    """Optimizer steps of linear warm-up from 0."""
    halve_every_steps: int = number(100_000, least=1)
    """Steps from one halving of the learning rate to the next, counted from the first; with schedule=halving."""


def configure_optimizers(config: OptimConfig, modules: dict[str, nn.Module], total_steps: int) -> dict:
    """Lightning's optimizer dict over the parameters of `modules` that require gradients.

    total_steps: optimizer steps of the whole run, where a decaying schedule ends.
    """
    parameters = [p for module in modules.values() for p in module.parameters() if p.requires_grad]
    optimizer = make_optimizer(config, parameters, fused=all(p.device.type in ("cpu", "cuda") for p in parameters))
    # Fused ones offer to unscale gradients themselves, and then Lightning refuses to clip in any mixed precision.
    optimizer._step_supports_amp_scaling = False  # pyrefly: ignore[missing-attribute]
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": _schedule(config, optimizer, total_steps), "interval": "step"},
    }


def make_optimizer(config: OptimConfig, parameters: list[nn.Parameter], fused: bool = False) -> Optimizer:
    """The optimizer alone, with the config's settings; `fused` where torch has a fused one."""
    first, second = config.betas
    common = {"lr": config.lr, "eps": config.eps, "weight_decay": config.weight_decay}
    if config.name == "rmsprop":
        return RMSprop(parameters, alpha=second, **common)
    return OPTIMIZERS[config.name](parameters, betas=(first, second), fused=fused, **common)


def _schedule(config: OptimConfig, optimizer: Optimizer, total_steps: int) -> LambdaLR:
    if config.schedule == "halving":
        return LambdaLR(optimizer, partial(_halving, config.warmup_steps, config.halve_every_steps))
    name = "constant_with_warmup" if config.schedule == "constant" and config.warmup_steps else config.schedule
    return get_scheduler(name, optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=total_steps)


def _halving(warmup: int, every: int, step: int) -> float:
    return min(1.0, step / warmup if warmup else 1.0) * 0.5 ** (step // every)


def leave_out_unless_finite(optimizer: Optimizer) -> Tensor | None:
    """Have the coming step of `optimizer` change nothing, moments too, where a gradient is not finite.

    That is decided on the device, by the gradients as all processes have summed them: no process waits, and all leave
    out the same step. Optimizers that are neither fused nor `RMSprop` step as ever.

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
    if isinstance(optimizer, RMSprop) or all(group.get("fused") for group in groups):
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
