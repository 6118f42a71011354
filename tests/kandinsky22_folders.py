"""Small prior and decoder of Kandinsky 2.2, random weights, as diffusers and transformers write them for the hub."""

from pathlib import Path

import torch
from diffusers import (
    DDPMScheduler,
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
    PriorTransformer,
    UnCLIPScheduler,
    UNet2DConditionModel,
    VQModel,
)
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from tests.sd_folder import clip_tokenizer

RESOLUTION = 32
WIDTH = 16  # of embeddings


def write_prior(folder: Path, *, width: int = WIDTH, layers: int = 1) -> Path:
    """A prior with its encoders; embeddings have a mean and a standard deviation of their own."""
    torch.manual_seed(5)
    prior = PriorTransformer(
        num_attention_heads=2, attention_head_dim=8, num_layers=layers, embedding_dim=width, num_embeddings=77
    )
    with torch.no_grad():
        prior.clip_mean.normal_(std=0.1)
        prior.clip_std.uniform_(0.3, 0.6)
        prior.positional_embedding.normal_(std=0.1)
        prior.prd_embedding.normal_(std=0.1)
    tokenizer = clip_tokenizer(folder.with_name(f"{folder.name}-words"), pad="<|endoftext|>")
    words = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, projection_dim=width, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=77, **words,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=32, projection_dim=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        image_size=16, patch_size=8,
    )  # fmt: skip
    KandinskyV22PriorPipeline(
        prior=prior,
        image_encoder=CLIPVisionModelWithProjection(vision),
        text_encoder=CLIPTextModelWithProjection(text),
        tokenizer=tokenizer,
        scheduler=UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", clip_sample=True, clip_sample_range=5.0
        ),
        image_processor=CLIPImageProcessor(size=16, crop_size=16),
    ).save_pretrained(folder)
    return folder


def write_decoder(folder: Path, *, width: int = WIDTH) -> Path:
    """A decoder: U-Net and MoVQ, whose scheduler holds z_0 within bounds."""
    torch.manual_seed(6)
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=8, block_out_channels=(8, 16), layers_per_block=1,
        norm_num_groups=4, attention_head_dim=8, cross_attention_dim=16, encoder_hid_dim=width,
        encoder_hid_dim_type="image_proj", addition_embed_type="image", resnet_time_scale_shift="scale_shift",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    )  # fmt: skip
    movq = VQModel(
        latent_channels=4, vq_embed_dim=4, num_vq_embeddings=16, block_out_channels=(32, 32), layers_per_block=1,
        norm_type="spatial", down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    )  # fmt: skip
    with torch.no_grad():
        unet.conv_out.weight[4:] *= 0.2  # a variance within the range that is learned, and pictures within theirs:
        movq.decoder.conv_out.weight *= 0.2  # else rounding grows to what can be seen
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="linear", variance_type="learned_range",
        clip_sample=True, clip_sample_range=2.0,
    )  # fmt: skip
    KandinskyV22Pipeline(unet=unet, movq=movq, scheduler=scheduler).save_pretrained(folder)
    return folder
