"""A small network that answers yes-or-no questions about pictures.

It learns from pictures whose answers are known; how often it is right on others says how far it is to be believed of
generated ones.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_BATCH = 32
_AT_ONCE = 250


class Probe(nn.Module):
    """Convolutions down to an eighth of the side; each channel's greatest and mean value answer the questions.

    The greatest finds what is small, the mean tells one from several. Made for pictures of about 64 pixels.
    """

    def __init__(self, questions: int, widths: tuple[int, int, int] = (16, 32, 64)):
        super().__init__()
        first, second, third = widths
        self.features = nn.Sequential(
            _convolution(3, first), nn.MaxPool2d(2),
            _convolution(first, second), nn.MaxPool2d(2),
            _convolution(second, third), _convolution(third, third), nn.MaxPool2d(2),
            _convolution(third, third),
        )  # fmt: skip
        self.answer = nn.Linear(2 * third, questions)

    def forward(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W), floating point in [0, 1], to logits (B, questions); above 0 is yes."""
        features = self.features(images.to(memory_format=torch.channels_last))
        return self.answer(torch.cat([features.amax((2, 3)), features.mean((2, 3))], dim=1))

    @torch.no_grad()
    def answers(self, images: Tensor) -> Tensor:
        """Pictures, uint8 (n, 3, H, W), to bool (n, questions)."""
        self.eval()
        return torch.cat([self(part.float() / 255) > 0 for part in images.split(_AT_ONCE)])


def _convolution(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


def train_probe(
    images: Tensor, answers: Tensor, steps: int, seed: int, progress: Callable[[int], None] = lambda _: None
) -> Probe:
    """A probe that has learned `answers` of `images`, by binary cross-entropy; the same numbers give the same one.

    It sees the pictures with noise, under more and less light, and blurred by chance: what a generator gets wrong
    beside the question is not to change the answer.

    Args:
        images: uint8 (n, 3, H, W). answers: bool (n, questions). steps: of 32 pictures each.
        progress: called with the number of steps done, after each.
    """
    chance = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        probe = Probe(answers.shape[1]).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(probe.parameters(), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=steps)
    for step in range(steps):
        rows = torch.randint(len(images), (_BATCH,), generator=chance)
        logits = probe(_disturbed(images[rows].float() / 255, chance))
        loss = F.binary_cross_entropy_with_logits(logits, answers[rows].float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress(step + 1)
    return probe


def _disturbed(images: Tensor, chance: torch.Generator) -> Tensor:
    """Pictures (B, 3, H, W) in about [0, 1], each with 0.9 to 1.1 of its light, some share of a 3×3 blur, and noise."""
    light, share = (torch.rand(len(images), 1, 1, 1, generator=chance) for _ in range(2))
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    noise = torch.randn(images.shape, generator=chance)
    return torch.lerp(images, blurred, share) * (0.9 + 0.2 * light) + 0.03 * noise
