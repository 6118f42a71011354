"""Spectral norm (Miyato et al. 2018): each weight matrix divided by its largest singular value, σ.

torch's `parametrizations.spectral_norm` follows σ by one power iteration in each forward pass of training, with vectors
u and v that are buffers. Here is what it does not do: find them at once, for weights that were put in place of others.
"""

import copy
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm


def normalised(network: nn.Module) -> Iterator[tuple[str, _SpectralNorm, Tensor]]:
    """Each weight under spectral norm: its layer's name, its norm, and the weight as it is trained."""
    for name, layer in network.named_modules():
        if not parametrize.is_parametrized(layer, "weight"):
            continue
        chain: Any = cast(Any, layer).parametrizations["weight"]
        for norm in chain:
            if isinstance(norm, _SpectralNorm):
                yield name, norm, chain.original


@torch.no_grad()
def fit_vectors(network: nn.Module) -> None:
    """Set u and v of each spectral norm to the first singular vectors of the weight as it is now: then σ is exact.

    By the eigenvectors of the smaller of WWᵀ and WᵀW, and not by more power iterations: of a random matrix the largest
    singular values lie so close together that hundreds would be needed.
    """
    for _, norm, weight in normalised(network):
        if weight.ndim == 1:  # divided by its length; there are no vectors
            continue
        matrix = norm._reshape_weight_to_matrix(weight).float()
        rows, columns = matrix.shape
        if rows <= columns:
            u = torch.linalg.eigh(matrix @ matrix.T).eigenvectors[:, -1]
            v = matrix.T @ u
        else:
            v = torch.linalg.eigh(matrix.T @ matrix).eigenvectors[:, -1]
        u = nn.functional.normalize(matrix @ nn.functional.normalize(v, dim=0, eps=norm.eps), dim=0, eps=norm.eps)
        v = nn.functional.normalize(matrix.T @ u, dim=0, eps=norm.eps)
        norm._u.copy_(u)
        norm._v.copy_(v)


def without_spectral_norm(network: nn.Module) -> nn.Module:
    """A copy in evaluation mode whose weights are plain ones, as the layers compute with them, and learn nothing."""
    plain = copy.deepcopy(network).eval().requires_grad_(False)
    for layer in list(plain.modules()):
        if not parametrize.is_parametrized(layer):
            continue
        weights = {name: getattr(layer, name) for name in cast(Any, layer).parametrizations}
        # Not by torch's own removal: it strips the class, which the copy shares with the network.
        layer.__class__ = parametrize.type_before_parametrizations(layer)
        del layer.parametrizations
        for name, weight in weights.items():
            layer.register_parameter(name, nn.Parameter(weight.detach().clone(), requires_grad=False))
    return plain
