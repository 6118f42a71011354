"""Text encoders, frozen unless a method trains them."""

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.parts.pretrained import load_network
from lightning_modules.parts.weights import RANDOM, Weights, made_here
from medsynth.errors import UserError
from medsynth.loading import one_line
from medsynth.ranges import number

# One thread tokenises a batch's few captions sooner than others wake up.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# What a whole CLIP has beside its text encoder: no token's embedding goes through it. Positions are counted anew.
_NO_TEXT = r"^(vision_model\.|visual_projection\.|logit_scale$)|position_ids$"
_NO_WORDS = rf"^text_projection\.|{_NO_TEXT}"


@dataclass(frozen=True)
class TextEncoderConfig:
    """A CLIP text encoder with its tokenizer."""

    source: str = "openai/clip-vit-large-patch14"
    """Hub id or local folder in the hub's layout; "random" makes a small fixed one with a tokenizer of its own."""
    max_tokens: int = number(77, least=3)
    """Prompts are cut or padded to this many tokens, start and end tokens among them."""
    chunks: int = number(1, least=1)
    """Windows of max_tokens that a prompt may fill, each encoded by itself; what goes beyond is cut with a warning."""
    width: int = number(768, least=1)
    """Width of the embeddings; for a pretrained encoder its own must agree."""
    layers: int = number(12, least=0)
    """Transformer layers of a random encoder."""
    heads: int = number(12, least=1)
    """Attention heads of a random encoder."""
    vocabulary: int = number(49408, least=1)
    """Rows of a random encoder's token table."""

    def __post_init__(self):
        if self.source == RANDOM and self.width % self.heads:
            raise UserError(f"model.text_encoder.heads={self.heads}: must divide width={self.width}")


class TextEncoder(nn.Module):
    """Captions to token embeddings; without gradients, unless its `model` learns."""

    tokenizer: Any  # transformers', of the model's kind
    model: Any

    def __init__(
        self,
        config: TextEncoderConfig,
        key: str = "model.text_encoder.source",
        attend_padding: bool = False,
        pooled: bool = False,
        dtype: torch.dtype = torch.float32,
    ):
        """Load or make the encoder.

        attend_padding: let padding take part in attention, as Stable Diffusion has it. pooled: give the projected
        embedding of the whole caption too, as one more row. dtype: what the weights are held in.

        Raises:
            UserError: the weights are absent or are no CLIP text encoder; `key` is named.
        """
        super().__init__()
        self.max_tokens, self.chunks, self.attend_padding = config.max_tokens, config.chunks, attend_padding
        self.pooled = pooled
        self.learns = False  # else the same caption has the same embedding
        self._memory: dict[str, tuple[Tensor, Tensor]] = {}
        made = _random(config, pooled) if config.source == RANDOM else _pretrained(config, key, pooled, dtype)
        self.tokenizer, self.model = made[0], made[1].to(dtype).requires_grad_(False).eval()

    def forward(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Embed n captions: float (n, chunks · max_tokens, width), and the mask bool (n, …), True on real tokens.

        With `pooled` each window has a row more, its last, which is real.

        A frozen encoder remembers the last 1,024 different captions: data sets say the same few hundred things over and
        over.
        """
        if self.learns:
            return self._embed(captions)
        new = sorted({caption for caption in captions if caption not in self._memory})
        if new:
            with torch.no_grad():
                self._memory |= dict(zip(new, zip(*self._embed(new), strict=True), strict=True))
        embeddings, masks = zip(*(self._memory[caption] for caption in captions), strict=True)
        for caption in list(self._memory)[: max(0, len(self._memory) - 1024)]:
            del self._memory[caption]
        return torch.stack(embeddings), torch.stack(masks)

    def _apply(self, *args, **kwargs):
        self._memory.clear()  # the weights move or change type
        return super()._apply(*args, **kwargs)

    def _embed(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        ids = self.tokenizer(captions, add_special_tokens=False, verbose=False).input_ids
        windows = [w for caption, own in zip(captions, ids, strict=True) for w in self._windows(caption, own)]
        pad, device = self.tokenizer.pad_token_id, self.model.device
        padded = [window + [pad] * (self.max_tokens - len(window)) for window in windows]
        input_ids = torch.tensor(padded, device=device)
        lengths = torch.tensor([[len(window)] for window in windows], device=device)
        mask = torch.arange(self.max_tokens, device=device) < lengths
        attended = None if self.attend_padding else mask.long()
        given = self.model(input_ids=input_ids, attention_mask=attended)
        embeddings = given.last_hidden_state
        if self.pooled:
            embeddings = torch.cat([embeddings, given.text_embeds[:, None]], dim=1)
            mask = torch.cat([mask, mask[:, :1]], dim=1)
        length = self.chunks * embeddings.shape[1]
        return embeddings.reshape(len(captions), length, -1), mask.reshape(len(captions), length)

    def _windows(self, caption: str, ids: list[int]) -> list[list[int]]:
        """The token ids in `chunks` windows, each with start and end token, not padded."""
        room = self.max_tokens - 2
        if len(ids) > room * self.chunks:
            warnings.warn(f"cut to {self.chunks * self.max_tokens} tokens: {caption!r}", stacklevel=4)
        start, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        return [[start, *ids[i * room : (i + 1) * room], end] for i in range(self.chunks)]

    def save_pretrained(self, directory: Path) -> None:
        """Write `text_encoder/` and `tokenizer/` as transformers' `from_pretrained` reads them."""
        self.model.save_pretrained(directory / "text_encoder")
        self.tokenizer.save_pretrained(directory / "tokenizer")


def text_weights(key: str, source: str) -> Weights:
    """Where a text encoder comes from: a folder of its own, or the two of a whole diffusers pipeline."""
    return Weights(key, source, nested=("tokenizer", "text_encoder"))


def _pretrained(config: TextEncoderConfig, key: str, pooled: bool, dtype: torch.dtype) -> tuple[Any, Any]:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    folder = text_weights(key, config.source).require()
    parts = (folder / "tokenizer", folder / "text_encoder")
    tokenizer_folder, model_folder = parts if all(p.is_dir() for p in parts) else (folder, folder)
    network, spare = (CLIPTextModelWithProjection, _NO_TEXT) if pooled else (CLIPTextModel, _NO_WORDS)
    model = load_network(network, model_folder, key, spare, dtype)
    tokenizer = load_tokenizer(tokenizer_folder, model.config, key)
    if model.config.hidden_size != config.width:
        raise UserError(
            f"{key}: {config.source} gives embeddings of width {model.config.hidden_size}, "
            f"model.text_encoder.width says {config.width}"
        )
    if model.config.max_position_embeddings < config.max_tokens:
        raise UserError(
            f"{key}: {model_folder} takes {model.config.max_position_embeddings} tokens, {config.max_tokens} are asked "
            f"for; set model.text_encoder.max_tokens={model.config.max_position_embeddings}"
        )
    return tokenizer, model


def load_tokenizer(folder: Path, text: Any, key: str) -> Any:
    """The tokenizer of a folder, for the text encoder with the config `text`.

    Raises:
        UserError: there is none, or not that encoder's; `key` is named.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises of many kinds; all mean that there is no tokenizer
        raise UserError(f"{key}: {folder} holds no tokenizer: {one_line(error)}") from error
    _check_tokenizer(tokenizer, text, f"{key}: {folder}")
    return tokenizer


def _check_tokenizer(tokenizer: Any, text: Any, where: str) -> None:
    """Raise UserError unless every token has a row of the encoder's table, and prompts have a start, end and padding.

    text: the encoder's config. where: begins the line.
    """
    if len(tokenizer) > text.vocab_size:
        raise UserError(
            f"{where} knows {len(tokenizer)} tokens, the text encoder {text.vocab_size}; they are not of one model"
        )
    # Without its words transformers makes a tokenizer of the special tokens alone, and all prompts are one.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise UserError(f"{where} has no words: vocab.json or tokenizer.json is missing; copy or fetch it anew")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(tokenizer, name) is None:
            raise UserError(f"{where} has no {name.removesuffix('_id')}; it is not the tokenizer of a CLIP")


def _random(config: TextEncoderConfig, pooled: bool) -> tuple[Any, Any]:
    """A CLIP text model with weights from a fixed seed, and a tokenizer that spells any word."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = word_tokenizer()
    with made_here():
        model = (CLIPTextModelWithProjection if pooled else CLIPTextModel)(
            CLIPTextConfig(
                vocab_size=config.vocabulary,
                hidden_size=config.width,
                projection_dim=config.width,
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


def word_tokenizer():
    """A fixed tokenizer of the data sets' own words, for random encoders; it has about 450 tokens."""
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
        tokenizer_object=tokenizer,
        bos_token=specials[0],
        eos_token=specials[1],
        pad_token=specials[2],
        model_max_length=77,  # without, pipelines cannot read an exported folder
    )
