"""The frozen T5 encoder of Kandinsky 3: captions to tokens, each caption at its own length."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lightning_modules.parts.pretrained import load_network
from medsynth.errors import UserError
from medsynth.loading import one_line

TOKENS = 128
"""Tokens of a caption at most, its end among them, as diffusers' pipeline has it; what goes beyond is cut."""
_REMEMBERED = 1024
# What a whole T5 has beside its encoder.
_NO_ENCODER = r"^(decoder\.|lm_head\.)"


class T5Text(nn.Module):
    """Captions to tokens, without gradients.

    What the encoder says of a caption is its own, whatever the batch: it reads no padding.
    """

    def __init__(self, model: Any, tokenizer: Any):
        super().__init__()
        self.model, self.tokenizer = model.requires_grad_(False).eval(), tokenizer
        self._memory: dict[str, Tensor] = {}

    @torch.no_grad()
    def forward(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Tokens (n, L, D) in the encoder's type, zeros behind the shorter ones, and the mask bool (n, L), True on
        tokens; L is the longest's length. An empty caption has none.

        The last 1,024 different captions are remembered: data sets say the same few hundred things over and over.
        """
        if new := sorted({caption for caption in captions if caption not in self._memory}):
            self._memory |= dict(zip(new, self._embed(new), strict=True))
        own = [self._memory[caption] for caption in captions]
        for caption in list(self._memory)[: max(0, len(self._memory) - _REMEMBERED)]:
            del self._memory[caption]
        lengths = torch.tensor([[len(tokens)] for tokens in own], device=self.model.device)
        embeddings = pad_sequence(own, batch_first=True)
        return embeddings, torch.arange(embeddings.shape[1], device=self.model.device) < lengths

    def _apply(self, *args, **kwargs):
        self._memory.clear()  # the weights move or change type
        return super()._apply(*args, **kwargs)

    def _embed(self, captions: list[str]) -> list[Tensor]:
        """Tokens (length, D) of each caption."""
        device = self.model.device
        ids = [torch.tensor(self._ids(caption), dtype=torch.long) for caption in captions]
        mask = pad_sequence([torch.ones_like(own) for own in ids], batch_first=True).to(device)
        padded = pad_sequence(ids, batch_first=True, padding_value=self.tokenizer.pad_token_id).to(device)
        if not mask.any():
            return [torch.zeros(0, self.model.config.d_model, device=device, dtype=self.model.dtype)] * len(captions)
        # float16 overflows within a T5, so that 16-mixed must not compute in it.
        with torch.autocast(device.type, enabled=False):
            embeddings = self.model(input_ids=padded, attention_mask=mask).last_hidden_state
        return [row[: len(own)] for row, own in zip(embeddings, ids, strict=True)]

    def _ids(self, caption: str) -> list[int]:
        if not caption:
            return []
        ids = self.tokenizer(caption, verbose=False).input_ids
        if len(ids) > TOKENS:
            warnings.warn(f"cut to {TOKENS} tokens: {caption!r}", stacklevel=5)
            ids = [*ids[: TOKENS - 1], self.tokenizer.eos_token_id]
        return ids


def load_text(folder: Path, key: str, dtype: torch.dtype) -> T5Text:
    """The encoder and tokenizer of a pipeline's folder, held in `dtype`.

    Raises:
        UserError: they are absent, are none of T5's, or not of one model.
    """
    from transformers import T5EncoderModel

    tokenizer = load_tokenizer(folder / "tokenizer", key)
    model = load_network(T5EncoderModel, folder / "text_encoder", key, _NO_ENCODER, dtype)
    rows = model.config.vocab_size
    if len(tokenizer) > rows:
        raise UserError(
            f"{key}: {folder}/tokenizer knows {len(tokenizer)} tokens, the text encoder {rows}; they are not of one "
            "model"
        )
    return T5Text(model.to(dtype), tokenizer)


def load_tokenizer(folder: Path, key: str) -> Any:
    """The tokenizer of a T5.

    Raises:
        UserError: the folder holds none.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises of many kinds; all mean that there is no tokenizer
        raise UserError(f"{key}: {folder} holds no tokenizer: {one_line(error)}") from error
    # Without its words transformers makes a tokenizer of the special tokens alone, and all prompts are one.
    if len(tokenizer) <= len(tokenizer.all_special_tokens) + 1:
        raise UserError(f"{key}: {folder} has no words: copy or fetch its spiece.model or tokenizer.json anew")
    for name in ("eos_token_id", "pad_token_id"):
        if getattr(tokenizer, name) is None:
            raise UserError(f"{key}: {folder} has no {name.removesuffix('_id')}; it is not the tokenizer of a T5")
    return tokenizer
