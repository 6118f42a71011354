"""Optimizer and learning-rate schedule from a config."""

from dataclasses import dataclass

import torch
from diffusers.optimization import get_scheduler
from torch import nn

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
