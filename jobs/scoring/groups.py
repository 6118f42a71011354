"""The group of each picture of a folder: the folder that it lies in, or out of a table beside it."""

from pathlib import Path

from datamodules.base import SizedDataset
from datamodules.files.tables import read_table
from datamodules.files.walk import PictureFolder
from jobs.scoring.folders import ScoredFolder
from medsynth.errors import UserError
from metrics.suite import MAX_BANK

_FILES = ("file", "file_name", "filename", "Filename", "image", "Image", "Image Index")
"""What columns of file names are called."""


FOLDER = "folder"
"""By this each picture's group is the first of the folders in which it lies, as class folders are."""


def groups_of_both(real: SizedDataset, fake: SizedDataset, column: str) -> tuple[list[str | None], list[str | None]]:
    """`groups_of` both sides, which are folders.

    Raises:
        UserError: as there; or there are more pictures than the bank holds features of.
    """
    if (most := max(len(real), len(fake))) > MAX_BANK:
        raise UserError(f"--by {column} takes at most {MAX_BANK} pictures a side, not {most}: score folder by folder")
    assert isinstance(real, ScoredFolder) and isinstance(fake, ScoredFolder)
    return groups_of(real, column), groups_of(fake, column)


def groups_of(folder: ScoredFolder, column: str) -> list[str | None]:
    """What `column` says of each picture, in the folder's order; None of those of which nothing is said.

    The table is the one CSV file with that column and one of file names, in the folder or beside it; `FOLDER` needs
    none.

    Raises:
        UserError: there is no such table, or several, or it cannot be read; no picture lies in a folder of its own.
    """
    if column == FOLDER:
        return _tops(folder)
    table, files = _find(folder.folder, column)
    names = PictureFolder(folder.folder, dicom=True)
    found = read_table(table, [files, column], "--by")
    if found.faults:
        raise UserError(found.report("mend the table"))
    said: dict[Path, str] = {}
    for row in found.rows.values():
        path = folder.folder / names.find(row[files])
        if said.setdefault(path, row[column]) != row[column]:
            raise UserError(f"{table}: {row[files]} is in two groups, {said[path]} and {row[column]}")
    return [said.get(path) for path in folder.paths]


def _tops(folder: ScoredFolder) -> list[str | None]:
    parts = [path.relative_to(folder.folder).parts for path in folder.paths]
    if not any(len(part) > 1 for part in parts):
        raise UserError(
            f"--by {FOLDER}: no picture of {folder.folder} lies in a folder in it; name a column of a table"
        )
    return [part[0] if len(part) > 1 else None for part in parts]


def _find(folder: Path, column: str) -> tuple[Path, str]:
    """The table and its column of file names."""
    for place in (folder, folder.resolve().parent):
        found = []
        for path in sorted(place.glob("*.csv")):
            with path.open(encoding="utf-8-sig", errors="replace") as file:
                header = file.readline(65536).rstrip("\r\n")
            cells = [cell.strip().strip('"') for cell in header.split(";" if ";" in header else ",")]
            files = [name for name in _FILES if name in cells]
            found += [(path, files[0])] if column in cells and files else []
        if len(found) > 1:
            raise UserError(f"--by {column}: {found[0][0]} and {found[1][0]} both have it; keep one of them there")
        if found:
            return found[0]
    raise UserError(
        f"--by {column}: no CSV file in {folder} or beside it has that column and one of {', '.join(_FILES)}"
    )
