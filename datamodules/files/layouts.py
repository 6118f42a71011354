"""Four layouts in which pictures with captions lie on disk, and the conversion of any into any.

    metadata     pictures, and metadata.csv with the columns file_name, text, and where known label and further facts
    folders      one folder a class; the caption is the class's name
    pairs        a/1.png beside a/1.txt
    webdataset   tar shards, one or more a class (`mild-000000.tar`), of members a/1.png, a/1.txt and a/1.json

A data set is one such folder, or has the folders `train`, `validation` and `test`, each of them one. What a layout has
no place for (the class in pairs, the facts in folders and pairs) lies beside it in `extra.jsonl`.
"""

import csv
import json
import re
import tarfile
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any

from datamodules.files.images import PictureFolder
from datamodules.files.shards import Shards
from datamodules.files.tables import Table, read_table
from medsynth.errors import UserError
from medsynth.files import new_folder

METADATA_FILE, EXTRA_FILE = "metadata.csv", "extra.jsonl"
SPLITS = ("train", "validation", "test")
LAYOUTS = ("metadata", "folders", "pairs", "webdataset")

_UNLABELLED = "unlabelled"
_COLUMNS = ("file_name", "text", "label")
_COLUMN_NAME = re.compile(r"[\w-]([\w .()-]*[\w.()-])?")  # nothing that a header would be read otherwise for


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


# Reading


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
    table = read_table(path, _COLUMNS[: 1 + texts], catalogue.key)
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
        facts = {key: _from_cell(cell) for key, cell in row.items() if key not in _COLUMNS and key and cell}
        entry = Entry(name, _stem(name), _tidy(row.get("text", "")), row.get("label", ""), _dump(facts))
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
    table = Table(folder.name, noun="sample")
    for path in sorted(folder.rglob("*.tar")):
        shard = path.relative_to(catalogue.root).as_posix()
        for key, sample in catalogue.shards.index(shard, table.faults).items():
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
    return _tidy(text.decode("utf-8-sig"))


def _tidy(text: str) -> str:
    """A caption as every layout can hold it: nothing around it, and one kind of line ends."""
    return "\n".join(text.strip().splitlines())


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))


def _dump(facts: dict[str, Any]) -> str:
    return json.dumps(facts, ensure_ascii=False) if facts else ""


def _from_cell(cell: str) -> Any:
    """What `_to_cell` wrote: a number or list where the cell is exactly how JSON writes one, else text."""
    try:
        value = json.loads(cell)
    except ValueError:
        return cell
    return value if json.dumps(value, ensure_ascii=False) == cell else cell


def _to_cell(value: Any) -> str:
    """A cell of metadata.csv that reads as `value` again."""
    if isinstance(value, str) and value and value == _tidy(value) == _from_cell(value):
        return value
    return json.dumps(value, ensure_ascii=False)


# Writing


class LayoutWriter(AbstractContextManager):
    """Writes samples into an empty folder in one layout. Leave it as a context manager: that completes the files."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._extras: list[dict[str, Any]] = []
        self._taken: dict[str, str] = {}

    def add(self, entry: Entry, data: bytes) -> None:
        """Write one sample: `data` are the picture's bytes, `entry.name` gives their suffix.

        Raises:
            UserError: another sample has the same key.
        """
        place = self.place(entry)
        if place in self._taken:
            raise UserError(f"{entry.name} and {self._taken[place]} would both be {place}: rename one of them")
        self._taken[place] = entry.name
        file_name = place + PurePosixPath(entry.name).suffix
        if extra := self.write(entry, place, file_name, data):
            self._extras.append({"file_name": file_name, **extra})

    def place(self, entry: Entry) -> str:
        """Path of the sample without suffix, relative to the folder."""
        return entry.key

    def write(self, entry: Entry, place: str, file_name: str, data: bytes) -> dict[str, Any]:
        """Write the sample; returns what found no place, for `extra.jsonl`."""
        path = self.folder / file_name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        extra: dict[str, Any] = {"key": entry.key} if place != entry.key else {}
        return extra | ({"facts": json.loads(entry.facts)} if entry.facts else {})

    def __exit__(self, failure: type | None, *_: object) -> None:
        if self._extras and failure is None:
            lines = [json.dumps(extra, ensure_ascii=False) + "\n" for extra in self._extras]
            (self.folder / EXTRA_FILE).write_text("".join(lines), encoding="utf-8")


class _MetadataWriter(LayoutWriter):
    def __init__(self, folder: Path):
        super().__init__(folder)
        self._rows: list[dict[str, str]] = []

    def write(self, entry: Entry, place: str, file_name: str, data: bytes) -> dict[str, Any]:
        facts = super().write(entry, place, file_name, data).get("facts", {})
        columns = [key for key in facts if key not in _COLUMNS and _COLUMN_NAME.fullmatch(key)]
        row = {"file_name": file_name, "text": entry.text} | ({"label": entry.label} if entry.label else {})
        self._rows.append(row | {key: _to_cell(facts.pop(key)) for key in columns})
        return {"facts": facts} if facts else {}

    def __exit__(self, failure: type | None, *_: object) -> None:
        super().__exit__(failure)
        if failure is not None:
            return
        columns = dict.fromkeys(("file_name", "text"))
        for row in self._rows:
            columns |= dict.fromkeys(row)
        with (self.folder / METADATA_FILE).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(columns), restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(self._rows)


class _FoldersWriter(LayoutWriter):
    def place(self, entry: Entry) -> str:
        folder = _file_name(entry.label)
        return entry.key if entry.key.startswith(f"{folder}/") else f"{folder}/{entry.key}"

    def write(self, entry: Entry, place: str, file_name: str, data: bytes) -> dict[str, Any]:
        extra, folder = super().write(entry, place, file_name, data), place.partition("/")[0]
        own = {"text": entry.text, "label": entry.label}
        return {key: value for key, value in own.items() if value != folder} | extra


class _PairsWriter(LayoutWriter):
    def write(self, entry: Entry, place: str, file_name: str, data: bytes) -> dict[str, Any]:
        extra = super().write(entry, place, file_name, data)
        (self.folder / file_name).with_suffix(".txt").write_text(entry.text + "\n", encoding="utf-8")
        return ({"label": entry.label} if entry.label else {}) | extra


class _WebDatasetWriter(LayoutWriter):
    def __init__(self, folder: Path, shard_size: int = 1000):
        super().__init__(folder)
        self._size = shard_size
        self._counts: dict[str, int] = {}
        self._open: dict[str, tarfile.TarFile] = {}

    def place(self, entry: Entry) -> str:
        folder, _, name = entry.key.rpartition("/")
        return f"{folder}/{name.replace('.', '_')}" if folder else name.replace(".", "_")

    def write(self, entry: Entry, place: str, file_name: str, data: bytes) -> dict[str, Any]:
        tar = self._shard(_file_name(entry.label) + "-" if entry.label else "")
        facts = ({"label": entry.label} if entry.label else {}) | json.loads(entry.facts or "{}")
        if place != entry.key:
            facts["original_key"] = entry.key
        _pack(tar, file_name, data)
        _pack(tar, f"{place}.txt", entry.text.encode())
        _pack(tar, f"{place}.json", json.dumps(facts, ensure_ascii=False).encode())
        return {}

    def _shard(self, prefix: str) -> tarfile.TarFile:
        number, within = divmod(self._counts.get(prefix, 0), self._size)
        self._counts[prefix] = self._counts.get(prefix, 0) + 1
        if within == 0:
            if prefix in self._open:
                self._open[prefix].close()
            path = self.folder / f"{prefix}{number:06}.tar"
            self._open[prefix] = tarfile.TarFile(path, "w", format=tarfile.PAX_FORMAT)
        return self._open[prefix]

    def __exit__(self, failure: type | None, *_: object) -> None:
        for tar in self._open.values():
            tar.close()


_WRITERS: dict[str, type[LayoutWriter]] = {
    "metadata": _MetadataWriter,
    "folders": _FoldersWriter,
    "pairs": _PairsWriter,
    "webdataset": _WebDatasetWriter,
}


def layout_writer(folder: Path, layout: str, shard_size: int = 1000) -> LayoutWriter:
    """A writer of that layout into `folder`, which is empty; shard_size: samples a shard."""
    return _WebDatasetWriter(folder, shard_size) if layout == "webdataset" else _WRITERS[layout](folder)


def _file_name(label: str) -> str:
    """A label as the name of a folder or shard."""
    return re.sub(r"[^\w .()+-]", "_", label).strip(" .") or _UNLABELLED


def _pack(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, BytesIO(data))


def convert(
    source: Path,
    out: Path,
    layout: str,
    shard_size: int = 1000,
    source_layout: str = "auto",
    on_progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write the data set `source` to the folder `out` in another layout, and return how many pictures it has.

    The pictures' bytes, the captions, the classes and the facts stay what they are, so that the way back gives the same
    set. `out` appears when it is complete. shard_size: samples a shard.

    Raises:
        UserError: a sample is bad (all are listed), two would get one name, or one a name that reads otherwise; `out`
            is not empty or not to be written.
    """
    catalogue = read_catalogue(source, source_layout, key="SOURCE")
    if bad := [table for table in catalogue.splits.values() if table.faults]:
        raise UserError("\n".join(table.report("mend or remove them, then convert again") for table in bad))
    total, done = sum(len(table.rows) for table in catalogue.splits.values()), 0
    with new_folder(out) as folder:
        for split, table in catalogue.splits.items():
            (folder / split).mkdir(exist_ok=True)
            with layout_writer(folder / split, layout, shard_size) as writer:
                for entry in _with_own_keys(table):
                    if not split and layout in ("folders", "pairs") and writer.place(entry).startswith(f"{SPLITS[0]}/"):
                        raise UserError(f"{entry.name}: a folder {SPLITS[0]} would be taken for a split: rename it")
                    writer.add(entry, catalogue.read(entry.name))
                    done += 1
                    if on_progress:
                        on_progress(done, total)
    return total


def _with_own_keys(table: Table) -> Iterable[Entry]:
    """The entries; where shards repeat each other's keys, with the shard's name before the key."""
    entries = list(table.rows.values())
    if ".tar/" in entries[0].name and len({entry.key for entry in entries}) < len(entries):
        for entry in entries:
            entry.key = f"{PurePosixPath(entry.name.partition('.tar/')[0]).name}/{entry.key}"
    return entries
