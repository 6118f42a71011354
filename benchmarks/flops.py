"""Floating-point operations of a step, and how many of them a device can do."""

import time
from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cell import Batches, Cell
from lightning_modules.families.latent_diffusion import LatentDiffusion

PEAKS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12}
"""Dense bf16 FLOP/s of GPUs by a part of their name, from their makers' data sheets; the first that fits counts."""


def count(run: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products, convolutions and attention in `run`; multiply-add is 2.

    Attention counts as its two products, whichever kernel runs: nothing that a kernel computes twice.
    """
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


def per_picture(cell: Cell, module: LatentDiffusion, batches: Batches) -> int:
    """Model FLOPs of a picture's share of a step, forward and backward, without what checkpointing computes again.

    Leaves no gradients behind. module: built, not yet set up for training.
    """
    checkpointed = [m for m in module.modules() if getattr(m, "gradient_checkpointing", False)]
    for part in checkpointed:
        part.gradient_checkpointing = False
    batch = batches[0][:1].to(cell.device)
    flops = count(lambda: module.losses(batch)["loss"].backward())
    module.zero_grad(set_to_none=True)
    for part in checkpointed:
        part.gradient_checkpointing = True
    return flops


def peak(cell: Cell) -> tuple[float, str]:
    """FLOP/s that the device can do in the cell's precision, and where that is from."""
    if cell.device == "cuda" and cell.dtype == torch.bfloat16:
        name = torch.cuda.get_device_name()
        for part, value in PEAKS.items():
            if part in name:
                return value, f"data sheet of {part}"
    return _matmul(cell.device, cell.dtype), "measured on a matrix product"


def _matmul(device: str, dtype: torch.dtype) -> float:
    side = 8192 if device == "cuda" else 1536
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(7):
        started = time.perf_counter()
        (a @ b).sum().item()
        seconds.append(time.perf_counter() - started)
    return 2 * side**3 / min(seconds)
