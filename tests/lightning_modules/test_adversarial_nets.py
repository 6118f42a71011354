"""The baselines' networks: their sizes, as their papers and public code have them, and what is particular to each."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from jobs.run.config import load_config
from jobs.run.folder import build_module
from lightning_modules.nets.began import AutoencodingDiscriminator, Decoder
from lightning_modules.nets.dcgan import DCGANDiscriminator, DCGANGenerator
from lightning_modules.nets.wgan_gp import ResidualBlock, ResidualCritic
from tests.conftest import REPOSITORY


def count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def players(preset: str):
    """Of a preset at full size, without memory for the weights."""
    module = build_module(load_config([REPOSITORY / f"configs/{preset}.yaml"], ["data.root=data"]))
    with torch.device("meta"):
        return module.make_generator(), module.make_discriminator()


def convolutional(width: int, side: int) -> tuple[int, int]:
    """DCGAN's, by hand: convolutions without bias of a latent of 100 and widths 8, 4, 2, 1; norms between."""
    inner = (8 * 4 + 4 * 2 + 2 * 1) * width**2 * side**2
    ends = 3 * width * side**2
    generator = 100 * 8 * width * 16 + inner + ends + 2 * width * (8 + 4 + 2 + 1)
    return generator, inner + ends + 8 * width * 16 + 2 * width * (8 + 4 + 2)


def residual(width: int = 64) -> tuple[int, int]:
    """`GoodGenerator` and `GoodDiscriminator`, by hand."""
    widths = [8 * width, 8 * width, 4 * width, 2 * width, width]
    generator = 128 * 16 * widths[0] + 16 * widths[0] + 2 * width + 27 * width + 3
    critic = 27 * width + width + 16 * widths[0] + 1
    for wide, narrow in pairwise(widths):
        generator += 2 * wide + 9 * wide * narrow + 2 * narrow + 9 * narrow**2 + narrow + wide * narrow + narrow
        critic += 2 * narrow + 9 * narrow**2 + 2 * narrow + 9 * narrow * wide + wide + narrow * wide + wide
    return generator, critic


def autoencoding(n: int = 128, latent: int = 64) -> tuple[int, int]:
    """BEGAN's at 64×64: 8 convolutions and one to colours in a decoder, 8 and 3 of stride 2 in an encoder."""

    def conv(a: int, b: int) -> int:
        return 9 * a * b + b

    decoder = latent * 64 * n + 64 * n + 8 * conv(n, n) + conv(n, 3)
    encoder = conv(3, n) + sum(conv(max(1, i - 1) * n, i * n) + conv(i * n, i * n) for i in (1, 2, 3, 4))
    encoder += sum(conv(i * n, i * n) for i in (1, 2, 3)) + 64 * 4 * n * latent + latent
    return decoder, encoder + decoder


SIZES = {
    "dcgan": convolutional(128, 5),
    "bgan": convolutional(128, 5),
    "wgan": (3_576_704, 2_765_568),  # the figures of the public code in PyTorch
    "wgan_gp": residual(),
    "began": autoencoding(),
}


@pytest.mark.parametrize("preset", SIZES)
def test_the_presets_have_the_papers_networks(preset):
    assert tuple(count(each) for each in players(preset)) == SIZES[preset]


def test_the_public_codes_count_is_that_of_the_formula():
    assert SIZES["wgan"] == convolutional(64, 4)


@pytest.mark.parametrize("kernel", [4, 5])
@pytest.mark.parametrize("side", [8, 64])
def test_shapes_and_ranges(kernel, side):
    pictures = DCGANGenerator(10, 2, side, kernel)(torch.randn(3, 10))
    assert pictures.shape == (3, 3, side, side)
    assert pictures.abs().max() <= 1
    assert DCGANDiscriminator(2, side, kernel)(pictures).shape == (3,)


def test_weights_begin_as_the_paper_says():
    torch.manual_seed(0)
    network = DCGANGenerator(100, 32, 64)
    stds = [layer.weight.std().item() for layer in network.modules() if isinstance(layer, nn.ConvTranspose2d)]
    assert stds == pytest.approx([0.02] * len(stds), rel=0.05)


def test_a_critics_norm_is_layer_norm_over_a_picture_with_a_scale_a_channel():
    norm, x = ResidualBlock(4, 6, up=False).norm1, torch.randn(3, 4, 5, 5)
    with torch.no_grad():
        norm.weight.copy_(torch.arange(4.0))
        norm.bias.copy_(torch.tensor([1.0, 0, 0, -1]))
    plain = nn.functional.layer_norm(x, (4, 5, 5)) * norm.weight.view(4, 1, 1) + norm.bias.view(4, 1, 1)
    torch.testing.assert_close(norm(x), plain)


def test_a_critic_judges_each_picture_by_itself():
    """As the penalty needs it."""
    torch.manual_seed(0)
    critic, x = ResidualCritic(4, 16), torch.randn(3, 3, 16, 16)
    alone = torch.cat([critic(each[None]) for each in x])
    torch.testing.assert_close(critic(x), alone, atol=1e-5, rtol=1e-5)


def test_an_autoencoder_gives_pictures_of_the_same_size():
    assert Decoder(5, 4, 32)(torch.randn(2, 5)).shape == (2, 3, 32, 32)
    assert AutoencodingDiscriminator(5, 4, 64)(torch.randn(2, 3, 64, 64)).shape == (2, 3, 64, 64)
