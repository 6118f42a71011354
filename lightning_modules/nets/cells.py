"""Cells of the cell GAN (Berezsky et al. 2024): small graphs of operations, written as a line of text a node.

A node is a sum of edges, an edge an operation on an earlier node, 0 being the cell's input; the last is the output:

    ("conv3x3-elu-bn(0)", "skip(1) + conv3x3-conv1x1-elu-bn(1)")

Operations in a row are joined by "-". All keep the number of channels, height and width.
"""

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from lightning_modules.nets.norms import SyncBatchNorm2d
from medsynth.errors import UserError, nearest

CELL_G = ("conv3x3-elu-bn(0)", "skip(1) + conv3x3-conv1x1-elu-bn(1)", "skip(2) + conv3x3(1) + conv3x3(0)")
"""The generator's cell: Table 2."""
CELL_D = ("conv3x3-elu-bn(0)", "skip(1) + conv3x3-conv1x1-elu-bn(1)", "avg3x3(2)", "skip(0) + skip(3) + avg3x3(2)")
"""The discriminator's cell: Table 4, whose L4 = L0 + L3 + AvgPool(L2)."""

Layer = TypeVar("Layer", nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
_EDGE = re.compile(r"([a-z0-9-]+)\((\d+)\)")


def full_precision(x: Tensor) -> AbstractContextManager[Any]:
    """Within it nothing is computed in 16 bits by itself, on the device of x."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


class _SpectralNorm(parametrizations._SpectralNorm):
    """torch's, but in the weight's own precision: under autocast σ would be of 16 bits, and wrong by up to 1 %."""

    def forward(self, weight: Tensor) -> Tensor:
        with full_precision(weight):
            return super().forward(weight)


def spectral_norm(layer: Layer) -> Layer:
    """The same layer, its weight divided by its largest singular value (Miyato et al. 2018)."""
    dim = 1 if isinstance(layer, nn.ConvTranspose2d) else 0  # of the output's channels
    parametrize.register_parametrization(layer, "weight", _SpectralNorm(layer.weight, dim=dim))
    return layer


def convolution(in_channels: int, out_channels: int, kernel: int, *, bias: bool = True, groups: int = 1) -> nn.Conv2d:
    """A convolution under spectral norm that keeps height and width."""
    return spectral_norm(nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=bias, groups=groups))


def separable(channels: int) -> nn.Sequential:
    """conv3x3 of each channel by itself, then conv1x1."""
    return nn.Sequential(convolution(channels, channels, 3, groups=channels), convolution(channels, channels, 1))


class Zero(nn.Module):
    """Nothing of its input, which yet has a gradient, of zeros."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 0


OPERATIONS: dict[str, Callable[[int], nn.Module]] = {
    "conv1x1": lambda channels: convolution(channels, channels, 1),
    "conv3x3": lambda channels: convolution(channels, channels, 3),
    "conv5x5": lambda channels: convolution(channels, channels, 5),
    "sep3x3": separable,
    "zero": lambda channels: Zero(),
    "skip": lambda channels: nn.Identity(),
    "max3x3": lambda channels: nn.MaxPool2d(3, stride=1, padding=1),
    "avg3x3": lambda channels: nn.AvgPool2d(3, stride=1, padding=1),
    "elu": lambda channels: nn.ELU(),
    "bn": lambda channels: SyncBatchNorm2d(channels),
}
"""What an edge can do: name -> the module for so many channels."""


class Cell(nn.Module):
    """(B, channels, H, W) to the same shape, as the lines of `nodes` say.

    Raises UserError where a line is none, an operation is not known, or a node is not used.
    """

    def __init__(self, channels: int, nodes: Sequence[str]):
        super().__init__()
        graph = read_cell(nodes)
        self.sources = [[source for _, source in edges] for edges in graph]
        self.nodes = nn.ModuleList(
            nn.ModuleList(nn.Sequential(*(OPERATIONS[name](channels) for name in names)) for names, _ in edges)
            for edges in graph
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        values = [x_BCHW]
        for edges, sources in zip(self.nodes, self.sources, strict=True):
            terms = [edge(values[source]) for edge, source in zip(edges, sources, strict=True)]  # pyrefly: ignore
            values.append(sum(terms[1:], terms[0]))
        return values[-1]


def read_cell(nodes: Sequence[str]) -> list[list[tuple[list[str], int]]]:
    """Of each node its edges: the operations in their order, and the number of the node that they are done to.

    Raises:
        UserError: naming the line and the mend.
    """
    if not nodes:
        raise UserError(f'cell: it has no nodes; give lines such as "{CELL_G[0]}"')
    graph = [[_read_edge(edge, number, line) for edge in line.split("+")] for number, line in enumerate(nodes, 1)]
    used = {source for edges in graph for _, source in edges} | {len(graph)}
    if unused := set(range(len(graph) + 1)) - used:
        raise UserError(f"cell: nothing is done with node {min(unused)} of {list(nodes)}; use it or leave it out")
    return graph


def _read_edge(edge: str, number: int, line: str) -> tuple[list[str], int]:
    where = f'cell: node {number}, "{line}"'
    found = _EDGE.fullmatch(edge.strip())
    if found is None:
        raise UserError(f'{where}: "{edge.strip()}" is no edge; write operations and the node they are done to: elu(0)')
    names, source = found[1].split("-"), int(found[2])
    for name in names:
        if name not in OPERATIONS:
            raise UserError(f"{where}: there is no operation {name}{nearest(name, OPERATIONS)}")
    if source >= number:
        raise UserError(f"{where}: node {source} is not before it; use 0, the input, to {number - 1}")
    return names, source
