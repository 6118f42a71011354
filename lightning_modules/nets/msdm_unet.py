"""The denoiser of MSDM: a latent U-Net that reads its prompt by cross-attention after every residual block.

Medfusion's U-Net (Müller-Franzes et al. 2023) with text in place of a class label. The text reaches every level by
cross-attention and a feed-forward layer, and every residual block by attention pooling onto the time embedding. There
is no self-attention.

Dimensions: B batch, C channels, H height, W width, N = H·W positions (or 1 for the pooled query), L text tokens,
D width of the text encoder, E width of the time embedding.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.nets.blocks import ResBlock, Upsample, check_divides, check_size, downsample, zero_init
from medsynth.errors import UserError


def timestep_embedding(t_B: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding of diffusion steps (Ho et al. 2020), float32 (B, dim); dim even, at least 4.

    Sines, then cosines, at dim/2 frequencies from 1 down to 1/10000 radian a step.
    """
    half = dim // 2
    exponents = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=t_B.device) / (half - 1)
    angles = t_B.float()[:, None] * exponents.exp()
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class Attention(nn.Module):
    """Multi-head attention of queries over the text context, with `heads` heads of `head_dim` and no biases."""

    def __init__(self, query_dim: int, context_dim: int, heads: int, head_dim: int, dropout: float = 0.0):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(query_dim, heads * head_dim, bias=False)
        self.to_k = nn.Linear(context_dim, heads * head_dim, bias=False)
        self.to_v = nn.Linear(context_dim, heads * head_dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(heads * head_dim, query_dim, bias=False), nn.Dropout(dropout))

    def forward(self, x_BNC: Tensor, context_BLE: Tensor, mask_BL: Tensor | None = None) -> Tensor:
        """(B, N, query_dim) and (B, L, context_dim) to (B, N, query_dim); mask bool, False hides a token."""
        q, k, v = (
            proj(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for proj, tokens in ((self.to_q, x_BNC), (self.to_k, context_BLE), (self.to_v, context_BLE))
        )
        mask = None if mask_BL is None else mask_BL[:, None, None, :]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.to_out(out.transpose(1, 2).flatten(2))


class AttentionPooling(nn.Module):
    """One vector for a prompt: the mean of its tokens attends over them."""

    def __init__(self, dim: int, heads: int, head_dim: int):
        super().__init__()
        self.attention = Attention(dim, dim, heads, head_dim)

    def forward(self, context_BLE: Tensor, mask_BL: Tensor | None = None) -> Tensor:
        """(B, L, E) to (B, E)."""
        if mask_BL is None:
            mean_B1E = context_BLE.mean(dim=1, keepdim=True)
        else:
            mask_BL1 = mask_BL[:, :, None]
            mean_B1E = (context_BLE * mask_BL1).sum(dim=1, keepdim=True) / mask_BL1.sum(dim=1, keepdim=True)
        return self.attention(mean_B1E, context_BLE, mask_BL).squeeze(1)


class AdaptiveGroupNorm(nn.Module):
    """GroupNorm whose scale and shift are read from the embedding (Dhariwal & Nichol 2021, section 3.1)."""

    def __init__(self, channels: int, embedding_dim: int, norm_groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(norm_groups, channels, affine=False)
        self.to_scale_shift = nn.Sequential(nn.SiLU(), zero_init(nn.Linear(embedding_dim, 2 * channels)))

    def forward(self, x_BCHW: Tensor, emb_BE: Tensor) -> Tensor:
        scale, shift = self.to_scale_shift(emb_BE)[:, :, None, None].chunk(2, dim=1)
        return self.norm(x_BCHW) * (1 + scale) + shift


class CrossAttentionBlock(nn.Module):
    """Cross-attention over the text, then a feed-forward layer at each position; both residual, on normalised input."""

    def __init__(self, channels: int, embedding_dim: int, heads: int, norm_groups: int, dropout: float):
        super().__init__()
        self.attention_norm = AdaptiveGroupNorm(channels, embedding_dim, norm_groups)
        self.attention = Attention(channels, embedding_dim, heads, channels // heads, dropout)
        self.feed_forward_norm = AdaptiveGroupNorm(channels, embedding_dim, norm_groups)
        self.feed_forward = nn.Sequential(
            nn.Conv2d(channels, 4 * channels, 1, bias=False),
            nn.SiLU(),
            nn.Conv2d(4 * channels, channels, 1, bias=False),
        )

    def forward(self, x_BCHW: Tensor, emb_BE: Tensor, context_BLE: Tensor, mask_BL: Tensor | None) -> Tensor:
        # Both reshapes are views where x is channels_last.
        query_BNC = self.attention_norm(x_BCHW, emb_BE).flatten(2).transpose(1, 2)
        attended_BNC = self.attention(query_BNC, context_BLE, mask_BL)
        x_BCHW = x_BCHW + attended_BNC.transpose(1, 2).unflatten(2, x_BCHW.shape[2:])
        return x_BCHW + self.feed_forward(self.feed_forward_norm(x_BCHW, emb_BE))


class TextResBlock(nn.Module):
    """A residual block followed by a cross-attention block: the unit of every level, and of sharding."""

    def __init__(
        self, in_channels: int, out_channels: int, *, embedding_dim: int, heads: int, norm_groups: int, dropout: float
    ):
        super().__init__()
        self.res = ResBlock(in_channels, out_channels, norm_groups, dropout, embedding_dim)
        self.cross = CrossAttentionBlock(out_channels, embedding_dim, heads, norm_groups, dropout)

    def forward(self, x_BCHW: Tensor, emb_BE: Tensor, context_BLE: Tensor, mask_BL: Tensor | None) -> Tensor:
        return self.cross(self.res(x_BCHW, emb_BE), emb_BE, context_BLE, mask_BL)


class EncoderLevel(nn.Module):
    """The blocks of one resolution, then a halving unless it is the last level."""

    def __init__(self, in_channels: int, out_channels: int, res_blocks: int, is_last: bool, **block: Any):
        super().__init__()
        widths = [in_channels] + [out_channels] * res_blocks
        self.blocks = nn.ModuleList(TextResBlock(widths[k], out_channels, **block) for k in range(res_blocks))
        self.down = None if is_last else downsample(out_channels, out_channels)
        self.skip_channels = [out_channels] * (res_blocks + (not is_last))

    def forward(self, x_BCHW: Tensor, *condition: Tensor | None) -> list[Tensor]:
        """Every output in order, all of them skips; the last one goes on."""
        outputs = []
        for block in self.blocks:
            x_BCHW = block(x_BCHW, *condition)
            outputs.append(x_BCHW)
        return outputs if self.down is None else [*outputs, self.down(x_BCHW)]


class DecoderLevel(nn.Module):
    """The blocks of one resolution, each fed one skip, the last giving `out_channels`; then a doubling unless last."""

    def __init__(self, in_channels: int, out_channels: int, skip_channels: list[int], is_last: bool, **block: Any):
        super().__init__()
        inputs = [in_channels + skip for skip in skip_channels]
        outputs = [in_channels] * (len(skip_channels) - 1) + [out_channels]
        self.blocks = nn.ModuleList(TextResBlock(i, o, **block) for i, o in zip(inputs, outputs, strict=True))
        self.up = nn.Identity() if is_last else Upsample(out_channels, out_channels)
        self.deep_channels = inputs[-1]

    def forward(self, x_BCHW: Tensor, skips: list[Tensor], *condition: Tensor | None) -> tuple[Tensor, Tensor]:
        """The level's output, and the features that entered its last block. `skips`: one a block, last first."""
        entering_BCHW = x_BCHW
        for block, skip_BCHW in zip(self.blocks, reversed(skips), strict=True):
            entering_BCHW = torch.cat([x_BCHW, skip_BCHW], dim=1)
            x_BCHW = block(entering_BCHW, *condition)
        return self.up(x_BCHW), entering_BCHW


class MSDMUNet(nn.Module):
    """Predicts noise (or whatever the diffusion's target is) from a noisy latent, its step and its prompt.

    in_channels: channels of the latent.
    widths: widths[0] of the first convolution, then one width a level; each level but the last halves height and width.
    res_blocks: residual blocks a level in the encoder, at least 1; the decoder has one more.
    heads: attention heads; divides every width.
    time_dim: width of the time embedding and of the projected text; a multiple of 8, at least 16.
    text_dim: width of the text encoder's tokens.
    norm_groups: groups of every GroupNorm; divides every width.
    dropout: probability, in the residual blocks and after attention.
    self_conditioning: the input also holds the previous estimate of the clean latent (Chen et al. 2023).
    learned_variance: the output has in_channels more channels, for the variance (Nichol & Dhariwal 2021).
    deep_supervision: number of extra predictions at 1/2, 1/4, … of the latent's resolution.
    pool_head_dim: width of a head of the attention pooling.

    Raises UserError where these do not fit together.
    """

    _no_split_modules = ("TextResBlock", "ResBlock")  # what sharding gathers at once, by the libraries' own name

    def __init__(
        self,
        in_channels: int = 8,
        widths: tuple[int, ...] = (256, 256, 512, 1024),
        res_blocks: int = 2,
        heads: int = 8,
        time_dim: int = 1024,
        text_dim: int = 768,
        norm_groups: int = 32,
        dropout: float = 0.1,
        self_conditioning: bool = True,
        learned_variance: bool = False,
        deep_supervision: int = 0,
        pool_head_dim: int = 64,
    ):
        super().__init__()
        if len(widths) < 2:
            raise UserError(f"widths={tuple(widths)}: give the first convolution's width and at least one level's")
        if res_blocks < 1:
            raise UserError(f"res_blocks={res_blocks} must be at least 1")
        check_divides("norm_groups", norm_groups, widths)
        check_divides("heads", heads, widths)
        if time_dim % 8 or time_dim < 16:
            raise UserError(f"time_dim={time_dim} must be a multiple of 8, at least 16")
        levels = len(widths) - 1
        if not 0 <= deep_supervision < levels:
            raise UserError(f"deep_supervision={deep_supervision} must be from 0 to {levels - 1} with {levels} levels")

        self.in_channels = in_channels
        self.self_conditioning = self_conditioning
        self.time_features = time_dim // 4
        self.downsampling_factor = 2 ** (levels - 1)

        self.time_mlp = nn.Sequential(nn.Linear(self.time_features, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim))
        self.text_mlp = nn.Sequential(
            nn.Linear(text_dim, time_dim, bias=False), nn.SiLU(), nn.Linear(time_dim, time_dim, bias=False)
        )
        self.text_pool = AttentionPooling(time_dim, heads, pool_head_dim)
        self._init_text_path()

        block = {"embedding_dim": time_dim, "heads": heads, "norm_groups": norm_groups, "dropout": dropout}
        self.in_conv = nn.Conv2d(in_channels * (2 if self_conditioning else 1), widths[0], 3, padding=1)
        encoder = [
            EncoderLevel(widths[i - 1], widths[i], res_blocks, i == levels, **block) for i in range(1, levels + 1)
        ]
        self.encoder = nn.ModuleList(encoder)
        self.middle = TextResBlock(widths[-1], widths[-1], **block)
        self.middle_res = ResBlock(widths[-1], widths[-1], norm_groups, dropout, time_dim)

        skips = [widths[0], *(channels for level in encoder for channels in level.skip_channels)]
        self.skips_per_level = res_blocks + 1
        decoder = [
            DecoderLevel(widths[i], widths[i - 1], [skips.pop() for _ in range(self.skips_per_level)], i == 1, **block)
            for i in range(levels, 0, -1)
        ]
        self.decoder = nn.ModuleList(decoder)
        self.out_conv = zero_init(nn.Conv2d(widths[0], in_channels * (2 if learned_variance else 1), 1))
        coarser = decoder[-2::-1][:deep_supervision]
        self.deep_convs = nn.ModuleList(zero_init(nn.Conv2d(level.deep_channels, in_channels, 1)) for level in coarser)

    def forward(
        self,
        x_BCHW: Tensor,
        t_B: Tensor,
        text_BLD: Tensor,
        text_mask_BL: Tensor | None = None,
        self_cond_BCHW: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """The prediction, and the `deep_supervision` ones of lower resolution, finest first.

        x: noisy latent (B, in_channels, H, W); H and W multiples of `downsampling_factor`, else UserError.
        t: diffusion step (B,). Integer is best: sharding to bfloat16 rounds a float 999 to 1000.
        text: tokens of the text encoder (B, L, text_dim).
        text_mask: bool (B, L), False hides a padding token; at least one True a row. None shows every token.
        self_cond: previous estimate of the clean latent, shaped as x; None is zeros. ValueError if given to a network
            without `self_conditioning`.

        Returns (B, in_channels or twice that with `learned_variance`, H, W), all zeros before training, and a list of
        (B, in_channels, H/2, W/2), (B, in_channels, H/4, W/4), …
        """
        check_size(x_BCHW, self.downsampling_factor)
        context_BLE = self.text_mlp(text_BLD)
        time_BE = self.time_mlp(timestep_embedding(t_B, self.time_features).to(x_BCHW.dtype))
        emb_BE = time_BE + self.text_pool(context_BLE, text_mask_BL)
        condition = (emb_BE, context_BLE, text_mask_BL)

        skips = [self.in_conv(self._with_self_condition(x_BCHW, self_cond_BCHW))]
        for level in self.encoder:
            skips += level(skips[-1], *condition)
        h_BCHW = self.middle_res(self.middle(skips[-1], *condition), emb_BE)

        entering = []
        for level in self.decoder:
            skips, own = skips[: -self.skips_per_level], skips[-self.skips_per_level :]
            h_BCHW, entering_BCHW = level(h_BCHW, own, *condition)
            entering.append(entering_BCHW)
        deep = [conv(features) for conv, features in zip(self.deep_convs, entering[-2::-1], strict=False)]
        return self.out_conv(h_BCHW), deep

    def _init_text_path(self) -> None:
        """Let the text arrive with the size it has: torch's default shrinks it to an eighth of the time embedding."""
        attention = self.text_pool.attention
        layers: list[Any] = [self.text_mlp[0], self.text_mlp[2], attention.to_v, attention.to_out[0]]
        for linear, gain in zip(layers, (1.0, 1.7, 1.0, 1.0), strict=True):  # SiLU: about 1 / 1.7
            nn.init.normal_(linear.weight, std=gain * linear.in_features**-0.5)

    def _with_self_condition(self, x_BCHW: Tensor, self_cond_BCHW: Tensor | None) -> Tensor:
        if not self.self_conditioning:
            if self_cond_BCHW is not None:
                raise ValueError("self_cond given to a network built with self_conditioning=False")
            return x_BCHW
        estimate_BCHW = torch.zeros_like(x_BCHW) if self_cond_BCHW is None else self_cond_BCHW
        return torch.cat([x_BCHW, estimate_BCHW], dim=1)
