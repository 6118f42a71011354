"""`manifest.csv` beside pictures that `medsynth sample` drew, and which folders beside it hold what steered them."""

from collections.abc import Iterable
from pathlib import Path

from datamodules.files.control_folder import FOLDERS
from medsynth.errors import UserError

MANIFEST = "manifest.csv"
COLUMNS = ("file", "prompt", "negative_prompt", "label", "control")
"""The first columns of the list; those of the kinds that steered follow, then what made the pictures."""


def first_line(manifest: Path) -> str:
    """Of a list, or of whatever has its name; raises UserError where that cannot be read."""
    try:
        with manifest.open(encoding="utf-8", errors="replace") as file:
            return file.readline(4096).rstrip("\r\n")
    except OSError as error:
        raise UserError(f"{manifest} cannot be read: {error.strerror}") from None


def control_folders(root: Path, names: Iterable[str]) -> set[Path]:
    """Folders below `root` whose pictures steered others: they are no samples. names: of all files, as `walk` gives."""
    found = set()
    for manifest in (root / name for name in names if name.rpartition("/")[2] == MANIFEST):
        header = first_line(manifest).split(",")
        if tuple(header[: len(COLUMNS)]) == COLUMNS:
            found |= {manifest.parent / names[0] for kind, names in FOLDERS.items() if kind in header}
    return found
