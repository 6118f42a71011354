"""Rows of all processes as one batch, for losses that compare the samples of a step with each other."""

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


def gather_rows(rows: Tensor) -> Tensor:
    """The rows (n, …) of all processes, in the order of their ranks, which may have different numbers of them.

    In the backward pass each process takes the gradient of its own rows, times the number of processes: where every
    process computes the same loss of the gathered rows and the gradients of the weights are then averaged, as ddp does,
    that is the gradient of that loss. All processes call it together; of a single process the rows are as they were.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows
    return _Gather.apply(rows)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        world, rank = dist.get_world_size(), dist.get_rank()
        own = torch.tensor([len(rows)], device=rows.device)
        counts = [torch.empty_like(own) for _ in range(world)]
        dist.all_gather(counts, own)
        lengths = [int(count) for count in counts]
        ctx.place = sum(lengths[:rank]), lengths[rank], world
        if not any(lengths):
            return rows.clone()
        padded = rows.new_zeros(max(lengths), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in range(world)]
        dist.all_gather(parts, padded)
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        first, length, world = ctx.place
        return gradients[0][first : first + length] * world
