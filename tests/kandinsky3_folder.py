"""A small Kandinsky 3, random weights, as diffusers and transformers write it for the hub."""

from pathlib import Path

import torch
from diffusers import DDPMScheduler, Kandinsky3Pipeline, Kandinsky3UNet, VQModel
from transformers import T5Config, T5EncoderModel, T5Tokenizer

RESOLUTION = 32
WIDTH = 16  # of tokens of text


def write_kandinsky3(folder: Path, *, width: int = WIDTH, seed: int = 7) -> Path:
    """A pipeline whose scheduler holds z_0 within bounds; letters are tokens.

    One group a norm: of fewer numbers a norm multiplies rounding.
    """
    torch.manual_seed(seed)
    unet = Kandinsky3UNet(
        time_embedding_dim=16, groups=1, attention_head_dim=8, layers_per_block=2, block_out_channels=(8, 8, 16, 16),
        cross_attention_dim=16, encoder_hid_dim=width,
    )  # fmt: skip
    movq = VQModel(
        latent_channels=4, vq_embed_dim=4, num_vq_embeddings=16, block_out_channels=(32, 32), layers_per_block=1,
        norm_type="spatial", down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    )  # fmt: skip
    with torch.no_grad():
        for parameter in unet.parameters():
            if not parameter.any():  # else neither text nor time would say anything
                parameter.normal_(std=0.3)
        unet.encoder_hid_proj.projection_norm.bias.normal_(std=0.5)  # padding is not nothing
        movq.decoder.conv_out.weight *= 0.2  # pictures within their range: else rounding grows to what can be seen
    text = T5Config(
        vocab_size=128, d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-silu",
    )  # fmt: skip
    Kandinsky3Pipeline(
        tokenizer=T5Tokenizer(vocab=[*SPECIAL, *((letter, -3.0) for letter in LETTERS)], extra_ids=0),
        text_encoder=T5EncoderModel(text),
        unet=unet,
        scheduler=DDPMScheduler(
            beta_schedule="squaredcos_cap_v2", variance_type="fixed_large", clip_sample=True, clip_sample_range=2.0
        ),
        movq=movq,
    ).save_pretrained(folder)
    return folder


SPECIAL = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,-<>"
