"""What a shell, a container or a cluster's login may lack, settled before anything heavy is imported.

Text is UTF-8 whatever the locale; a user id without a name or a home gets both; few open files become as many as are
allowed.
"""

import io
import os
import pwd
import resource
import stat
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from medsynth.errors import UserError

_OPEN_FILES = 65536
_CACHES = {"MPLCONFIGDIR": "matplotlib", "TRITON_CACHE_DIR": "triton"}
"""Variables of libraries that write into the home folder whatever they are used for."""


def settle() -> None:
    """Make this process one as on a plain login; again, it changes nothing.

    Raises:
        UserError: the working directory is gone, or nothing can be written where temporary files lie.
    """
    _speak_utf8()
    _require_folders()
    _name_user()
    _find_home()
    _open_files()


def _speak_utf8() -> None:
    """Have names of files, arguments and text be UTF-8, and no output fail for a character.

    Python decides it once, at its start, by the locale (LC_ALL=C, Latin-1) and PYTHONUTF8: so this process starts once
    more, under its own id.
    """
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _require_folders() -> None:
    try:
        Path.cwd()
    except FileNotFoundError:
        raise UserError("the working directory has been removed; cd to one that is there") from None
    try:
        tempfile.gettempdir()  # which torch asks for when it is imported
    except FileNotFoundError as error:
        raise UserError(f"{error.strerror}: set TMPDIR to a folder that can be written") from None


def _name_user() -> None:
    """torch and others ask for a name, which a user id of a container may lack."""
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        os.environ.setdefault("USER", f"uid{os.getuid()}")


def _find_home() -> None:
    """Let libraries write their caches elsewhere where they cannot at home; what lies at home is still read there."""
    try:
        home = Path.home()
    except RuntimeError:  # neither HOME nor an entry of the user
        folder = _own_folder()
        os.environ["HOME"] = str(folder)
        print(f"medsynth: this user has no home folder: caches lie in {folder}; set HOME to keep them", file=sys.stderr)
        return
    if not can_write(home):
        for name, below in _CACHES.items():
            if name not in os.environ:
                os.environ[name] = str(_own_folder() / below)


def can_write(folder: Path) -> bool:
    """Whether this user can make `folder`, or files in it."""
    try:
        existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    except PermissionError:  # nor can it be looked into
        return False
    return os.access(existing, os.W_OK | os.X_OK)


def _own_folder() -> Path:
    """A folder for temporary files that is this user's alone."""
    folder = Path(tempfile.gettempdir()) / f"medsynth-{os.getuid()}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():  # another's, who could change what is in it
        return Path(tempfile.mkdtemp(prefix="medsynth-"))
    return folder


def _open_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
