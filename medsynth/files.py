"""Small files that are whole at every moment."""

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Put `text` into `path` at once, or leave what was there; any number of processes may do so.

    A file that says so already is left alone: where the disk is full meanwhile, nothing has to be written.

    Raises:
        OSError: it cannot be written.
    """
    if path.is_file() and path.read_bytes() == text.encode():
        return
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
