"""Contrastive learning of pictures and their captions, and the distance that guides a generator. Pure functions.

Shapes: x_ND n embeddings of width D, each of length 1; row i of the pictures and row i of the captions are one pair.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LOGIT_SCALE = (0.0, math.log(100))
"""Least and greatest logarithm of the scale of the cosines (Radford et al. 2021, section 2.5, for the greatest)."""
_NEAR_OPPOSITE = 1 - 1e-6  # half a chord; at 1 the angle's slope is infinite


def matches(caption_ids_N: Tensor, picture_ids_N: Tensor) -> Tensor:
    """bool (n, n): whether caption i and picture j belong together, since they are of one pair, or their pairs have the
    same caption or the same picture. Symmetric, so that its row i is also what picture i belongs to.

    caption_ids_N, picture_ids_N: int64 (n,), equal where caption or picture are.
    """
    captions = caption_ids_N[:, None] == caption_ids_N
    return captions | (picture_ids_N[:, None] == picture_ids_N)


def contrastive_loss(pictures_ND: Tensor, captions_ND: Tensor, logit_scale: Tensor, matches_NN: Tensor) -> Tensor:
    """Symmetric cross-entropy of pictures and captions (Radford et al. 2021, figure 3), with several targets a row.

    With u the captions, v the pictures, both of length 1, s the logit scale, P_i what row i matches,

        L = 1/2n Σ_i [ - 1/|P_i| Σ_{j in P_i} ( log softmax_j(e^s u_i·v_j) + log softmax_j(e^s v_i·u_j) ) ].

    Where P_i = {i} throughout that is CLIP's own loss; Khosla et al. 2020, eq. 2, has the sum over positives outside
    the logarithm likewise. Float32, scalar; 0 where there are no rows.
    """
    if not len(pictures_ND):
        return (pictures_ND.sum() + captions_ND.sum()) * 0 + logit_scale * 0
    logits = logit_scale.exp() * captions_ND @ pictures_ND.T
    targets = matches_NN / matches_NN.sum(1, keepdim=True)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def spherical_distance(x: Tensor, y: Tensor) -> Tensor:
    """2·arcsin²(‖x − y‖ / 2) over the last dimension, of vectors of length 1: half the square of their angle.

    The distance of CLIP-guided diffusion (Crowson 2021). Between opposite vectors, where it has no slope, that is 0.
    """
    half_chord = ((x - y).norm(dim=-1) / 2).clamp(max=_NEAR_OPPOSITE)
    return 2 * torch.arcsin(half_chord).square()
