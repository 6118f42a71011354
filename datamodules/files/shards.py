"""WebDataset shards: uncompressed tar files in which `a/1.png`, `a/1.txt` and `a/1.json` are one sample, `a/1`.

A shard is read at random: one pass over its headers finds where the members lie, and then a picture is one positioned
read, by any thread of any process.
"""

import os
import re
import tarfile
import threading
from array import array
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from datamodules.files.images import SUFFIXES
from datamodules.files.walk import is_document, is_hidden
from medsynth.errors import UserError

_NAME = re.compile(r"(?P<key>(?:.*/)?[^./][^./]*)\.(?P<kind>[^/]+)")
"""A member's key ends at the first dot of its file name; the rest says what it is."""
_DOTS = "its key ends at the first dot of the name, as {key}: pack it again without dots in the keys"
_MOST_TEXT = 1 << 20  # bytes of a caption or of the facts of one sample


@dataclass(slots=True)
class ShardSample:
    """What one shard holds of one sample: the picture's member name, its caption and its facts as bytes."""

    picture: str | None = None
    text: bytes | None = None
    facts: bytes | None = None


class Shards:
    """Where the pictures of all shards below `root` lie; small enough to travel to each worker.

    A picture's name is that of its shard, relative to root, and of its member: `mild-000000.tar/a/1.png`.
    """

    def __init__(self, root: Path):
        self.root = root
        self._shards: list[str] = []
        self._rows: dict[str, int] = {}
        self._places = array("q")  # shard, offset, bytes; one triple a picture

    def index(self, shard: str, faults: dict[str, str], unread: list[str]) -> dict[str, ShardSample]:
        """Find the members of one shard; its samples by key, in their order.

        faults: gets what is wrong with the shard and its members, by shard or member name; those before a fault count.
        unread: gets the names of the members that are read as nothing.
        """
        samples: dict[str, ShardSample] = {}
        others: dict[str, list[str]] = {}  # by key
        self._shards.append(shard)
        try:
            with tarfile.open(self.root / shard, "r:") as tar:
                for member in tar:
                    self._add(tar, member, samples, others, faults)
                tar.fileobj.seek(tar.offset)
                if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError("no end mark")
        # A header may claim any length, or that a thousand others follow it.
        except (tarfile.TarError, OSError, ValueError, MemoryError, OverflowError, RecursionError) as error:
            why = f"{len(samples)} samples ({str(error) or type(error).__name__})"
            faults[shard] = f"is cut off, damaged or compressed after {why}: copy it again"
        for key, names in others.items():
            dotted = [name for name in names if PurePosixPath(name).suffix.lower() in SUFFIXES]
            if dotted and key in samples and samples[key].picture is None:
                faults |= {f"{shard}/{name}": _DOTS.format(key=PurePosixPath(key).name) for name in names}
                del samples[key]
            else:
                unread += [f"{shard}/{name}" for name in names]
        return samples

    def read(self, name: str, limit: int | None = None, start: int = 0) -> bytes:
        """A picture's bytes from `start`, or the first `limit` of those."""
        row = 3 * self._rows[name]
        shard, offset, size = self._places[row : row + 3]
        left = size - start
        return _last_file.read(
            self.root / self._shards[shard], offset + start, left if limit is None else min(left, limit)
        )

    def size(self, name: str) -> int:
        """A picture's bytes, counted."""
        return self._places[3 * self._rows[name] + 2]

    def _add(
        self,
        tar: tarfile.TarFile,
        member: tarfile.TarInfo,
        samples: dict[str, ShardSample],
        others: dict[str, list[str]],
        faults: dict[str, str],
    ) -> None:
        shard, name = self._shards[-1], str(PurePosixPath(member.name))
        if member.isdir() or any(is_hidden(part) for part in PurePosixPath(name).parts if part not in ("..", ".")):
            return
        parts = _NAME.fullmatch(name)
        if not parts:
            if not is_document(name):
                others.setdefault("", []).append(name)
            return
        if fault := _hostility(tar, member, name):
            faults[f"{shard}/{member.name if member.name.isprintable() else ascii(member.name)}"] = fault
            return
        sample, kind = samples.setdefault(parts["key"], ShardSample()), parts["kind"].lower()
        field = {"txt": "text", "json": "facts"}.get(kind, "picture" if f".{kind}" in SUFFIXES else None)
        if field is None:
            others.setdefault(parts["key"], []).append(name)
            return
        if getattr(sample, field) is not None:
            faults[f"{shard}/{name}"] = f"two samples have the key {parts['key']}"
        elif field == "picture":
            sample.picture = f"{shard}/{name}"
            self._rows[sample.picture] = len(self._places) // 3
            self._places.extend((len(self._shards) - 1, member.offset_data, member.size))
        elif member.size > _MOST_TEXT:
            faults[f"{shard}/{name}"] = f"is larger than {_MOST_TEXT} bytes"
        else:
            content = tar.extractfile(member)
            assert content is not None  # a regular file, or it would be hostile
            setattr(sample, field, content.read())


def _hostility(tar: tarfile.TarFile, member: tarfile.TarInfo, name: str) -> str | None:
    if name.startswith("/") or ".." in PurePosixPath(name).parts:
        return "leads out of the shard: pack it again with relative names"
    if not member.isreg() or member.issparse():
        return "is a link or special file: pack it again with the file itself"
    if not name.isprintable():
        return "has a name with characters that cannot be shown: pack it again with another"
    if member.offset_data + member.size > Path(str(tar.name)).stat().st_size:
        return "goes on behind the end of the shard: copy that again"
    return None


class _LastFile(threading.local):
    """The file that this thread read last, kept open.

    Positioned reads share no offset: a handle that came with a fork does no harm.
    """

    def __init__(self):
        self._path: Path | None = None
        self._file: BinaryIO | None = None

    def read(self, path: Path, offset: int, size: int) -> bytes:
        file = self._file
        if file is None or path != self._path:
            file = self._open(path)
        return os.pread(file.fileno(), size, offset)

    def _open(self, path: Path) -> BinaryIO:
        if self._file:
            self._file.close()
        self._path = None
        try:
            self._file = file = path.open("rb")
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror})") from None
        self._path = path
        return file


_last_file = _LastFile()
