"""The spool: what a run directory keeps of its MLflow run.

<run_dir>/tracking/events.jsonl   the spool: one event a line, append-only
<run_dir>/tracking/files/         pictures that events still to be sent refer to
<run_dir>/tracking/run.json       which MLflow run this directory is
<run_dir>/tracking/sent.json      how far the spool has been sent to that run
"""

import errno
import fcntl
import json
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from medsynth.files import parse_json, put_whole, read_object, write_whole

LANES = {"records": ("metrics", "param", "tag", "status"), "files": ("image", "artifact")}
"""The lanes that events are sent in, and the kinds of events in each."""


def read_identity(run_dir: str | Path) -> dict[str, Any]:
    """What tracking/run.json says of a run directory; empty where there is none."""
    with suppress(FileNotFoundError, ValueError):
        return read_object(Path(run_dir) / "tracking" / "run.json")
    return {}


def read_run_id(run_dir: str | Path) -> str | None:
    """The id of the MLflow run of a run directory; None where MLflow has not been reached, or nothing logged."""
    with suppress(FileNotFoundError):
        return read_object(Path(run_dir) / "tracking" / "run.json")["run_id"]
    return None


def read_events(run_dir: str | Path) -> Iterator[dict[str, Any]]:
    """What a run directory has recorded, oldest first, damaged lines left out; nothing where it has no record."""
    with suppress(FileNotFoundError), (Path(run_dir) / "tracking" / "events.jsonl").open("rb") as file:
        for line in file:
            event = _event(line)
            if event["kind"]:
                yield event


class Spool:
    """The files of `<run_dir>/tracking`."""

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir
        self.folder = run_dir / "tracking"
        self.files = self.folder / "files"
        self.events = self.folder / "events.jsonl"
        self.files.mkdir(parents=True, exist_ok=True)
        # Unbuffered: a line is one write, and a forked worker holds no copy of it.
        self._file = self.events.open("a+b", buffering=0)
        if self.size():
            self._file.seek(-1, os.SEEK_END)
            if self._file.read(1) != b"\n":
                self._file.write(b"\n")  # ends a line that a crash cut short; `read` marks it as damaged
        if max(self.cursor().values()) > self.size():
            (self.folder / "sent.json").unlink()  # events got lost with the disk: where the next ones go, none was sent

    def size(self) -> int:
        """Bytes of events; 0 where somebody removed them."""
        return self.events.stat().st_size if self.events.exists() else 0

    def append(self, kind: str, **content: Any) -> None:
        line = json.dumps({"kind": kind, "time": milliseconds(), **content}).encode() + b"\n"
        if self._file.write(line) != len(line):
            self._file.write(b"\n")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def read(self, offset: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
        """The whole lines from byte `offset` on: event, {"kind": ""} for a damaged line, and the byte it ends at."""
        with self.events.open("rb") as file:
            file.seek(offset)
            for line in file:
                offset += len(line)
                if line.endswith(b"\n"):
                    yield _event(line), offset

    def keep(self, picture: str | Path | Image.Image) -> str:
        """Copy a picture into `files`; its name there."""
        name = f"{uuid.uuid4().hex}.png"
        if isinstance(picture, Image.Image):
            content = BytesIO()
            picture.save(content, format="PNG")
            put_whole(self.files / name, content.getvalue())
        else:
            put_whole(self.files / name, Path(picture).read_bytes())
        return name

    def load(self, name: str) -> dict[str, Any]:
        """The JSON object of file `name`; empty where there is none."""
        try:
            return read_object(self.folder / name)
        except (FileNotFoundError, ValueError):
            return {}

    def save(self, name: str, content: Mapping[str, Any]) -> None:
        """Write JSON file `name` so that a reader sees the old or the new content, never a part."""
        write_whole(self.folder / name, json.dumps(content, indent=1))

    def cursor(self) -> dict[str, int]:
        """How far the spool has been sent, in bytes, by lane."""
        recorded = self.load("sent.json")
        return {lane: recorded.get(lane, 0) for lane in LANES}

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps all other senders of this directory waiting."""
        with (self.folder / "lock").open("wb") as file:
            with suppress(OSError):  # a file system without locks: one sender at a time is then up to the user
                fcntl.flock(file, fcntl.LOCK_EX)
            yield


def milliseconds() -> int:
    """Unix time."""
    return time.time_ns() // 1_000_000


def _event(line: bytes) -> dict[str, Any]:
    try:
        return parse_json(line)
    except ValueError:
        return {"kind": ""}
