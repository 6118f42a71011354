"""Small Stable Diffusion pipelines of random weights, written by diffusers and transformers in the hub's own layout."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

RESOLUTION = 32
TINY = ["model.resolution=32", "data.resolution=32"]


def write_pipeline(folder: Path, *, prediction: str = "epsilon", version: int = 1) -> Path:
    """A pipeline folder as Stable Diffusion 1.x or 2.x has it: 2.x projects linearly and counts heads by level."""
    torch.manual_seed(3)
    width = 16 if version == 1 else 24
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=width,
        attention_head_dim=2 if version == 1 else (2, 4), use_linear_projection=version == 2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16), layers_per_block=1, norm_num_groups=4, sample_size=RESOLUTION,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    )  # fmt: skip
    tokenizer = clip_tokenizer(folder.with_name(f"{folder.name}-words"), pad="<|endoftext|>" if version == 1 else "!")
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction,
        clip_sample=False, set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip
    StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def clip_tokenizer(folder: Path, pad: str) -> CLIPTokenizer:
    """CLIP's own tokenizer with letters only: every word is spelt."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = "!abcdefghijklmnopqrstuvwxyz0123456789.,-<>"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), pad_token=pad, model_max_length=77)
