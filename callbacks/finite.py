"""Whether what a checkpoint holds are numbers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from callbacks.ema import EMA
from callbacks.sharding import Held
from medsynth.errors import UserError


class NotFinite(UserError):  # noqa: N818
    """Weights or their average hold NaN or infinities, and are not saved."""

    def __init__(self, path: Path, name: str):
        super().__init__(f"checkpoint {path} is not written: {name} is not finite. Lower model.optim.lr")


def first_not_finite(checkpoint: Mapping[str, Any]) -> str | None:
    """The first trained or averaged weight that holds NaN or an infinity, of what this process holds; None without."""
    average = checkpoint.get("callbacks", {}).get(EMA.state_key, {}).get("shadow", {})
    for kind, tensors in (("weight", checkpoint["state_dict"]), ("averaged weight", average)):
        for name, tensor in tensors.items():
            values = tensor.values if isinstance(tensor, Held) else tensor
            if values.is_floating_point() and not values.isfinite().all():
                return f"the {kind} {name}"
    return None
