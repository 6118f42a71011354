"""Which layout a folder is in, which of its folders are a split, and what speaks against either.

Nothing is guessed against what lies there: folders of a split are never classes, and where two layouts may be meant the
user says which.
"""

import re
from collections.abc import Collection, Sequence
from pathlib import Path, PurePosixPath

from datamodules.files.walk import is_document, is_hidden, listed, stem
from medsynth.errors import UserError

METADATA_FILE, METADATA_LINES, EXTRA_FILE = "metadata.csv", "metadata.jsonl", "extra.jsonl"
METADATA_FILES = (METADATA_FILE, METADATA_LINES)
CAPTION_SUFFIXES = (".txt", ".caption")
SPLITS = ("train", "validation", "test")
_SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""What folders of a split are called, in lower case."""
_ALSO_CLASSES = frozenset({"valid", "dev"})  # without a folder that trains beside them
_NO_CLASSES = frozenset(
    {
        *("image", "images", "img", "imgs", "picture", "pictures", "photo", "photos", "data", "dataset", "raw"),
        *("mask", "masks", "label", "labels", "annotation", "annotations", "segmentation", "segmentations", "depth"),
        *("jpg", "jpeg", "png", "tif", "tiff", "dicom"),
    }
)
_REPEATS = re.compile(r"\d+_\S+ .*\S.*")
_TABLES = frozenset({".csv", ".tsv", ".jsonl", ".parquet", ".xlsx", ".xls"})
_ARCHIVES = (".tar.gz", ".tgz", ".tar.zst", ".zip", ".7z", ".parquet", ".h5", ".hdf5", ".npz", ".rar")
_LAYOUT_KEYS = {"data.root": "data.layout", "SOURCE": "--from"}


def split_of(name: str) -> str | None:
    """The split that a folder of this name is: "train", "validation", "test", or None."""
    return _SPLIT_NAMES.get(name.lower())


def split_folders(root: Path, key: str) -> dict[str, str]:
    """The name of each split's folder in `root`, in the order of `SPLITS`; empty where none is called `train`.

    Raises:
        UserError: two folders are the same split, or there is one of a split but none that trains.
    """
    found: dict[str, str] = {}
    for path in sorted(root.iterdir()):
        split = None if is_hidden(path.name) or not path.is_dir() else split_of(path.name)
        if split in found:
            raise UserError(f"{key}: {root} has the folders {found[split]} and {path.name} for one split: join them")
        if split:
            found[split] = path.name
    if "train" not in found:
        if alone := [name for name in found.values() if name.lower() not in _ALSO_CLASSES]:
            raise UserError(
                f"{key}: {root} has the folder {alone[0]} of a split and no folder train beside it: put what trains "
                f"into train/, or rename {alone[0]}"
            )
        return {}
    return {split: found[split] for split in SPLITS if split in found}


def detect_layout(folder: Path, files: Sequence[str], pictures: Collection[str], key: str) -> str:
    """The layout that `folder`, whose files and pictures these are, is in.

    Raises:
        UserError: it is in none, or in more than one.
    """
    there = set(files)
    kinds = {
        "metadata": [name for name in METADATA_FILES if name in there],
        "webdataset": [name for name in files if name.endswith(".tar")],
        "pairs": [f"{stem(name)}{s}" for name in pictures for s in CAPTION_SUFFIXES if f"{stem(name)}{s}" in there],
    }
    found = [layout for layout, names in kinds.items() if names]
    if found == ["webdataset"] and pictures:
        found.append("folders" if any("/" in name for name in pictures) else "pairs")
        kinds[found[-1]] = list(pictures)
    if len(found) > 1:
        shown = " and ".join(f"{kinds[layout][0]} ({layout})" for layout in found)
        raise UserError(f"{key}: {folder} has {shown}: say with {_LAYOUT_KEYS.get(key, key)} which is meant")
    if found:
        return found[0]
    if any("/" in name for name in pictures):
        return "folders"
    archives = [name for name in files if name.lower().endswith(_ARCHIVES)]
    raise UserError(
        f"{key}: {folder} has none of the known layouts: {METADATA_FILE}, .tar shards, pictures beside .txt files, or "
        "one folder of pictures a class" + f"; unpack {listed(archives)}" * bool(archives)
    )


def refuse_odd_folders(
    folder: Path, files: Sequence[str], pictures: Collection[str], layout: str, key: str, auto: bool
) -> None:
    """Refuse what speaks against the folders of `pictures` being classes, or mere folders where captions lie beside.

    auto: whether the layout was found out, and not the only one that is read.

    Raises:
        UserError: a table lies there that nothing reads; folders are called images or masks, are of another tool, or
            are a split within each class.
    """
    tops = sorted({name.partition("/")[0] for name in pictures if "/" in name})
    insist = f", or say {_LAYOUT_KEYS[key]}={layout} to have it so" if auto else ""
    if repeats := [top for top in tops if _REPEATS.fullmatch(top)]:
        raise UserError(
            f"{key}: {folder}: the folder {repeats[0]!r} is named as kohya's scripts have it (repeats_token class): "
            f"rename it to its class{insist}"
        )
    if layout != "folders":
        return
    if general := [top for top in tops if top.lower() in _NO_CLASSES]:
        raise UserError(
            f"{key}: {folder}: the folder {general[0]} would be a class of that name: give {key}={folder / general[0]} "
            f"if classes lie in it, or rename it{insist}"
        )
    tables = [n for n in files if PurePosixPath(n).suffix.lower() in _TABLES and not is_document(n) and n != EXTRA_FILE]
    if auto and tables:
        raise UserError(
            f"{key}: {folder} has class folders and the table {tables[0]}, which is not read: name it {METADATA_FILE} "
            f"with the columns file_name and text, move it away{insist}"
        )


def refuse_inner_splits(folder: Path, pictures: Collection[str], key: str) -> None:
    """Refuse folders `train` inside of other folders: what lies beside them would be trained on."""
    for name in pictures:
        parts = PurePosixPath(name).parts[:-1]
        if inner := [part for part in parts[1:] if split_of(part) == "train"]:
            place = "/".join(parts[: parts.index(inner[0], 1) + 1])
            raise UserError(
                f"{key}: {folder}: {place} is a split inside of another folder: put it outside, as "
                f"{inner[0]}/{parts[0]}, or rename it"
            )


def split_not_read(pictures: Collection[str]) -> list[str]:
    """The line that says that folders of a split are no split here, where all pictures are split by seed."""
    tops = {name.partition("/")[0] for name in pictures if "/" in name}
    of_split = {top: split for top in tops if (split := split_of(top))}
    if "train" not in of_split.values() or len(of_split) < 2:
        return []
    return [f"the folders {listed(sorted(of_split))} are read as one: which pictures validate is drawn by seed"]


def is_plain_class(name: str) -> bool:
    """Whether a folder of this name is read as the class of that name."""
    return not (is_hidden(name) or split_of(name) or name.lower() in _NO_CLASSES or _REPEATS.fullmatch(name))


def require_class_pictures(root: Path, classes: Collection[str], key: str) -> None:
    """Raise UserError where a class's folder holds nothing at all: its class would be missing without a word."""
    for folder in sorted(root.iterdir()):
        inner = [folder, *(sorted(folder.iterdir()) if folder.is_dir() and split_of(folder.name) else [])]
        for empty in (one for one in inner if one.is_dir() and one.name not in classes and not is_hidden(one.name)):
            if not any(empty.iterdir()):
                raise UserError(f"{key}: {empty} is the folder of a class and has no picture; add some, or remove it")
