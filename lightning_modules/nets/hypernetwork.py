"""Hypernetwork: small networks that change what attention layers make their keys and values of."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

ACTIVATIONS = {
    "linear": None,
    "relu": nn.ReLU,
    "leakyrelu": nn.LeakyReLU,
    "elu": nn.ELU,
    "swish": nn.Hardswish,  # what the web UI means by the name
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "mish": nn.Mish,
}
"""Non-linearities between the layers, by the names the Stable Diffusion web UI knows them by."""

INITIALISATIONS = ("normal", "xavier_normal", "xavier_uniform", "kaiming_normal", "kaiming_uniform")
"""How weights start; biases start at 0."""


class ContextNetwork(nn.Module):
    """context + multiplier · f(context), f a multilayer perceptron. Shapes: (…, width) -> (…, width)."""

    def __init__(
        self,
        width: int,
        structure: Sequence[float],
        activation: str,
        activate_output: bool,
        layer_norm: bool,
        dropout: Sequence[float],
        initialisation: str,
    ):
        super().__init__()
        self.multiplier = 1.0
        sizes = [int(width * multiple) for multiple in structure]
        layers: list[nn.Module] = []
        for i in range(1, len(sizes)):
            layers.append(nn.Linear(sizes[i - 1], sizes[i]))
            make = ACTIVATIONS[activation]
            if make is not None and (activate_output or i < len(sizes) - 1):
                layers.append(make())
            if layer_norm:
                layers.append(nn.LayerNorm(sizes[i]))
            if dropout and dropout[i]:
                layers.append(nn.Dropout(dropout[i]))
        self.linear = nn.Sequential(*layers)
        for layer in layers:
            if isinstance(layer, nn.Linear | nn.LayerNorm):
                _initialise(layer, initialisation)

    def forward(self, context: Tensor) -> Tensor:
        return torch.add(context, self.linear(context), alpha=self.multiplier)

    def before(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """A forward pre-hook: `layer` is given the changed context."""
        return self(inputs[0]), *inputs[1:]


class Hypernetwork(nn.ModuleDict):
    """Two `ContextNetwork`s, `k` and `v`, for each width of context: `768.k.linear.0.weight`.

    An attention layer whose context has one of the widths makes its keys of what `k` gives and its values of what `v`
    gives: text in cross-attention, the layer's own input in self-attention.
    """

    def __init__(
        self,
        widths: Sequence[int],
        structure: Sequence[float] = (1, 2, 1),
        activation: str = "linear",
        activate_output: bool = False,
        layer_norm: bool = False,
        dropout: Sequence[float] = (),
        initialisation: str = "normal",
    ):
        """
        Args:
            structure: sizes of the layers, input and output among them, as multiples of the width; 1 at both ends.
            activation: one of `ACTIVATIONS`, after each layer but the last. activate_output: after the last too.
            layer_norm: normalise after each layer, the last too.
            dropout: probability after each size of `structure`, or nothing; the first and the last must be 0.
            initialisation: one of `INITIALISATIONS`; normal has a standard deviation of 0.01.
        """
        shape = (structure, activation, activate_output, layer_norm, dropout, initialisation)
        super().__init__(
            {str(w): nn.ModuleDict({kind: ContextNetwork(w, *shape) for kind in ("k", "v")}) for w in widths}
        )

    def attach(self, network: nn.Module) -> None:
        """Change the contexts of every attention layer of `network` that has one of the widths.

        The weights stay outside `network`. Forward pre-hooks hold under any attention kernel, under gradient
        checkpointing and, attached before it, under `torch.compile`.
        """
        for to_k, to_v in _attention_layers(network):
            if (width := str(to_k.in_features)) in self:
                for layer, kind in ((to_k, "k"), (to_v, "v")):
                    changing: Any = self.get_submodule(f"{width}.{kind}")
                    layer.register_forward_pre_hook(changing.before)

    def networks(self) -> list[nn.Module]:
        """Every network on a context, those on keys before those on values of each width."""
        return [network for pair in self.values() for network in pair.children()]

    def set_multiplier(self, multiplier: float) -> None:
        """Set the strength of the change: 1 as trained, 0 none."""
        for module in self.modules():
            if isinstance(module, ContextNetwork):
                module.multiplier = multiplier


def context_widths(network: nn.Module) -> list[int]:
    """The widths of context that the attention layers of `network` see, sorted."""
    return sorted({to_k.in_features for to_k, _ in _attention_layers(network)})


def _attention_layers(network: nn.Module) -> Iterator[tuple[Any, Any]]:
    """The layers that make keys and values, linear or with an update beside, of each attention."""
    modules = network.modules()
    return ((m.to_k, m.to_v) for m in modules if hasattr(m, "to_k") and hasattr(m, "to_v"))


@torch.no_grad()
def _initialise(layer: nn.Linear | nn.LayerNorm, initialisation: str) -> None:
    nn.init.zeros_(layer.bias)
    if initialisation == "normal" or isinstance(layer, nn.LayerNorm):  # a gain near 0 leaves the context as it is
        nn.init.normal_(layer.weight, std=0.01)
    else:
        getattr(nn.init, f"{initialisation}_")(layer.weight)
