"""Optimizer and learning-rate schedule from a config."""

from dataclasses import dataclass, field

import torch
from diffusers.optimization import get_scheduler
from torch import nn

from medsynth.errors import UserError

OPTIMIZERS = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}
SCHEDULES = ("constant", "linear", "cosine", "polynomial")


@dataclass(frozen=True)
class OptimConfig:
    """How the trainable weights are optimised."""

    name: str = "adamw"
    """adamw or adam."""
    lr: float = 1e-4
    """Learning rate at its highest."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """Decay rates of the two moments."""
    eps: float = 1e-8
    """Added to the denominator."""
    weight_decay: float = 0.01
    """Decoupled (adamw) or L2 (adam) weight decay; biases and norms take part, as in torch's default."""
    schedule: str = "constant"
    """Learning rate over time: constant, linear, cosine, polynomial (diffusers' names), after the warm-up."""
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up from 0."""

    def __post_init__(self):
        if self.name not in OPTIMIZERS:
            raise UserError(f"model.optim.name={self.name} is not known; use one of {', '.join(OPTIMIZERS)}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"model.optim.betas={self.betas}: give two decay rates in [0, 1)")
        if self.schedule not in SCHEDULES:
            raise UserError(f"model.optim.schedule={self.schedule} is not known; use one of {', '.join(SCHEDULES)}")


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
