"""Pictures that steer a generation, as channels of `Conditions.control`: which channel is what, and edge maps.

`data.controls` names the kinds (`datamodules.batches.CONTROL_CHANNELS`) in the order in which their channels stand.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from datamodules.batches import CONTROL_CHANNELS
from medsynth.errors import UserError


def channels(controls: Sequence[str]) -> dict[str, slice]:
    """Where each kind's channels stand in the control: `["canny", "picture"]` -> canny 0:1, picture 1:4.

    Raises:
        UserError: a kind that is not known, or one given twice.
    """
    places, end = {}, 0
    for kind in controls:
        if kind not in CONTROL_CHANNELS:
            raise UserError(f"data.controls: {kind} is not one of {', '.join(CONTROL_CHANNELS)}")
        if kind in places:
            raise UserError(f"data.controls: {kind} stands there twice")
        places[kind] = slice(end, end + CONTROL_CHANNELS[kind])
        end = places[kind].stop
    return places


def canny(picture: Tensor, low: float, high: float, blur: float = 0.0) -> Tensor:
    """Edge map (Canny 1986) of a uint8 RGB picture (3, H, W): float32 (1, H, W), 1 on edges and 0 elsewhere.

    It is OpenCV's, which published edge-conditioned ControlNets were trained with.

    Args:
        low, high: hysteresis thresholds on |Gx| + |Gy| of the 3x3 Sobel gradient of the grey picture (0 to 255): a step
            by h grey levels has 4h. An edge starts above `high` and goes on above `low`.
        blur: standard deviation, pixels, of a Gaussian before; 0: none.
    """
    import cv2

    cv2.setNumThreads(0)  # one thread a DataLoader worker; a pool does not survive the fork into one
    grey = cv2.cvtColor(np.ascontiguousarray(picture.permute(1, 2, 0).numpy()), cv2.COLOR_RGB2GRAY)
    if blur:
        grey = cv2.GaussianBlur(grey, (0, 0), blur)
    return torch.from_numpy(cv2.Canny(grey, low, high)).bool().float()[None]
