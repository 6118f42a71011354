"""The MEDVQA-GI 2024 organisers' protocol: features and Inception Score by the classes of an ImageNet classifier.

Pictures are not interpolated: numpy.resize cuts or repeats the flat buffer of their bytes. So these figures are small
where the usual FID is large, and the two do not compare.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_fidelity import feature_extractor_inceptionv3 as blocks
from torchmetrics import Metric

from medsynth.errors import UserError
from metrics.sync import all_reduce

SIDE = 299
CLASSES = 1000
_SPLITS = 10
_EPS = 1e-16


def flat_resized(images: Tensor) -> Tensor:
    """Pictures (n, 3, H, W) to (n, 3, 299, 299), any dtype: the bytes of each in the order row, column, channel, cut
    where they are too many and begun anew where they are too few, as numpy.resize does it."""
    flat, due = images.permute(0, 2, 3, 1).flatten(1), SIDE * SIDE * 3
    repeated = flat.repeat(1, -(-due // flat.shape[1]))[:, :due]
    return repeated.reshape(-1, SIDE, SIDE, 3).permute(0, 3, 1, 2)


class Classifier(nn.Module):
    """InceptionV3 with ImageNet's 1000 classes, weights by torchvision's names.

    Its averages leave padding out, as Keras's do.
    """

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = blocks.BasicConv2d(3, 32, kernel_size=3, stride=2)
        self.Conv2d_2a_3x3 = blocks.BasicConv2d(32, 32, kernel_size=3)
        self.Conv2d_2b_3x3 = blocks.BasicConv2d(32, 64, kernel_size=3, padding=1)
        self.MaxPool_1 = nn.MaxPool2d(3, stride=2)
        self.Conv2d_3b_1x1 = blocks.BasicConv2d(64, 80, kernel_size=1)
        self.Conv2d_4a_3x3 = blocks.BasicConv2d(80, 192, kernel_size=3)
        self.MaxPool_2 = nn.MaxPool2d(3, stride=2)
        self.Mixed_5b = blocks.InceptionA(192, pool_features=32)
        self.Mixed_5c = blocks.InceptionA(256, pool_features=64)
        self.Mixed_5d = blocks.InceptionA(288, pool_features=64)
        self.Mixed_6a = blocks.InceptionB(288)
        self.Mixed_6b = blocks.InceptionC(768, channels_7x7=128)
        self.Mixed_6c = blocks.InceptionC(768, channels_7x7=160)
        self.Mixed_6d = blocks.InceptionC(768, channels_7x7=160)
        self.Mixed_6e = blocks.InceptionC(768, channels_7x7=192)
        self.Mixed_7a = blocks.InceptionD(768)
        self.Mixed_7b = blocks.InceptionE_1(1280)
        self.Mixed_7c = blocks.InceptionE_1(2048)
        self.AvgPool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(2048, CLASSES)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Pictures (n, 3, 299, 299) in [-1, 1] to probabilities (n, 1000)."""
        return self.fc(pooled(self, x)).softmax(dim=1)


def pooled(network: nn.Module, x: Tensor) -> Tensor:
    """The features (n, 2048) of an Inception whose layers have these names, of its input (n, 3, 299, 299)."""
    for name, layer in network.named_children():
        if name != "fc":
            x = layer(x)
    return F.adaptive_avg_pool2d(x, 1).flatten(1)


class ClefScore(Metric):
    """The organisers' Inception Score: mean, standard deviation and median of exp mean KL(p(y|x) ‖ p(y)) over 10 parts.

    A part is ⌊total / 10⌋ pictures in order; those that are left over count for nothing. Logarithms are of p + 1e-16.

    States: `probability` (10, classes) and `negentropy` (10,), float64, sums over a part's pictures; `counts` (10,),
    int64.
    """

    full_state_update = False

    def __init__(self, total: int, classes: int = CLASSES):
        """`total` pictures over all processes; raises UserError where there are fewer than parts."""
        if total < _SPLITS:
            raise UserError(f"The organisers' score is taken over {_SPLITS} parts: score at least {_SPLITS} pictures")
        super().__init__(dist_sync_fn=all_reduce)
        self.size = total // _SPLITS
        self.add_state("probability", torch.zeros(_SPLITS, classes, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("negentropy", torch.zeros(_SPLITS, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(_SPLITS, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, probabilities: Tensor, indices: Tensor) -> None:
        """Add `probabilities` (n, classes) of the pictures `indices`, int64 (n,) in 0 … total-1, each once in all."""
        parts = indices // self.size
        kept = parts < _SPLITS
        p = probabilities[kept].double()
        membership = F.one_hot(parts[kept], _SPLITS)
        # Nothing in place: a state made under inference_mode could not be changed outside it.
        self.probability = self.probability + membership.double().T @ p
        self.negentropy = self.negentropy + membership.double().T @ (p * (p + _EPS).log()).sum(dim=1)
        self.counts = self.counts + membership.sum(dim=0)

    def compute(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, standard deviation and median, float64 scalars.

        Raises:
            ValueError: some picture is missing or came twice.
        """
        if not (self.counts == self.size).all():
            raise ValueError(f"of {_SPLITS} parts of {self.size} pictures each some are not complete")
        marginal = self.probability / self.size
        scores = (self.negentropy / self.size - (marginal * (marginal + _EPS).log()).sum(dim=1)).exp()
        median = scores.sort().values[_SPLITS // 2 - 1 : _SPLITS // 2 + 1].mean()
        return scores.mean(), scores.std(correction=0), median
