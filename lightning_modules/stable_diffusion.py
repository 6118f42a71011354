"""Stable Diffusion fine-tuned on pictures and captions, whole or by low-rank updates.

Morgan State at MEDVQA-GI 2024 (section 3.2) and the LLCM paper's comparison on canine hips.
"""

from lightning_modules.families.fine_tuning import FineTuning, FineTuningConfig


class StableDiffusion(FineTuning):
    """The denoising loss on the captions of the data set."""

    Config = FineTuningConfig
