"""DreamBooth: a few pictures of a subject are bound to a rare word, while the word's class keeps its meaning.

Ruiz et al. 2022; Morgan State at MEDVQA-GI 2024 (section 4.1) with low-rank updates, the LLCM paper (section 3.4.2)
without.
"""

from dataclasses import dataclass

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from datamodules.batches import ImageBatch
from lightning_modules.families.fine_tuning import FineTuning, FineTuningConfig
from medsynth.ranges import number


@dataclass(frozen=True)
class DreamBoothConfig(FineTuningConfig):
    """How much the prior weighs."""

    class_pictures: int = number(0, least=0)
    """Class pictures that training sees, those of a class; data.class_pictures says how many. 0: no prior, and all
    pictures weigh alike."""
    prior_weight: float = number(1.0, least=0)
    """Weight λ of the loss on class pictures."""


class DreamBooth(FineTuning):
    """The denoising loss on pictures of the subject plus λ times that on class pictures (Ruiz et al. 2022, eq. 2)."""

    Config = DreamBoothConfig
    config: DreamBoothConfig

    def sample_weights(self, batch: ImageBatch) -> Tensor | float:
        # Half of all samples are class pictures, so that means over the halves are twice the mean over all. A batch's
        # own halves would do as well, but for micro-batches of odd size.
        if not self.config.class_pictures:
            return 1.0
        return torch.where(batch.is_prior, 2 * self.config.prior_weight, 2.0)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit" and not self.cached_text:
            self._warn_of_split_words(self.datamodule.rare_words())

    def _warn_of_split_words(self, words: list[str]) -> None:
        for word in words:
            pieces = self.own_text_encoder.tokenizer.tokenize(word)
            if len(pieces) > 1:
                rank_zero_warn(
                    f"the tokenizer splits {word!r} into {len(pieces)} pieces with meanings of their own; better is a "
                    "rare word that it knows as one, such as sks"
                )
