"""Files that torch.save wrote, read as weights and plain values: whatever else stands in them never runs."""

import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch


def read_pickled(file: Path | BinaryIO, device: str = "cpu") -> Any:
    """What `torch.save` put into a file, a path or open at its start, tensors on `device`.

    Raises:
        Exception: of many kinds, where it is no such file, or holds what could only be loaded by running code.
    """
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as parts:
            if any(part.compress_type != zipfile.ZIP_STORED for part in parts.infolist()):
                # torch never does; unfolded it may be a thousand times as large.
                raise ValueError("it is compressed, as torch writes no weights")
    if not isinstance(file, Path):
        file.seek(0)
    return torch.load(file, map_location=device, weights_only=True)
