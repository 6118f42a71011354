"""Files and folders that are whole at every moment."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from medsynth.errors import UserError

_DISK = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)]


@contextmanager
def naming_unwritten(what: object, mend: str = "") -> Iterator[None]:
    """Inside, what the file system refuses is one line: WHAT cannot be written, why, and the mend.

    Raises:
        UserError: so it was.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{what} cannot be written: {error.strerror}{mend and f'; {mend}'}") from None


def disk_fault(error: BaseException) -> str | None:
    """What the disk answered where an error, of whatever library, is that it takes no more; None for any other."""
    seen: set[int] = set()
    told: BaseException | None = error
    while told is not None and id(told) not in seen:  # libraries say another thing of what they failed over
        seen.add(id(told))
        if found := next((reason for reason in _DISK if reason in str(told)), None):
            return found
        told = told.__cause__ or told.__context__
    return None


def parse_json(text: str | bytes) -> Any:
    """What JSON says.

    Raises:
        ValueError: it is none, or nested so deeply that reading it would break off.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, UTF-8.

    Raises:
        OSError: it cannot be read. ValueError: it holds no JSON object.
    """
    said = parse_json(path.read_bytes())
    if not isinstance(said, dict):
        raise ValueError("it is no object of keys")
    return said


def write_whole(path: Path, text: str) -> None:
    """Put `text` into `path` at once, or leave what was there; any number of processes may do so.

    A file that says so already is left alone: where the disk is full meanwhile, nothing has to be written.

    Raises:
        OSError: it cannot be written.
    """
    put_whole(path, text.encode())


def put_whole(path: Path, content: bytes) -> None:
    """`write_whole` of bytes; when it returns they are on the disk, whatever becomes of the machine.

    Raises:
        OSError: it cannot be written.
    """
    if path.is_file() and path.read_bytes() == content:
        return
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.unlink(missing_ok=True)  # a link of that name would be followed
    try:
        with beside.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        with suppress(OSError):  # it would hide why it could not be written
            beside.unlink(missing_ok=True)  # where there is no room for it, its beginning takes none
    sync(path.parent)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside `path` that takes its place, once all that the block has put there is on the disk.

    Where the block fails, it is removed, and what was at `path` stays. A link at `path` is replaced, not followed.

    Raises:
        OSError: it cannot be written; NotADirectoryError where `path` is a file.
    """
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    old = path.with_name(f".{path.name}.old")
    if old.is_dir() and not path.exists():  # killed between two renames
        old.rename(path)
    for leftover in (*path.parent.glob(f".{path.name}.new-*"), old):
        remove(leftover)
    beside = path.with_name(f".{path.name}.new-{os.getpid()}")
    try:
        beside.mkdir()
        yield beside
        for entry in (*beside.rglob("*"), beside):
            sync(entry)
        if path.exists() or path.is_symlink():
            path.rename(old)
        beside.rename(path)
        sync(path.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)  # after a success there is none
    remove(old)


def remove(path: Path) -> None:
    """Remove a folder with all that is in it, or a link and nothing behind it; nothing where there is none."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Wait until the file, or the list of names in the folder, is on the disk.

    Raises:
        OSError: it cannot be.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def new_folder(out: Path, option: str = "--out") -> Iterator[Path]:
    """An empty folder beside `out` that takes its name when the block ends, and is removed when the block fails.

    option: what leads to `out`, for messages.

    Raises:
        UserError: `out` exists and is not an empty folder, or something cannot be read or written.
    """
    out = out.resolve()
    try:
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            raise UserError(f"{out} is there already; choose another {option}, or remove it")
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
            folder = Path(scratch) / "set"
            folder.mkdir()
            yield folder
            folder.rename(out)
    except OSError as error:
        raise UserError(f"{out}: cannot be read or written ({error}); choose another {option}") from error
