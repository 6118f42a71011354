"""Four layouts in which pictures with captions lie on disk, and how they are read; layout_writers.py writes them.

    metadata     pictures, and metadata.csv with the columns file_name, text, and where known label and further facts
    folders      one folder a class; the caption is the class's name
    pairs        a/1.png beside a/1.txt
    webdataset   tar shards, one or more a class (`mild-000000.tar`), of members a/1.png, a/1.txt and a/1.json

A data set is one such folder, or has the folders `train`, `validation` and `test`, each of them one. What a layout has
no place for (the class in pairs, the facts in folders and pairs) lies beside it in `extra.jsonl`.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from datamodules.files.images import PictureFolder
from datamodules.files.shards import Shards
from datamodules.files.tables import Table, read_table
from medsynth.errors import UserError

METADATA_FILE, EXTRA_FILE = "metadata.csv", "extra.jsonl"
SPLITS = ("train", "validation", "test")
LAYOUTS = ("metadata", "folders", "pairs", "webdataset")
COLUMNS = ("file_name", "text", "label")
"""The columns of metadata.csv that are no facts."""


@dataclass(slots=True)
class Entry:
    """One picture with its caption.

    name: of the picture's file relative to the data set's root, or of its shard and member.
    key: its own name, without folder of the split and without suffix, which every layout keeps.
    text: the caption. label: the class's name, or "". facts: further facts as the text of a JSON object, or "".
    """

    name: str
    key: str
    text: str = ""
    label: str = ""
    facts: str = ""


@dataclass
class Catalogue:
    """A data set of any layout.

    splits: a `Table` of `Entry` for "train", "validation" and "test", or for "" where there are no such folders.
    key: the config key or argument that leads to root, for messages.
    """

    root: Path
    layout: str
    splits: dict[str, Table]
    shards: Shards | None = None
    key: str = "data.root"

    def read(self, name: str) -> bytes:
        """The bytes of a picture."""
        return self.shards.read(name) if self.shards else (self.root / name).read_bytes()


def read_catalogue(root: Path, layout: str = "auto", texts: bool = True, key: str = "data.root") -> Catalogue:
    """Find every picture below `root` with its caption; no picture is read.

    Args:
        layout: one of `LAYOUTS`, or `auto`, which looks for metadata.csv, then shards, then pictures beside texts, then
            folders.
        texts: whether a picture without a caption is a fault.
        key: the config key or argument that leads to root, for messages.

    Raises:
        UserError: there is no such folder, or no such layout in it. What is wrong with single samples is in the tables.
    """
    if not root.is_dir():
        raise UserError(f"{key}: {root} is not a folder")
    folders = {"": root}
    if (root / SPLITS[0]).is_dir() and not (root / METADATA_FILE).is_file():
        folders = {split: root / split for split in SPLITS if (root / split).is_dir()}
    if layout == "auto":
        layout = _detect(folders[next(iter(folders))], key)
    catalogue = Catalogue(root, layout, {}, Shards(root) if layout == "webdataset" else None, key)
    for split, folder in folders.items():
        catalogue.splits[split] = table = _READERS[layout](catalogue, folder, texts)
        if not table.rows and not table.faults:
            raise UserError(f"{key}: {folder} holds no pictures in the layout {layout}")
        for place in [place for place, entry in table.rows.items() if texts and not entry.text]:
            table.reject(place, "has no caption: its .txt is missing or empty")
    return catalogue


def _detect(folder: Path, key: str) -> str:
    if (folder / METADATA_FILE).is_file():
        return "metadata"
    if next(folder.rglob("*.tar"), None):
        return "webdataset"
    names = PictureFolder(folder).names()
    if any((folder / name).with_suffix(".txt").is_file() for name in names):
        return "pairs"
    if any("/" in name for name in names):
        return "folders"
    raise UserError(
        f"{key}: {folder} has none of the known layouts: {METADATA_FILE}, .tar shards, pictures beside .txt files, or "
        "one folder of pictures a class"
    )


def _read_metadata(catalogue: Catalogue, folder: Path, texts: bool) -> Table:
    path = folder / METADATA_FILE
    table = read_table(path, COLUMNS[: 1 + texts], catalogue.key)
    table.name = path.relative_to(catalogue.root).as_posix()
    pictures, extras, first = PictureFolder(folder), _read_extras(folder), {}
    for line, row in list(table.rows.items()):
        try:
            name = pictures.find(row["file_name"])
        except UserError as error:
            table.reject(line, str(error))
            continue
        if name in first:
            table.reject(line, f"{name} is in row {first[name]} already")
            continue
        first[name] = line
        facts = {key: from_cell(cell) for key, cell in row.items() if key not in COLUMNS and key and cell}
        entry = Entry(name, _stem(name), tidy(row.get("text", "")), row.get("label", ""), _dump(facts))
        table.rows[line] = _completed(catalogue, folder, entry, extras)
    return table


def _read_folders(catalogue: Catalogue, folder: Path, texts: bool) -> Table:
    table, extras = Table(folder.name, noun="sample"), _read_extras(folder)
    for name in PictureFolder(folder).names():
        label, _, rest = name.partition("/")
        if rest:
            table.rows[name] = _completed(catalogue, folder, Entry(name, _stem(name), label, label), extras)
        else:
            table.faults[name] = "lies in no class's folder"
    return table


def _read_pairs(catalogue: Catalogue, folder: Path, texts: bool) -> Table:
    table, extras = Table(folder.name, noun="sample"), _read_extras(folder)
    for name in PictureFolder(folder).names():
        try:
            text = _decode((folder / name).with_suffix(".txt").read_bytes())
        except FileNotFoundError:
            text = ""
        except UnicodeDecodeError:
            table.faults[name] = "its .txt is not UTF-8"
            continue
        table.rows[name] = _completed(catalogue, folder, Entry(name, _stem(name), text), extras)
    return table


def _read_webdataset(catalogue: Catalogue, folder: Path, texts: bool) -> Table:
    table, shards = Table(folder.name, noun="sample"), catalogue.shards
    assert shards is not None  # of this layout
    for path in sorted(folder.rglob("*.tar")):
        shard = path.relative_to(catalogue.root).as_posix()
        for key, sample in shards.index(shard, table.faults).items():
            try:
                if sample.picture is not None:
                    table.rows[sample.picture] = _shard_entry(key, sample, path.stem)
                elif sample.text is not None:
                    table.faults[f"{shard}/{key}"] = "has no picture"
            except ValueError as error:  # not UTF-8, no JSON
                table.faults[sample.picture] = str(error)
    return table


_READERS: dict[str, Callable[[Catalogue, Path, bool], Table]] = {
    "metadata": _read_metadata,
    "folders": _read_folders,
    "pairs": _read_pairs,
    "webdataset": _read_webdataset,
}


def _shard_entry(key: str, sample: Any, shard: str) -> Entry:
    named = re.fullmatch(r"(.+)-\d+", shard)
    entry = Entry(sample.picture, key, label=named[1] if named else "")
    try:
        entry.text = _decode(sample.text or b"")
    except UnicodeDecodeError:
        raise ValueError("its .txt is not UTF-8") from None
    if sample.facts is None:
        return entry
    try:
        facts = json.loads(sample.facts)
    except (ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict):
        raise ValueError("its .json is no JSON object")
    entry.label = str(facts.pop("label", entry.label))
    entry.key = _safe(str(facts.pop("original_key", key)))
    entry.facts = _dump(facts)
    return entry


def _completed(catalogue: Catalogue, folder: Path, entry: Entry, extras: dict[str, dict[str, Any]]) -> Entry:
    """The entry with what `extra.jsonl` knows of it, and its name relative to the data set's root."""
    extra = extras.get(entry.name, {})
    entry.key, entry.text = extra.get("key", entry.key), extra.get("text", entry.text)
    entry.label = extra.get("label", entry.label)
    if "facts" in extra:
        entry.facts = _dump(json.loads(entry.facts or "{}") | extra["facts"])
    entry.name = (folder / entry.name).relative_to(catalogue.root).as_posix()
    return entry


def _read_extras(folder: Path) -> dict[str, dict[str, Any]]:
    path, extras = folder / EXTRA_FILE, {}
    if not path.is_file():
        return extras
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                extra = json.loads(line)
                _safe(extra.get("key", ""))
                words = [extra.get(name, "") for name in ("text", "label")]
                if not all(isinstance(word, str) for word in words) or not isinstance(extra.get("facts", {}), dict):
                    raise ValueError
                extras[extra.pop("file_name")] = extra
            except (ValueError, KeyError, AttributeError, TypeError):
                raise UserError(
                    f"{path}: line {number} is no JSON object of file_name, text, label, facts, key"
                ) from None
    return extras


def _safe(key: str) -> str:
    if key.startswith("/") or ".." in PurePosixPath(key).parts:
        raise ValueError(f"its key {key} leads out of the folder")
    return key


def _decode(text: bytes) -> str:
    return tidy(text.decode("utf-8-sig"))


def tidy(text: str) -> str:
    """A caption as every layout can hold it: nothing around it, and one kind of line ends."""
    return "\n".join(text.strip().splitlines())


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))


def _dump(facts: dict[str, Any]) -> str:
    return json.dumps(facts, ensure_ascii=False) if facts else ""


def from_cell(cell: str) -> Any:
    """A cell of metadata.csv: a number or list where the cell is exactly how JSON writes one, else text."""
    try:
        value = json.loads(cell)
    except ValueError:
        return cell
    return value if json.dumps(value, ensure_ascii=False) == cell else cell
