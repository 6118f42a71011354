"""Frozen text encoders."""

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_modules.weights import RANDOM, Weights, made_here
from medsynth.errors import UserError


@dataclass(frozen=True)
class TextEncoderConfig:
    """A CLIP text encoder with its tokenizer."""

    source: str = "openai/clip-vit-large-patch14"
    """Hub id or local folder in the hub's layout; "random" makes a small fixed one with a tokenizer of its own."""
    max_tokens: int = 77
    """Prompts are cut or padded to this many tokens, start and end tokens among them."""
    width: int = 768
    """Width of the embeddings; for a pretrained encoder its own must agree."""
    layers: int = 12
    """Transformer layers of a random encoder."""
    heads: int = 12
    """Attention heads of a random encoder."""
    vocabulary: int = 49408
    """Rows of a random encoder's token table."""


class TextEncoder(nn.Module):
    """Captions to token embeddings, without gradients."""

    def __init__(self, config: TextEncoderConfig, key: str = "model.text_encoder.source"):
        """Raises UserError that names `key` where the weights are absent or are no CLIP text encoder."""
        super().__init__()
        self.max_tokens = config.max_tokens
        self._memory: dict[str, tuple[Tensor, Tensor]] = {}
        self.tokenizer, self.model = _random(config) if config.source == RANDOM else _pretrained(config, key)
        self.model.requires_grad_(False).eval()

    def forward(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Embed n captions: float (n, max_tokens, width), and the mask bool (n, max_tokens), True on real tokens.

        The last 1,024 different captions are remembered: data sets say the same few hundred things over and over.
        """
        new = sorted({caption for caption in captions if caption not in self._memory})
        if new:
            self._memory |= dict(zip(new, zip(*self._embed(new), strict=True), strict=True))
        embeddings, masks = zip(*(self._memory[caption] for caption in captions), strict=True)
        for caption in list(self._memory)[: max(0, len(self._memory) - 1024)]:
            del self._memory[caption]
        return torch.stack(embeddings), torch.stack(masks)

    def _apply(self, *args, **kwargs):
        self._memory.clear()  # the weights move or change type
        return super()._apply(*args, **kwargs)

    @torch.no_grad()
    def _embed(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        tokens = self.tokenizer(
            captions, padding="max_length", max_length=self.max_tokens, truncation=True, return_tensors="pt"
        ).to(self.model.device)
        self._warn_if_cut(captions)
        embeddings = self.model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        return embeddings, tokens.attention_mask.bool()

    def save_pretrained(self, directory: Path) -> None:
        """Write `text_encoder/` and `tokenizer/` as transformers' `from_pretrained` reads them."""
        self.model.save_pretrained(directory / "text_encoder")
        self.tokenizer.save_pretrained(directory / "tokenizer")

    def _warn_if_cut(self, captions: list[str]) -> None:
        for caption in set(captions):
            # A token has at least one character: short captions need no second look.
            if len(caption) > self.max_tokens - 2 and len(self.tokenizer(caption).input_ids) > self.max_tokens:
                warnings.warn(f"cut to {self.max_tokens} tokens: {caption!r}", stacklevel=3)


def _pretrained(config: TextEncoderConfig, key: str):
    from transformers import AutoTokenizer, CLIPTextModel

    folder = Weights(key, config.source).require()
    parts = (folder / "tokenizer", folder / "text_encoder")
    tokenizer_folder, model_folder = parts if all(p.is_dir() for p in parts) else (folder, folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
        model = CLIPTextModel.from_pretrained(model_folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{key}: {config.source} is no CLIP text encoder in the hub's layout: {error}") from error
    if model.config.hidden_size != config.width:
        raise UserError(
            f"{key}: {config.source} gives embeddings of width {model.config.hidden_size}, "
            f"model.text_encoder.width says {config.width}"
        )
    return tokenizer, model


def _random(config: TextEncoderConfig):
    """A CLIP text model with weights from a fixed seed, and a tokenizer that spells any word."""
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = _word_tokenizer()
    with made_here():
        model = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=config.vocabulary,
                hidden_size=config.width,
                intermediate_size=4 * config.width,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                max_position_embeddings=max(77, config.max_tokens),
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    return tokenizer, model


# Words of the prompts the data sets use; any other word is spelt in bytes.
_WORDS = (
    "Generate an image with containing not a no polyp polyps finding findings abnormality instrument located in the of "
    "size colors pink red white and text green black box artefact small medium sized large lower upper center left "
    "right 5-10mm 11-20mm <5mm >20mm 0 1 2 3 4 5 6 7 8 9 10 mm 5 11 20"
)


def _word_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    specials = ["<|startoftext|>", "<|endoftext|>", "<|pad|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_WORDS] * 2, trainer)
    start, end = (tokenizer.token_to_id(token) for token in specials[:2])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{specials[0]} $A {specials[1]}", special_tokens=[(specials[0], start), (specials[1], end)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=specials[0], eos_token=specials[1], pad_token=specials[2]
    )
