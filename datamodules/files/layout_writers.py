"""Writes pictures with captions in the four layouts of layouts.py, and converts any of them into any."""

import csv
import json
import re
import tarfile
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any

from datamodules.files.detection import EXTRA_FILE, METADATA_FILE, is_plain_class, split_of
from datamodules.files.entries import COLUMNS, NOT_UTF8, Entry, from_cell, is_utf8, tidy
from datamodules.files.layouts import read_catalogue
from datamodules.files.tables import Table, has_value, no_value
from datamodules.files.walk import is_hidden
from medsynth.errors import UserError
from medsynth.files import new_folder

_UNLABELLED = "unlabelled"
_COLUMN_NAME = re.compile(r"[\w-]([\w .()-]*[\w.()-])?")  # nothing that a header would be read otherwise for


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
        place = _visible(self.place(entry))
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

    def place(self, entry: Entry) -> str:
        return f"_{entry.key}" if split_of(entry.key.partition("/")[0]) and "/" in entry.key else entry.key

    def write(self, entry: Entry, place: str, file_name: str, data: bytes) -> dict[str, Any]:
        if not has_value(entry.text):
            raise UserError(f"{entry.name}: {no_value('its caption', entry.text)}: change it, or take another layout")
        extra = super().write(entry, place, file_name, data)
        facts = extra.pop("facts", {})
        columns = [key for key in facts if key not in COLUMNS and _COLUMN_NAME.fullmatch(key)]
        row = {"file_name": file_name, "text": entry.text}
        if has_value(entry.label):
            row |= {"label": entry.label} if entry.label else {}
        else:
            extra["label"] = entry.label
        self._rows.append(row | {key: _to_cell(facts.pop(key)) for key in columns})
        return extra | ({"facts": facts} if facts else {})

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


def _to_cell(value: Any) -> str:
    """A cell of metadata.csv that reads as `value` again."""
    if isinstance(value, str) and value and has_value(value) and value == tidy(value) == from_cell(value):
        return value
    return json.dumps(value, ensure_ascii=False)


def _file_name(label: str) -> str:
    """A label as the name of a folder or shard that is read as a class."""
    name = re.sub(r"[^\w .()+-]", "_", label).strip(" .") or _UNLABELLED
    return name if is_plain_class(name) else f"_{name}"


def _visible(place: str) -> str:
    """A path whose parts are all read as data."""
    return "/".join(f"_{part}" if is_hidden(part) else part for part in place.split("/"))


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
    on_note: Callable[[str], None] | None = None,
) -> int:
    """Write the data set `source` to the folder `out` in another layout, and return how many pictures it has.

    The pictures' bytes, the captions, the classes and the facts stay what they are, so that the way back gives the same
    set. `out` appears when it is complete. shard_size: samples a shard. `on_note(line)` hears what lies in `source` and
    is not read.

    Raises:
        UserError: a sample is bad (all are listed), two would get one name, or one a name that reads otherwise; `out`
            is not empty or not to be written.
    """
    catalogue = read_catalogue(source, source_layout, key="SOURCE")
    if on_note:
        for note in catalogue.notes():
            on_note(note)
    if bad := [table for table in catalogue.splits.values() if table.faults]:
        raise UserError("\n".join(table.report("mend or remove them, then convert again") for table in bad))
    names = (entry.name for table in catalogue.splits.values() for entry in table.rows.values())
    if strange := next((name for name in names if not is_utf8(name)), None):
        raise UserError(f"{source}: {strange}: {NOT_UTF8}")
    total, done = sum(len(table.rows) for table in catalogue.splits.values()), 0
    with new_folder(out) as folder:
        for split, table in catalogue.splits.items():
            (folder / split).mkdir(exist_ok=True)
            with layout_writer(folder / split, layout, shard_size) as writer:
                for entry in _with_own_keys(table):
                    if layout in ("folders", "pairs"):
                        _refuse_splits(entry, writer.place(entry), bool(split))
                    writer.add(entry, catalogue.read(entry.name))
                    done += 1
                    if on_progress:
                        on_progress(done, total)
    return total


def _refuse_splits(entry: Entry, place: str, inside: bool) -> None:
    """Refuse a folder that would be read as one of a split; inside: of a split's folder, where only those below are."""
    folders = place.split("/")[:-1]
    odd = [folder for folder in folders[:1] if not inside and split_of(folder)]
    odd += [folder for folder in folders[1:] if split_of(folder) == "train"]
    if odd:
        raise UserError(f"{entry.name}: a folder {odd[0]} would be taken for a split: rename it")


def _with_own_keys(table: Table) -> Iterable[Entry]:
    """The entries; where shards repeat each other's keys, with the shard's name before the key."""
    entries = list(table.rows.values())
    if ".tar/" in entries[0].name and len({entry.key for entry in entries}) < len(entries):
        for entry in entries:
            entry.key = f"{PurePosixPath(entry.name.partition('.tar/')[0]).name}/{entry.key}"
    return entries
