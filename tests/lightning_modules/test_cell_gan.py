"""The cell GAN's networks against the paper's tables, and what a cell's lines may say."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from lightning_modules.nets.cell_gan import Discriminator, Generator, SelfAttention, check_resolution
from lightning_modules.nets.cells import CELL_D, CELL_G, OPERATIONS, Cell, spectral_norm
from lightning_modules.nets.norms import SyncBatchNorm2d
from medsynth.errors import UserError

TINY_G = {"widths": (32, 32, 16, 16, 8), "latent": 16}
TINY_D = {"widths": (8, 16, 16, 32, 32)}

# Of each row of the paper: the layer, and its output's height, width and channels.
TABLE_1 = {
    "L2": ("stem", 4, 4, 1024),
    "L3": ("levels.0.cell", 4, 4, 1024),
    "L4": ("levels.0", 4, 4, 1024),
    "L5": ("ups.0", 8, 8, 1024),
    "L6": ("levels.1.cell", 8, 8, 1024),
    "L7": ("levels.1", 8, 8, 1024),
    "L8": ("ups.1", 16, 16, 512),
    "L9": ("levels.2.cell", 16, 16, 512),
    "L10": ("levels.2.attention", 16, 16, 512),
    "L11": ("levels.2", 16, 16, 512),
    "L11, the second": ("ups.2", 32, 32, 256),
    "L12": ("levels.3.cell", 32, 32, 256),
    "L13": ("levels.3.attention", 32, 32, 256),
    "L14": ("levels.3", 32, 32, 256),
    "L15": ("ups.3", 64, 64, 128),
    "L16": ("head.0", 64, 64, 128),
    "L17": ("head.1", 64, 64, 3),
    "L18": ("", 64, 64, 3),
    "upsample L2": ("ups.3.conv", 64, 64, 256),
    "upsample L3": ("ups.3.norm", 64, 64, 256),
    "cell L1": ("levels.2.cell.nodes.0.0", 16, 16, 512),
    "cell L2": ("levels.2.cell.nodes.1.1", 16, 16, 512),
    "cell L3, of L1": ("levels.2.cell.nodes.2.1", 16, 16, 512),
    "cell L3, of L0": ("levels.2.cell.nodes.2.2", 16, 16, 512),
}
TABLE_3 = {
    "L2": ("stem", 64, 64, 64),
    "L3": ("levels.0.cell", 64, 64, 64),
    "L4": ("levels.0.attention", 64, 64, 64),
    "L5": ("levels.0", 64, 64, 64),
    "L6": ("downs.0", 32, 32, 128),
    "L7": ("levels.1.cell", 32, 32, 128),
    "L8": ("levels.1.attention", 32, 32, 128),
    "L9": ("levels.1", 32, 32, 128),
    "L10": ("downs.1", 16, 16, 256),
    "L11": ("levels.2.cell", 16, 16, 256),
    "L12": ("levels.2", 16, 16, 256),
    "L13": ("downs.2", 8, 8, 512),
    "L14": ("levels.3.cell", 8, 8, 512),
    "L15": ("levels.3", 8, 8, 512),
    "L16": ("downs.3", 4, 4, 1024),
    "downsample L2": ("downs.3.0", 8, 8, 1024),
    "downsample L3": ("downs.3.2", 4, 4, 1024),
    "cell L1": ("levels.3.cell.nodes.0.0", 8, 8, 512),
    "cell L2": ("levels.3.cell.nodes.1.1", 8, 8, 512),
    "cell L3": ("levels.3.cell.nodes.2.0", 8, 8, 512),
    "cell L4": ("levels.3.cell.nodes.3.2", 8, 8, 512),
}


@pytest.fixture(scope="module")
def full():
    """Both networks at full size, without memory."""
    with torch.device("meta"):
        return {Generator: Generator(), Discriminator: Discriminator()}


def tiny(network: type, **options) -> nn.Module:
    """With γ off its 0, so that attention tells."""
    torch.manual_seed(0)
    net = network(**(TINY_G if network is Generator else TINY_D) | options)
    for module in net.modules():
        if isinstance(module, SelfAttention):
            nn.init.constant_(module.gamma, 0.5)
    return net


def noise(n: int = 4) -> torch.Tensor:
    return torch.randn(n, 16, generator=torch.Generator().manual_seed(1))


def pictures(n: int = 4) -> torch.Tensor:
    return torch.rand(n, 3, 64, 64, generator=torch.Generator().manual_seed(2)) * 2 - 1


# Tables 1 to 4


@pytest.mark.parametrize(("network", "millions"), [(Generator, 123.70), (Discriminator, 18.50)])
def test_parameters_as_counted_by_the_tables(full, network, millions):
    assert sum(parameter.numel() for parameter in full[network].parameters()) / 1e6 == pytest.approx(millions, abs=5e-3)


@pytest.mark.parametrize(("network", "table"), [(Generator, TABLE_1), (Discriminator, TABLE_3)])
def test_each_row_of_the_tables_has_its_layer_and_form(full, network, table):
    net, seen = full[network], {}
    layers = dict(net.named_modules())
    handles = [
        layers[name].register_forward_hook(lambda _, __, out, row=row: seen.update({row: tuple(out.shape)}))
        for row, (name, *_) in table.items()
    ]
    with torch.device("meta"):
        labels = torch.zeros(2, dtype=torch.int64)
        out = net(torch.randn(2, 128) if network is Generator else torch.randn(2, 3, 64, 64), labels)
    for handle in handles:
        handle.remove()
    assert seen == {row: (2, channels, height, width) for row, (_, height, width, channels) in table.items()}
    assert out.shape == ((2, 3, 64, 64) if network is Generator else (2,))


def test_cells_are_the_sums_that_the_tables_say(monkeypatch):
    monkeypatch.setitem(OPERATIONS, "conv3x3", lambda channels: nn.Identity())
    monkeypatch.setitem(OPERATIONS, "conv1x1", lambda channels: nn.Identity())
    monkeypatch.setitem(OPERATIONS, "bn", lambda channels: nn.Identity())
    x = torch.randn(1, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    elu, pool = nn.functional.elu, nn.AvgPool2d(3, stride=1, padding=1)
    second = elu(x) + elu(elu(x))
    torch.testing.assert_close(Cell(2, CELL_G)(x), second + elu(x) + x)
    torch.testing.assert_close(Cell(2, CELL_D)(x), x + pool(second) + pool(second))
    skips = [sum(line.count("skip") for line in cell) for cell in (CELL_G, CELL_D)]
    assert skips == [2, 3]  # as the text counts them


def test_attention_is_the_papers_formula():
    attention, x = tiny_attention(), torch.randn(2, 8, 4, 6, generator=torch.Generator().manual_seed(0))
    pooled = [nn.functional.max_pool2d(layer(x), 2).flatten(2) for layer in (attention.key, attention.value)]
    logits = torch.einsum("bcn,bcm->bnm", attention.query(x).flatten(2), pooled[0])
    read = torch.einsum("bnm,bcm->bcn", logits.softmax(dim=2), pooled[1]).unflatten(2, (4, 6))
    torch.testing.assert_close(attention(x), 0.5 * attention.out(read))
    assert attention.out.in_channels == 4
    assert attention.query.out_channels == attention.key.out_channels == 1
    assert (SelfAttention(8)(x) == 0).all()  # γ starts at 0


def tiny_attention() -> SelfAttention:
    torch.manual_seed(0)
    attention = SelfAttention(8).eval()
    nn.init.constant_(attention.gamma, 0.5)
    return attention


def test_attention_has_a_gradient_of_a_gradient():
    attention, x = tiny_attention().double(), torch.randn(1, 8, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(attention, x)


def test_attention_holds_where_float16_would_overflow():
    """Logits are not divided by the root of the width: at 300 · 300 they pass 65504."""
    attention = tiny_attention()
    x = 3e2 * torch.randn(1, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.float16):
        found = attention(x)
    assert (attention.query(x).abs().max() * attention.key(x).abs().max()).item() > 65504
    assert found.isfinite().all()
    torch.testing.assert_close(found.float(), attention(x), rtol=0.02, atol=2)


# Both networks


def test_pictures_and_logits_are_float32_also_under_autocast():
    generator, discriminator, labels = tiny(Generator), tiny(Discriminator), torch.tensor([0, 1, 2, 3])
    with torch.no_grad():
        whole = generator(noise(), labels)
        assert (whole.shape, whole.dtype) == ((4, 3, 64, 64), torch.float32)
        assert -1 <= whole.min() < whole.max() <= 1
        with torch.autocast("cpu", torch.bfloat16):
            narrow, logits = generator(noise(), labels), discriminator(pictures(), labels)
    assert narrow.dtype == logits.dtype == torch.float32
    assert (narrow - whole).abs().mean() < 0.03
    torch.testing.assert_close(logits, discriminator(pictures(), labels), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("network", [Generator, Discriminator])
def test_another_class_is_another_result_and_every_weight_learns(network):
    net, given = tiny(network), noise() if network is Generator else pictures()
    labels = torch.tensor([0, 1, 2, 3])
    if network is Generator:
        for up in net.ups:  # which begin alike for all classes
            nn.init.normal_(up.norm.shift.weight, std=0.3)
    out = net(given, labels)
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
    still = [name for name, p in net.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert not still
    net.eval()
    with torch.no_grad():
        assert all((net(given, (labels + shift) % 4) != net(given, labels)).any() for shift in (1, 2, 3))
        alone = torch.cat([net(given[i : i + 1], labels[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(alone, net(given, labels), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("network", [Generator, Discriminator])
def test_every_convolution_and_linear_layer_is_under_spectral_norm(network):
    net = tiny(network).train()
    given, labels = noise() if network is Generator else pictures(), torch.zeros(4, dtype=torch.int64)
    with torch.no_grad():
        for _ in range(60):
            for layer in net.modules():
                if parametrize.is_parametrized(layer):
                    layer.weight  # noqa: B018  # a look in training is an iteration
        net(given, labels)
    net.eval()
    layers = [layer for layer in net.modules() if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)]
    assert len(layers) > 20
    for layer in layers:
        weight = layer.weight.transpose(0, 1) if isinstance(layer, nn.ConvTranspose2d) else layer.weight
        assert float(torch.linalg.matrix_norm(weight.detach().flatten(1), 2)) == pytest.approx(1, abs=0.02)


def test_spectral_norm_is_torchs_and_never_of_16_bits(monkeypatch):
    for layer in (nn.Conv2d(3, 5, 3), nn.ConvTranspose2d(4, 3, 2), nn.Linear(6, 2)):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            theirs = nn.utils.parametrizations.spectral_norm(type(layer)(*SHAPES[type(layer)]))
            torch.manual_seed(0)
            ours = spectral_norm(type(layer)(*SHAPES[type(layer)]))
        assert torch.equal(ours.weight, theirs.weight)
        assert list(ours.state_dict()) == list(theirs.state_dict())
    norm, seen = ours.parametrizations.weight[0], []
    monkeypatch.setattr(norm, "_power_method", lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    with torch.autocast("cpu", torch.bfloat16):
        ours.train().weight  # noqa: B018
    assert seen == [False]


SHAPES = {nn.Conv2d: (3, 5, 3), nn.ConvTranspose2d: (4, 3, 2), nn.Linear: (6, 2)}


# Other cells and sizes


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_keeps_the_shape_and_can_stand_in_a_cell(name):
    cell = Cell(8, (f"{name}(0)", "skip(0) + skip(1)"))
    x = torch.randn(2, 8, 6, 4)
    assert cell(x).shape == x.shape
    if name == "zero":
        assert torch.equal(cell(x), x)
    assert any(isinstance(layer, SyncBatchNorm2d) for layer in cell.modules()) is (name == "bn")


def test_another_cell_and_another_size_are_options():
    generator = tiny(Generator, cell=("sep3x3-elu(0)",), widths=(16, 8, 8), attention=(4,), classes=2)
    discriminator = tiny(Discriminator, cell=("max3x3(0) + zero(0)",), widths=(8, 8, 16), attention=(), classes=2)
    labels = torch.tensor([0, 1])
    assert generator(noise(2), labels).shape == (2, 3, 16, 16)
    assert discriminator(generator(noise(2), labels), labels).shape == (2,)


REFUSED = {
    (): r"cell: it has no nodes; give lines such as",
    ("conv3x3(0)", "elu(2)"): r'cell: node 2, "elu\(2\)": node 2 is not before it; use 0, the input, to 1',
    ("conv3x4(0)",): r"there is no operation conv3x4; did you mean conv3x3\?",
    ("softmax(0)",): r"there is no operation softmax; there are avg3x3, ",
    ("conv3x3",): r'"conv3x3" is no edge; write operations and the node they are done to: elu\(0\)',
    ("elu(0)", "skip(0)"): r"nothing is done with node 1 of .*; use it or leave it out",
}


@pytest.mark.parametrize("lines", REFUSED)
def test_a_cell_that_cannot_be_is_one_line(lines):
    with pytest.raises(UserError, match=REFUSED[lines]):
        Cell(4, lines)


def test_attention_without_a_cell_and_other_sizes_are_one_line():
    with pytest.raises(
        UserError, match=r"attention=\[64\]: there is no cell at side 64; there are cells at 4, 8, 16, 32"
    ):
        Generator(attention=(64,))
    check_resolution(64, (1024, 1024, 512, 256, 128))
    with pytest.raises(UserError, match=r"resolution=100: networks of 5 widths have pictures of 64 pixels, .* set 64"):
        check_resolution(100, (1024, 1024, 512, 256, 128))
