"""A discriminator that judges overlapping patches (Isola et al. 2017), and its terms of a loss."""

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call


class PatchDiscriminator(nn.Module):
    """Logits of how real each patch of a picture looks, with the features on the way.

    All convolutions but the last two halve the picture: four widths judge patches of 70 pixels. The norms are over
    groups of one picture's channels, so that a picture is judged alike in any batch.
    """

    def __init__(self, widths: tuple[int, ...] = (64, 128, 256, 512)):
        """widths: channels of each layer, at least two; from the second on multiples of 16."""
        super().__init__()
        layers: list[nn.Module] = [nn.Sequential(nn.Conv2d(3, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2))]
        for i, (before, width) in enumerate(pairwise(widths), 2):
            stride = 2 if i < len(widths) else 1
            convolution = nn.Conv2d(before, width, 4, stride=stride, padding=1, bias=False)
            layers.append(nn.Sequential(convolution, nn.GroupNorm(8, width), nn.LeakyReLU(0.2)))
        layers.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.layers = nn.ModuleList(layers)

    def forward(self, x_BCHW: Tensor) -> list[Tensor]:
        """Each layer's output for pictures in [-1, 1]; the last are the logits (n, 1, h, w)."""
        outputs = [x_BCHW]
        for layer in self.layers:
            outputs.append(layer(outputs[-1]))
        return outputs[1:]


def smallest_side(widths: list[int]) -> int:
    """Pixels that a picture must have a side for the last layer to have an output."""
    return 3 * 2 ** (len(widths) - 1)


def adversarial_terms(discriminator: PatchDiscriminator, fake_BCHW: Tensor, real_BCHW: Tensor) -> dict[str, Tensor]:
    """What generator and discriminator learn from `fake`, pictures of the generator, and `real`, all in [-1, 1].

    discriminator: hinge loss (Lim & Ye 2017), whose gradient reaches the discriminator alone. adversarial: minus its
    mean logit of `fake`; feature_matching: mean absolute difference of its features (Wang et al. 2018, eq. 4, without
    the logits); their gradients reach the generator alone. So one backward of the sum gives each network its own
    gradient, and one optimizer suffices.
    """
    real = discriminator(real_BCHW.detach())
    fake = discriminator(fake_BCHW.detach())
    constant = {name: weight.detach() for name, weight in discriminator.named_parameters()}
    judged = functional_call(discriminator, constant, (fake_BCHW,))
    distances = [F.l1_loss(ours, theirs.detach()) for ours, theirs in zip(judged[:-1], real[:-1], strict=True)]
    return {
        "discriminator": F.relu(1 - real[-1]).mean() + F.relu(1 + fake[-1]).mean(),
        "adversarial": -judged[-1].mean(),
        "feature_matching": sum(distances, fake_BCHW.new_zeros(())) / len(distances),
    }
