"""LPIPS with a VGG-16 from a file, a URL's cache or a fixed seed."""

import warnings

from torch import Tensor, nn

from lightning_modules.parts.pretrained import fill
from lightning_modules.parts.weights import RANDOM, Weights
from medsynth.errors import UserError
from medsynth.loading import one_line
from medsynth.pickled import read_pickled

_KEY = "model.perceptual_weights"


def vgg_source(name: str) -> str:
    """Where VGG-16 comes from: for "torchvision" the URL of the weights that LPIPS was calibrated on, else `name`."""
    if name != "torchvision":
        return name
    from torchvision.models import VGG16_Weights

    return VGG16_Weights.IMAGENET1K_V1.url


class PerceptualLoss(nn.Module):
    """Learned perceptual image patch similarity (Zhang et al. 2018), VGG-16; frozen."""

    def __init__(self, source: str):
        """source: URL or file of torchvision's VGG-16 weights, or "random"; raises UserError where they do not fit."""
        super().__init__()
        from lpips import LPIPS

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it asks torchvision in an older way, and for a random VGG
            self.net = LPIPS(net="vgg", pnet_rand=True, verbose=False)
        if source != RANDOM:
            self._load_vgg(source)
        self.requires_grad_(False).eval()

    def forward(self, x_BCHW: Tensor, y_BCHW: Tensor) -> Tensor:
        """Mean distance of two batches of pictures in [-1, 1]; at least 16 pixels a side."""
        return self.net(x_BCHW, y_BCHW).mean()

    def _load_vgg(self, source: str) -> None:
        path = Weights(_KEY, source).require()
        try:
            saved = read_pickled(path)
            # lpips cuts torchvision's `features` into slices but keeps the layers' numbers.
            named = {"features." + name.split(".", 1)[1]: name for name in self.net.net.state_dict()}
            if absent := sorted(named.keys() - saved.keys()):
                raise UserError(f"{_KEY}: {path} lacks {len(absent)} of VGG-16's weights, the first is {absent[0]}")
            fill(self.net.net, {own: saved[name] for name, own in named.items()}, _KEY, path)
        except UserError:
            raise
        except Exception as error:  # a damaged or foreign file fails in as many ways as there are files
            raise UserError(f"{_KEY}: {path} is no VGG-16 of torchvision's: {one_line(error)}") from error
