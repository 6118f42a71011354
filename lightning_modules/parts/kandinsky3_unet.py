"""Kandinsky 3's U-Net as it is asked here: each row of a batch by its own text, and with gradient checkpointing."""

import torch
from diffusers import Kandinsky3UNet
from torch import Tensor, nn

from lightning_modules.parts.checkpointing import checkpoint_blocks
from lightning_modules.parts.t5 import TOKENS


class OwnLengthPooling(nn.Module):
    """The text's share in the embedding of time: attention of the mean token to all tokens.

    Diffusers takes that mean over the rows that the batch's longest text has, so that a picture depends on its batch.
    Here it is over what its pipeline shows of a text alone: its tokens and, where there is room, one row of padding.
    """

    def __init__(self, attention: nn.Module):
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor, context: Tensor, context_mask: Tensor) -> Tensor:
        """x: (n, D), of time. context: (n, L, W), at least one row of padding behind the tokens. context_mask:
        (n, 1, L), 0 at tokens and very negative at padding."""
        tokens = (context_mask[:, 0] == 0).sum(1, keepdim=True)
        shown = (tokens + 1).clamp(max=TOKENS)
        weights = (torch.arange(context.shape[1], device=context.device) < shown) / shown
        mean = torch.einsum("nl,nlw->nw", weights.to(context.dtype), context)
        return x + self.attention(mean[:, None], context, context_mask.to(context.dtype)).squeeze(1)


def prepare(unet: Kandinsky3UNet, gradient_checkpointing: bool) -> Kandinsky3UNet:
    """The same with `OwnLengthPooling`, in place; names of weights stay."""
    unet.add_time_condition = OwnLengthPooling(unet.add_time_condition.attention)
    blocks = [*unet.down_blocks, *unet.up_blocks]
    unet._no_split_modules = sorted({type(block).__name__ for block in blocks})
    if gradient_checkpointing:
        checkpoint_blocks(blocks)
    return unet
