"""Four layouts in which pictures with captions lie on disk, and how they are read; layout_writers.py writes them.

    metadata     pictures, and metadata.csv with the columns file_name, text, and where known label and further facts;
                 or metadata.jsonl with the same, one JSON object a line
    folders      one folder a class; the caption is the class's name
    pairs        a/1.png beside a/1.txt (or a/1.caption)
    webdataset   tar shards, one or more a class (`mild-000000.tar`), of members a/1.png, a/1.txt and a/1.json

A data set is one such folder, or has the folders `train`, `validation` and `test`, each of them one. What a layout has
no place for (the class in pairs, the facts in folders and pairs) lies beside it in `extra.jsonl`.
"""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from datamodules.files.detection import (
    CAPTION_SUFFIXES,
    EXTRA_FILE,
    METADATA_FILE,
    METADATA_FILES,
    SPLITS,
    detect_layout,
    refuse_inner_splits,
    refuse_odd_folders,
    split_folders,
    split_of,
)
from datamodules.files.entries import (
    COLUMNS,
    NOT_UTF8,
    Entry,
    class_name,
    decode,
    dump,
    is_utf8,
    read_extras,
    safe_key,
    tidy,
    to_fact,
)
from datamodules.files.shards import Shards
from datamodules.files.tables import Table, read_json_lines, read_table, strict_object
from datamodules.files.walk import PictureFolder, is_document, not_read, stem, walk, without_row
from medsynth.errors import UserError

LAYOUTS = ("metadata", "folders", "pairs", "webdataset")


@dataclass
class Catalogue:
    """A data set of any layout.

    splits: a `Table` of `Entry` for "train", "validation" and "test", or for "" where there are no such folders.
    key: the config key or argument that leads to root, for messages. files: all that lies below root, hidden names
    aside; unread: what nothing has read of it, and members of shards likewise; unlisted: pictures without a row among
    these.
    """

    root: Path
    layout: str
    splits: dict[str, Table]
    shards: Shards | None = None
    key: str = "data.root"
    files: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    unlisted: list[str] = field(default_factory=list)

    def read(self, name: str) -> bytes:
        """The bytes of a picture."""
        return self.shards.read(name) if self.shards else (self.root / name).read_bytes()

    def notes(self) -> list[str]:
        """What lies there unread, a line each for pictures without a row and for all else."""
        unlisted = set(self.unlisted)
        return without_row(self.unlisted) + not_read([name for name in self.unread if name not in unlisted])

    def use(self, names: Iterable[str]) -> None:
        """Take files from `unread`."""
        used = set(names)
        self.unread = [name for name in self.unread if name not in used]


@dataclass
class _Part:
    """One split of a data set, as its reader sees it: a folder and what lies in it, by paths relative to it."""

    catalogue: Catalogue
    folder: Path
    files: list[str]
    texts: bool

    @cached_property
    def pictures(self) -> PictureFolder:
        return PictureFolder(self.folder, files=self.files)

    def shards(self) -> list[str]:
        return [name for name in self.files if name.endswith(".tar")]

    def shown(self, name: str) -> str:
        """The path of one of its files, relative to the data set's root."""
        return (self.folder / name).relative_to(self.catalogue.root).as_posix()


def read_catalogue(
    root: Path, layout: str = "auto", texts: bool = True, key: str = "data.root", given: bool = True
) -> Catalogue:
    """Find every picture below `root` with its caption; no picture is read.

    Args:
        layout: one of `LAYOUTS`, or `auto`, which finds out which it is.
        texts: whether a picture without a caption is a fault.
        key: the config key or argument that leads to root, for messages.
        given: whether it is the user who has named the layout, and so means what the folders are called.

    Raises:
        UserError: there is no such folder, or no such layout in it, or something speaks against `auto`'s choice. What
            is wrong with single samples is in the tables.
    """
    if not root.is_dir():
        raise UserError(f"{key}: {root} is not a folder")
    files = walk(root)
    catalogue = Catalogue(root, layout, {}, key=key, files=files)
    catalogue.unread = [name for name in files if not is_document(name)]
    folders = split_folders(root, key)
    whole = not folders or (layout in ("auto", "metadata") and any(name in files for name in METADATA_FILES))
    parts = {
        split: _Part(catalogue, root / name, _below(files, name), texts)
        for split, name in ({"": ""} if whole else folders).items()
    }
    first = next(iter(parts.values()))
    auto = layout == "auto"
    if auto:
        layout = catalogue.layout = detect_layout(first.folder, first.files, first.pictures.names(), key)
    catalogue.shards = Shards(root) if layout == "webdataset" else None
    for split, part in parts.items():
        if layout in ("folders", "pairs") and (auto or not given):
            refuse_odd_folders(part.folder, part.files, part.pictures.names(), layout, key, auto)
        catalogue.splits[split] = table = _read_part(part, layout)
        for place in [place for place, entry in table.rows.items() if texts and not entry.text]:
            table.reject(place, "has no caption: its .txt is missing or empty")
    if whole:
        catalogue.splits = _divided(catalogue, folders)
    return catalogue


def _below(files: list[str], name: str) -> list[str]:
    prefix = f"{name}/" if name else ""
    return [file.removeprefix(prefix) for file in files if file.startswith(prefix)]


def _read_part(part: _Part, layout: str) -> Table:
    catalogue, key = part.catalogue, part.catalogue.key
    if layout != "metadata":
        refuse_inner_splits(part.folder, part.shards() if layout == "webdataset" else part.pictures.names(), key)
    table = _READERS[layout](part)
    for place in [place for place, entry in table.rows.items() if not is_utf8(entry.text + entry.label)]:
        table.reject(place, NOT_UTF8)
    if not table.rows and not table.faults:
        raise UserError(f"{key}: {part.folder} holds no pictures in the layout {layout}")
    # Faults have their own lines: what they name is accounted for.
    named = [part.shown(str(place)) for place in table.faults]
    catalogue.use([*(entry.name for entry in table.rows.values()), *named, part.shown(EXTRA_FILE)])
    return table


def _divided(catalogue: Catalogue, folders: dict[str, str]) -> dict[str, Table]:
    """A set that was read as one by its splits: by the folders where one metadata file at the top tells of all, by
    their names where it is shards such as train-000000.tar; else as it is."""
    table = catalogue.splits[""]
    tops = {name: split for split, name in folders.items()}
    if catalogue.layout == "webdataset":
        shards = {entry.name.partition(".tar/")[0] + ".tar" for entry in table.rows.values()}
        tops = {shard: split for shard in shards if (split := split_of(_shard_class(shard)))}
    if not tops or (set(tops.values()) == {SPLITS[0]} and catalogue.layout == "webdataset"):
        return catalogue.splits
    splits = {split: Table(table.name, noun=table.noun) for split in SPLITS if split in tops.values()}
    if SPLITS[0] not in splits:
        raise UserError(
            f"{catalogue.key}: {catalogue.root}: {next(iter(tops))} is of a split, and none is called train"
        )
    splits[SPLITS[0]].faults = table.faults  # which side a bad row is on makes no difference
    for place, entry in table.rows.items():
        top = entry.name.partition(".tar/")[0] + ".tar" if ".tar/" in entry.name else entry.name.partition("/")[0]
        if top in tops:
            entry.key = entry.key.removeprefix(f"{top}/")
            splits[tops[top]].rows[place] = entry
        else:
            table.faults[place] = f"{entry.name} is in none of the splits {', '.join(sorted(tops))}"
    return splits


def _read_metadata(part: _Part) -> Table:
    table, value = _read_rows(part)
    pictures, extras, first = part.pictures, read_extras(part.folder), {}
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
        try:
            facts = {key: value(key, cell) for key, cell in row.items() if key not in COLUMNS and key and cell != ""}
            text = row.get("text") or ""
            if not isinstance(text, str):
                raise ValueError(f"its text is {json.dumps(text)}, which is none")
            entry = Entry(name, stem(name), tidy(text), class_name(row.get("label", "")), dump(facts))
        except ValueError as error:
            table.reject(line, str(error))
            continue
        table.rows[line] = _completed(part, entry, extras)
    part.catalogue.use(map(part.shown, (*METADATA_FILES, *first)))  # bad rows are counted as such
    part.catalogue.unlisted += [part.shown(name) for name in pictures.names() if name not in first]
    return table


def _read_rows(part: _Part) -> tuple[Table, Callable[[str, Any], Any]]:
    """The rows of the metadata file, and what makes a fact of a cell in a column."""
    found = [part.folder / name for name in METADATA_FILES if name in part.files]
    if len(found) > 1:
        raise UserError(f"{part.catalogue.key}: {part.folder} has {' and '.join(METADATA_FILES)}: remove one of them")
    path, columns = (found or [part.folder / METADATA_FILE])[0], COLUMNS[: 1 + part.texts]
    lines = path.name != METADATA_FILE
    key = part.catalogue.key
    table = read_json_lines(path, columns, key) if lines else read_table(path, columns, key, optional=("label",))
    table.name = path.relative_to(part.catalogue.root).as_posix()
    return table, (lambda _, value: value) if lines else to_fact


def _read_folders(part: _Part) -> Table:
    table, extras = Table(part.folder.name, noun="sample"), read_extras(part.folder)
    for name in part.pictures.names():
        label, _, rest = name.partition("/")
        if rest:
            table.rows[name] = _completed(part, Entry(name, stem(name), label, label), extras)
        else:
            table.faults[name] = "lies in no class's folder"
    return table


def _read_pairs(part: _Part) -> Table:
    table, extras = Table(part.folder.name, noun="sample"), read_extras(part.folder)
    there, used = set(part.files), list[str]()
    for name in part.pictures.names():
        beside = [stem(name) + suffix for suffix in CAPTION_SUFFIXES if stem(name) + suffix in there]
        used += map(part.shown, beside)
        try:
            texts = {decode((part.folder / text).read_bytes()) for text in beside}
        except UnicodeDecodeError:
            table.faults[name] = "its .txt is not UTF-8"
            continue
        if len(texts) > 1:
            table.faults[name] = f"{' and '.join(beside)} say different things: remove one"
            continue
        table.rows[name] = _completed(part, Entry(name, stem(name), *texts), extras)
    part.catalogue.use(used)
    return table


def _read_webdataset(part: _Part) -> Table:
    catalogue = part.catalogue
    table, shards = Table(part.folder.name, noun="sample"), catalogue.shards
    assert shards is not None  # of this layout
    tars = [part.shown(name) for name in part.shards()]
    catalogue.use(tars)
    for shard in tars:
        for key, sample in shards.index(shard, table.faults, catalogue.unread).items():
            try:
                if sample.picture is not None:
                    table.rows[sample.picture] = _shard_entry(key, sample, _shard_class(shard))
                elif sample.text is not None or sample.facts is not None:
                    table.faults[f"{shard}/{key}"] = "has no picture"
            except ValueError as error:  # not UTF-8, no JSON
                table.faults[sample.picture] = str(error)
    return table


_READERS: dict[str, Callable[[_Part], Table]] = {
    "metadata": _read_metadata,
    "folders": _read_folders,
    "pairs": _read_pairs,
    "webdataset": _read_webdataset,
}


def _shard_class(shard: str) -> str:
    """`mild` of `mild-000000` or `a/mild-000000.tar`, "" of what has no class in its name."""
    named = re.fullmatch(r"(.+)-\d+", PurePosixPath(shard).name.removesuffix(".tar"))
    return named[1] if named else ""


def _shard_entry(key: str, sample: Any, label: str) -> Entry:
    entry = Entry(sample.picture, key, label="" if split_of(label) else label)
    try:
        entry.text = decode(sample.text or b"")
    except UnicodeDecodeError:
        raise ValueError("its .txt is not UTF-8") from None
    if sample.facts is None:
        return entry
    try:
        facts = strict_object(sample.facts)
    except ValueError as error:
        raise ValueError(f"its .json {error}") from None
    entry.label = class_name(facts.pop("label", entry.label))
    original = facts.pop("original_key", key)
    if not isinstance(original, str):
        raise ValueError(f'its "original_key" is {json.dumps(original)} and no text')
    entry.key = safe_key(original)
    entry.facts = dump(facts)
    return entry


def _completed(part: _Part, entry: Entry, extras: dict[str, dict[str, Any]]) -> Entry:
    """The entry with what `extra.jsonl` knows of it, and its name relative to the data set's root."""
    extra = extras.get(entry.name, {})
    entry.key, entry.text = extra.get("key", entry.key), extra.get("text", entry.text)
    entry.label = extra.get("label", entry.label)
    if "facts" in extra:
        entry.facts = dump(json.loads(entry.facts or "{}") | extra["facts"])
    entry.name = (part.folder / entry.name).relative_to(part.catalogue.root).as_posix()
    return entry
