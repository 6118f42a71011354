"""Batch norms whose statistics are those of the whole batch, however many processes share it.

Dimensions: B batch, C channels, H height, W width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class _SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes; its gradient is the sum of theirs, as each one's loss depends on it."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _SumOverProcesses.apply(grads[0])


class SyncBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` over the batch of all processes, on any device: (B, C, H, W) to the same shape and dtype.

    While it trains with several processes, mean and variance are those of all their pictures together, each picture
    with the same weight however the batch is cut; gradients flow through them to every process. Otherwise it is
    `nn.BatchNorm2d`, whose names of weights and buffers it has. `nn.SyncBatchNorm` does this on GPUs only.

    Statistics are of float32 at least, also under autocast. All processes must make each forward and backward pass
    together while training.
    """

    shared = True
    """Whether a pass in training counts the other processes' pictures, too."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if not (self.training and self.shared and _processes() > 1):
            return super().forward(x_BCHW)
        x = x_BCHW if x_BCHW.dtype == torch.float64 else x_BCHW.float()
        count, mean_C, variance_C = moments(x)
        self._follow(count.detach(), mean_C.detach(), variance_C.detach())
        scale_C = (variance_C + self.eps).rsqrt()
        if self.weight is not None:
            scale_C = scale_C * self.weight
        x = (x - _maps(mean_C)) * _maps(scale_C)
        if self.bias is not None:
            x = x + _maps(self.bias)
        return x.to(x_BCHW.dtype)

    @torch.no_grad()
    def _follow(self, count: Tensor, mean_C: Tensor, variance_C: Tensor) -> None:
        """Move the running statistics, whose variance is the unbiased one, as `nn.BatchNorm2d` does."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        momentum = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
        unbiased_C = variance_C * (count / (count - 1).clamp(min=1))
        self.running_mean += momentum * (mean_C - self.running_mean)
        self.running_var += momentum * (unbiased_C - self.running_var)


class ConditionalBatchNorm2d(nn.Module):
    """Batch norm whose scale and shift are its class's own (de Vries et al. 2017): one row of each a class.

    The scales start at 1 and the shifts at 0, so that the classes begin alike.
    """

    def __init__(self, channels: int, classes: int):
        super().__init__()
        self.norm = SyncBatchNorm2d(channels, affine=False)
        self.scale = nn.Embedding(classes, channels)
        self.shift = nn.Embedding(classes, channels)
        nn.init.ones_(self.scale.weight)
        nn.init.zeros_(self.shift.weight)

    def forward(self, x_BCHW: Tensor, labels_B: Tensor) -> Tensor:
        """(B, channels, H, W) and int64 labels (B,) from 0 to classes − 1, to x's shape and dtype."""
        scale_BC, shift_BC = self.scale(labels_B), self.shift(labels_B)
        x = self.norm(x_BCHW) * scale_BC[:, :, None, None] + shift_BC[:, :, None, None]
        return x.to(x_BCHW.dtype)


def moments(x_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Number of values a channel, scalar, and mean and biased variance (C,), over the pictures of all processes.

    Each process's own, joined by Chan et al. (1979): no difference of large sums is taken. A process may have no
    picture. One exchange of 2C + 1 numbers a process.
    """
    own = x_BCHW.new_tensor(x_BCHW.shape[0] * x_BCHW.shape[2] * x_BCHW.shape[3])
    mean_C = x_BCHW.sum(dim=(0, 2, 3)) / own.clamp(min=1)
    squares_C = (x_BCHW - _maps(mean_C)).square().sum(dim=(0, 2, 3))
    # Each process fills its own row, so that their sum holds them all.
    row = torch.arange(_processes(), device=x_BCHW.device) == dist.get_rank()
    table: Any = _SumOverProcesses.apply(row[:, None] * torch.cat([own[None], mean_C, squares_C]))
    counts_P1, means_PC, squares_PC = table.split([1, len(mean_C), len(mean_C)], dim=1)
    count = counts_P1.sum()
    mean_C = (counts_P1 * means_PC).sum(dim=0) / count
    between_C = (counts_P1 * (means_PC - mean_C).square()).sum(dim=0)
    return count, mean_C, (squares_PC.sum(dim=0) + between_C) / count


@contextmanager
def recomputed_statistics(network: nn.Module) -> Iterator[None]:
    """Take the running statistics anew from the forward passes made within: the mean over them, each counting alike.

    For weights that others have taken the place of, as an average's: only the norms are in training mode within, and
    afterwards all is as before but for the statistics. Each process counts its own pictures alone, and so need not
    wait for another: give all of them the same. Make the passes without gradients; without a pass nothing is changed.
    """
    kept = []
    for norm in network.modules():
        if isinstance(norm, SyncBatchNorm2d) and norm.num_batches_tracked is not None:
            kept.append(
                (norm, norm.training, norm.momentum, norm.num_batches_tracked, norm.num_batches_tracked.clone())
            )
            norm.num_batches_tracked.zero_()  # without a momentum the first pass leaves nothing of what was before
            norm.training, norm.momentum, norm.shared = True, None, False
    try:
        yield
    finally:
        for norm, training, momentum, tracked, before in kept:
            norm.training, norm.momentum, norm.shared = training, momentum, True
            tracked.copy_(before)


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _maps(values_C: Tensor) -> Tensor:
    """One value a channel, as it meets (B, C, H, W)."""
    return values_C[:, None, None]
