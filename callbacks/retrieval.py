"""After each validation of a method that embeds pictures and captions in one space: how well one finds the other."""

from typing import Any

import lightning as L
import torch

from callbacks.lightning_types import data_of
from datamodules.batches import ImageBatch
from lightning_modules.base import JointEmbedding
from metrics.retrieval import RetrievalScores, score_names

_AT_ONCE = 64  # captions


def logged_by(module: L.LightningModule) -> list[str]:
    """The names that `Retrieval` logs of a module."""
    return [f"val/{name}" for name in score_names()] if isinstance(module, JointEmbedding) else []


class Retrieval(L.Callback):
    """Logs `val/<name>` for each score of `RetrievalScores` over the validation set, the same for any number of
    processes; of other methods nothing.

    Prompts are those that the data set has; a sample without words, or padding, has no part in it.
    """

    def __init__(self) -> None:
        self._scores: RetrievalScores | None = None
        self._rows: dict[str, int] = {}

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not isinstance(pl_module, JointEmbedding) or trainer.sanity_checking:
            self._scores = None
            return
        prompts = [caption for caption in data_of(trainer).all_captions() if caption]
        self._rows = {prompt: row for row, prompt in enumerate(prompts)}
        self._scores = RetrievalScores().to(pl_module.device)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: ImageBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._scores is None or not isinstance(pl_module, JointEmbedding):
            return
        with trainer.precision_plugin.forward_context():
            embeddings = pl_module.picture_embeddings(batch.pictures())
        captions = batch.conditions.captions or [""] * len(batch)
        rows = torch.tensor([self._rows.get(caption, -1) for caption in captions])
        ids = batch.seeds if batch.picture_ids is None else batch.picture_ids
        counted = ((batch.seeds >= 0) & (rows >= 0)).to(embeddings.device)
        ids, rows = ids.to(embeddings.device), rows.to(embeddings.device)
        self._scores.update(embeddings[counted], ids[counted], rows[counted])

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._scores is None or not isinstance(pl_module, JointEmbedding):
            return
        prompts = list(self._rows)
        parts = [prompts[first : first + _AT_ONCE] for first in range(0, len(prompts), _AT_ONCE)]
        with trainer.precision_plugin.forward_context():
            known = [pl_module.caption_embeddings(part) for part in parts]
        self._scores.compare_with(torch.cat(known).float())
        values = self._scores.compute()
        pl_module.log_dict({f"val/{name}": value for name, value in values.items()}, rank_zero_only=False)
        self._scores = None
