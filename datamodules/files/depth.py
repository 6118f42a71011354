"""Depth maps that a pretrained depth-estimation model makes of pictures, once, before any training."""

import re
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from datamodules.files.walk import stem
from medsynth.errors import UserError
from medsynth.files import naming_unwritten, put_whole
from medsynth.loading import misfit, one_line, unfit_config

SOURCE_FILE = "depth-model.txt"
"""Beside the maps: the name of the model that made them."""
# No depth goes through these. The deepest fusion layer has no residual to add, and published DPT models leave its
# convolutions out; some have the heads of other tasks.
_UNUSED = r"fusion_stage\.layers\.0\.residual_layer1\.|pooler\.|auxiliary_head\.|position_ids$"


def write_depth_maps(
    read: Callable[[str], Tensor],
    names: Sequence[str],
    out: Path,
    source: str,
    model: Path,
    on_progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write `<out>/<name>.png`, 16-bit grey, for every picture that has none; return how many were written.

    A map goes from 0 at its picture's least to 65535 at its greatest value; what is near is bright where the model says
    so (DPT, Depth Anything), dark where it estimates distance.

    Args:
        read: gives the picture of a name as uint8 (3, H, W).
        names: relative paths; a map's own is the same, ending in .png.
        source, model: what the model is called, and its local folder.

    Raises:
        UserError: the folder holds no depth-estimation model; `out` holds maps of another origin.
    """
    _claim(out, source)
    targets = {name: out / f"{stem(name)}.png" for name in names}
    missing = [name for name in names if not targets[name].is_file()]
    if not missing:
        return 0
    estimate = depth_estimator(model)
    for done, name in enumerate(missing, 1):
        _save(np.rint(65535 * estimate(read(name))).astype(np.uint16), targets[name])
        if on_progress:
            on_progress(done, len(missing))
    return len(missing)


def depth_estimator(model: Path) -> Callable[[Tensor], NDArray[np.float32]]:
    """What maps a uint8 picture (3, H, W) to its depth (H, W) in [0, 1], least 0, greatest 1; a constant depth is 0.

    Raises:
        UserError: the folder `model` holds no model that transformers' AutoModelForDepthEstimation loads.
    """
    from transformers import AutoImageProcessor, AutoModelForDepthEstimation

    if unfit := unfit_config(model):
        raise UserError(f"data.depth_model: {model}/config.json {unfit}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        processor = AutoImageProcessor.from_pretrained(model, local_files_only=True, trust_remote_code=False)
        loaded: Any = AutoModelForDepthEstimation.from_pretrained(
            model, local_files_only=True, trust_remote_code=False, dtype=torch.float32, output_loading_info=True,
            ignore_mismatched_sizes=True,
        )  # fmt: skip
    except Exception as error:  # transformers answers a folder of something else with errors of almost any kind
        reason = one_line(error)
        raise UserError(f"data.depth_model: {model} holds no depth-estimation model ({reason})") from error
    network, report = loaded
    needed = {what: [n for n in names if not re.search(_UNUSED, str(n))] for what, names in report.items()}
    if reason := misfit(needed, str(model / "model.safetensors")):
        raise UserError(f"data.depth_model: {model} {reason}")
    network.eval().to(device)

    @torch.inference_mode()
    def estimate(picture: Tensor) -> NDArray[np.float32]:
        outputs = network(**processor(images=picture, return_tensors="pt").to(device))
        sizes = [tuple(picture.shape[-2:])]
        depth = processor.post_process_depth_estimation(outputs, target_sizes=sizes)[0]["predicted_depth"].float()
        if not depth.isfinite().all():
            raise UserError(f"data.depth_model: {model} estimates depths that are no finite numbers; fetch it anew")
        lowest, highest = depth.aminmax()
        return ((depth - lowest) / (highest - lowest).clamp_min(1e-12)).cpu().numpy()

    return estimate


def _claim(out: Path, source: str) -> None:
    """Mark `out` as the place of this model's maps; raises UserError where it holds others."""
    marker = out / SOURCE_FILE
    if marker.is_file() and marker.read_text(encoding="utf-8").strip() == source:
        return
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} holds depth maps that {source} did not make; remove it, or give another data.depth")
    _put(marker, f"{source}\n".encode())


def _save(depth: NDArray[np.uint16], path: Path) -> None:
    content = BytesIO()
    Image.fromarray(depth).save(content, format="PNG")
    _put(path, content.getvalue())


def _put(path: Path, content: bytes) -> None:
    """A file that is there whole or not at all."""
    with naming_unwritten(f"data.depth: {path}", "mend that and run the same command again"):
        path.parent.mkdir(parents=True, exist_ok=True)
        put_whole(path, content)
