"""Gradient checkpointing of networks whose library has none."""

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpoint_blocks(blocks: Iterable[nn.Module]) -> None:
    """Have each block keep its inputs alone and compute its activations again in the backward pass; names stay.

    Less memory, about a third more time; gradients are the same, those of dropout among them.
    """
    for block in blocks:
        kind = type(block)
        # By its class, so that copies of the network and what shards it find nothing bound to this one.
        block.__class__ = type(kind.__name__, (_Checkpointed, kind), {})


class _Checkpointed(nn.Module):
    def forward(self, *inputs: Any) -> Any:
        return checkpoint(super().forward, *inputs, use_reentrant=False)
