"""Networks as a training would leave them, without one."""

import torch

from lightning_modules.base import GenerativeModule


def move(module: GenerativeModule) -> GenerativeModule:
    """Other weights than the loaded ones, as training would leave them."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return module
