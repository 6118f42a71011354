"""Files and folders that are whole at every moment."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from medsynth.errors import UserError


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
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)  # where there is no room for it, its beginning takes none
    sync(path.parent)


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
def new_folder(out: Path) -> Iterator[Path]:
    """An empty folder beside `out` that takes its name when the block ends, and is removed when the block fails.

    Raises:
        UserError: `out` exists and is not an empty folder, or something cannot be read or written.
    """
    out = out.resolve()
    try:
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            raise UserError(f"{out} is there already; choose another --out, or remove it")
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
            folder = Path(scratch) / "set"
            folder.mkdir()
            yield folder
            folder.rename(out)
    except OSError as error:
        raise UserError(f"{out}: cannot be read or written ({error}); choose another --out") from error
