"""One process at a time writes into a folder."""

import errno
import fcntl
import json
import os
import socket
import time
import warnings
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from medsynth.errors import UserError
from medsynth.files import parse_json

OWNER_FILE = ".owner"
RESTARTED = "MEDSYNTH_RESTART_COUNT"
"""In the environment of a run that a sweep has started before: how often."""
_HELD_ERRORS = {errno.EAGAIN, errno.EACCES}
# A node that went down keeps its locks on a file server until their lease is over, 90 s with NFS 4.
_PATIENCE = 120.0

_held: set[int] = set()  # descriptors


class Owner:
    """This process as the only one that writes into `folder`, until the block ends or the process does, in any way.

    The lock is the kernel's, on the open file `.owner`: a process that is killed leaves a file, but no lock. What the
    file says (host, process, since when) is for those who are refused. A file system without locks gets a warning.

    On entering, a folder that exists is claimed; one that does not is made, and claimed, by `claim`.
    """

    def __init__(self, folder: Path, key: str, active: bool = True):
        """key: what a refusal calls the folder. active: False in processes that share the work of the one that owns."""
        self._folder, self._key, self._active = folder, key, active
        self._descriptor: int | None = None

    def __enter__(self) -> Self:
        if self._folder.is_dir():
            self.claim()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if self._descriptor in _held:
            with suppress(OSError):  # while it is locked: who opens it meanwhile sees that it is gone
                (self._folder / OWNER_FILE).unlink()
            _held.remove(self._descriptor)
            os.close(self._descriptor)
        self._descriptor = None

    def claim(self) -> None:
        """Make the folder and hold it, where this has not been done.

        Raises:
            UserError: another process holds it, or it cannot be written.
        """
        if not self._active or self._descriptor is not None:
            return
        patience = time.monotonic() + (_PATIENCE if _is_another_start() else 0.0)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            while (descriptor := self._try(time.monotonic() < patience)) is None:
                time.sleep(0.2)
        except OSError as error:
            raise UserError(f"{self._key}={self._folder} cannot be written: {error.strerror}") from None
        self._descriptor = descriptor
        _held.add(descriptor)

    def _try(self, may_wait: bool) -> int | None:
        """The open file, with the lock where there are locks; None where it is to be tried again."""
        path = self._folder / OWNER_FILE
        descriptor = _open(path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _HELD_ERRORS:
                self._warn(error)
                return descriptor
            record = _read(descriptor)
            os.close(descriptor)
            if may_wait:
                return None
            if not _is_of_this_job(record):
                raise UserError(self._refusal(record)) from None
            path.unlink(missing_ok=True)  # the lock stays with the file that is gone
            return None
        if not _is_still_there(descriptor, path):
            os.close(descriptor)
            return None
        _write(descriptor)
        return descriptor

    def _warn(self, error: OSError) -> None:
        what = f"{self._folder}: its file system has no locks ({error.strerror})"
        warnings.warn(f"{what}; a second start in it would not be noticed", stacklevel=5)

    def _refusal(self, record: dict[str, str]) -> str:
        who = "another process"
        if record:
            who = f"process {record['process']} on {record['host']}, since {record['since']}"
        return f"{self._key}={self._folder} is in use by {who}; wait for its end, or choose another {self._key}"


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:  # another user's, in a folder that both write into
        return os.open(path, os.O_RDONLY)


def _read(descriptor: int) -> dict[str, str]:
    """Who holds the file; empty where that is just being written."""
    try:
        record = parse_json(os.pread(descriptor, 4096, 0))
        return record if record.keys() == _record().keys() else {}
    except (OSError, ValueError, AttributeError):
        return {}


def _write(descriptor: int) -> None:
    text = json.dumps(_record()).encode() + b"\n"
    with suppress(OSError):  # a full disk, or another user's file: the lock counts, not what it says
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text, 0)


def _record() -> dict[str, str]:
    job, start = _slurm_job()
    since = datetime.now().astimezone().isoformat(" ", "seconds")
    return {"host": socket.gethostname(), "process": str(os.getpid()), "since": since, "job": job, "start": str(start)}


def _slurm_job() -> tuple[str, int]:
    """The job that this process is of, "" where there is none, and how often Slurm has started it again."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array else os.environ.get("SLURM_JOB_ID", "")
    return job, _count("SLURM_RESTART_COUNT")


def _is_another_start() -> bool:
    """Whether what started this process has started it before, so that the one before may still be going away."""
    counts = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT", RESTARTED)
    return any(_count(name) for name in counts) or "JOB_COMPLETION_INDEX" in os.environ


def _is_of_this_job(record: dict[str, str]) -> bool:
    """Whether the holder is an earlier start of this Slurm job: Slurm has ended that, whatever a file server thinks."""
    job, start = _slurm_job()
    return bool(job) and record.get("job") == job and int(record["start"]) < start


def _count(name: str) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdigit() else 0


def _is_still_there(descriptor: int, path: Path) -> bool:
    try:
        ours, theirs = os.fstat(descriptor), path.stat()
    except OSError:
        return False
    return (ours.st_dev, ours.st_ino) == (theirs.st_dev, theirs.st_ino)


def _let_go() -> None:
    """A forked child, as a DataLoader's worker, may outlive its parent for seconds: the lock must not."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)
