"""Small whole CLIPs of random weights, written by transformers in the hub's own layout."""

from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from tests.sd_folder import clip_tokenizer

SIDE = 16


def write_clip(folder: Path) -> Path:
    """A CLIP folder as OpenAI's have it: config, weights, tokenizer, image processor."""
    torch.manual_seed(5)
    tokenizer = clip_tokenizer(folder.with_name(f"{folder.name}-words"), pad="<|endoftext|>")
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, **layers}
    text |= {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    vision = {"hidden_size": 24, "intermediate_size": 48, "image_size": SIDE, "patch_size": 4, **layers}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
    processor = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    for part in (model, tokenizer, processor):
        part.save_pretrained(folder)
    return folder
