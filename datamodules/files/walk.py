"""One walk over a folder, for all that ask what lies in it: data sets, conversions, references, scores, depth maps.

Linked folders and files are followed; hidden names are no data; what is no picture can be counted and named.
"""

import os
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from posixpath import splitext

from datamodules.files.dicom import DICOM_SUFFIXES, is_dicom
from datamodules.files.images import SUFFIXES
from medsynth.errors import UserError

_SYSTEM_NAMES = frozenset(
    {
        *("@eadir", "@tmp", "@recycle", "@recently-snapshot", "@__thumb", "#recycle", "#snapshot", "lost+found"),
        *("__macosx", "__pycache__", "$recycle.bin", "system volume information"),
        *("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"),
    }
)
"""What file servers, desktops and tools leave in a folder, in lower case."""
_DOCUMENTS = frozenset(
    {
        *("README", "LICENSE", "LICENCE", "COPYING", "COPYRIGHT", "NOTICE", "CITATION", "CHANGELOG", "CHANGES"),
        *("AUTHORS", "DATASHEET", "DICOMDIR", "PHANTOM.JSON", "TRUTH.JSON", "MANIFEST.CSV"),
    }
)
"""Files that speak of a data set, by their name or their name without suffix, in upper case."""
_NEVER_DICOM = frozenset({".txt", ".caption", ".csv", ".tsv", ".json", ".jsonl", ".md", ".xml", ".tar"})
_MASKS = frozenset({"masks", "depth"})
"""Folders that belong to other uses of the same pictures."""
_NAMED = 5


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is no data: `.ipynb_checkpoints`, `._p0.png`, `@eaDir`, `Thumbs.db` …"""
    return name.startswith((".", "~$")) or name.lower() in _SYSTEM_NAMES


def is_document(name: str) -> bool:
    """Whether the file at this path speaks of the data set and is no part of it, as README.md does."""
    own, suffix = splitext(name.rpartition("/")[2])
    return (own + suffix).upper() in _DOCUMENTS or (own.upper() in _DOCUMENTS and suffix.lower() not in SUFFIXES)


def walk(folder: Path) -> list[str]:
    """Relative path of every file below `folder`, sorted; none where there is no such folder.

    Links are followed; one that leads to nothing counts as the file that it should be. Hidden names are left out.

    Raises:
        UserError: a folder cannot be listed; a link leads back to a folder that it lies in; there is a pipe or socket.
    """
    return sorted(_files(str(folder), "", {})) if folder.is_dir() else []


def _files(folder: str, prefix: str, above: dict[tuple[int, int], str]) -> Iterator[str]:
    """`prefix` and the name of all that lies in `folder`; above: the folders that it lies in, by device and inode."""
    try:
        status = Path(folder).stat()
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            raise UserError(f"{folder} leads back to {above[identity]}, in a circle: remove that link")
        with os.scandir(folder) as entries:
            seen = [entry for entry in entries if not is_hidden(entry.name)]
    except OSError as error:
        raise UserError(f"{folder} cannot be listed ({error.strerror}): make it readable, or move it away") from None
    for entry in seen:
        name = prefix + entry.name
        if _is_folder(entry):
            yield from _files(entry.path, f"{name}/", above | {identity: folder})
        else:
            yield name


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        if entry.is_dir():
            return True
        if entry.is_file() or not Path(entry.path).exists():  # a link to nothing: its reader says that it is missing
            return False
    except OSError as error:  # a link to itself
        raise UserError(f"{entry.path} cannot be followed ({error.strerror}): remove that link") from None
    raise UserError(f"{entry.path} is a pipe, socket or device and no file: move it away")


def stem(name: str) -> str:
    """A picture's path without the suffix of its format; `1.2.840.10` has none."""
    own, suffix = splitext(name)
    return own if suffix.lower() in SUFFIXES or suffix.lower() in DICOM_SUFFIXES else name


class PictureFolder:
    """The pictures below one folder, found by their relative path with or without the suffix.

    others: relative path of every other file below it, documents aside, sorted.
    """

    def __init__(self, folder: Path, dicom: bool = False, files: Sequence[str] | None = None):
        """dicom: whether DICOM files are pictures here; by their suffix or, with any other or none, their first bytes.
        files: what `walk` has found there."""
        self.folder, self.others = folder, list[str]()
        self._names: dict[str, None] = {}
        self._by_stem: dict[str, list[str]] = {}
        self._loosely: dict[str, str] | None = None
        for name in walk(folder) if files is None else files:
            if self._is_picture(name, dicom):
                self._names[name] = None
                self._by_stem.setdefault(stem(name), []).append(name)
            elif not is_document(name):
                self.others.append(name)

    def __len__(self) -> int:
        return len(self._names)

    def names(self) -> list[str]:
        """Relative path of every picture, sorted."""
        return list(self._names)

    def find(self, name: str) -> str:
        """Relative path, suffix included, of the picture called `name`.

        Raises:
            UserError: there is no such picture, or two, or the name leads out of the folder.
        """
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise UserError(f"{name} leads out of the folder {self.folder.name}")
        if str(path) in self._names:
            return str(path)
        found = self._by_stem.get(str(path)) or self._composed(str(path))
        if not found:
            raise UserError(self._why_not(path))
        if len(found) > 1:
            raise UserError(f"{name} may be {' or '.join(found)}: write the suffix")
        return found[0]

    def _is_picture(self, name: str, dicom: bool) -> bool:
        suffix = splitext(name)[1].lower()
        if suffix in SUFFIXES:
            return True
        return dicom and suffix not in _NEVER_DICOM and not is_document(name) and is_dicom(self.folder / name)

    def _composed(self, name: str) -> list[str]:
        """The picture whose name is the same letters, accents composed otherwise: macOS writes é as e and an accent."""
        found = self._like(name) or ""
        return [found] if found in self._names and _composed(name) in map(_composed, (found, stem(found))) else []

    def _like(self, name: str) -> str | None:
        """A file, picture or not, whose name differs in no more than case, accents' composition or kind of slash."""
        if self._loosely is None:
            everything = [*self.others, *self._names]
            self._loosely = {_loose(PurePosixPath(n).with_suffix("").as_posix()): n for n in everything}
            self._loosely |= {_loose(n): n for n in everything}
        return self._loosely.get(_loose(name))

    def _why_not(self, path: PurePosixPath) -> str:
        known = path.suffix.lower() in SUFFIXES or path.suffix.lower() in DICOM_SUFFIXES
        missing = f"{self.folder.name}/{path}{'' if known else '.*'} is missing"
        if any(is_hidden(part) for part in path.parts):
            return f"{self.folder.name}/{path} has a hidden name, which is no data: rename it"
        like = self._like(str(path))
        if like in self._names:
            return f"{missing}; there is {like}: write it so"
        if like is not None:
            return f"{self.folder.name}/{like} is there, but a file of its kind is not read here: save it as PNG"
        return missing


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _loose(name: str) -> str:
    return _composed(name).replace("\\", "/").casefold()


def others_in(root: Path, folders: Mapping[str, Sequence[str]], tables: Collection[str]) -> list[str]:
    """`not_read` of a data set of several folders and tables in `root`; folders: by name, what is not read in each.

    Of other folders there is the name: what they hold is not looked into.
    """
    used = {PurePosixPath(name) for name in tables}
    names = {PurePosixPath(folder, name) for folder, others in folders.items() for name in others} - used
    known = {path.parts[0] for path in used | {PurePosixPath(folder) for folder in folders} if path.parts} | _MASKS
    if PurePosixPath() in map(PurePosixPath, folders):  # root itself is one, and what lies in it is in `names`
        return not_read(sorted(map(str, names)))
    for entry in root.iterdir():
        if not (is_hidden(entry.name) or entry.name in known or is_document(entry.name)):
            names.add(PurePosixPath(entry.name))
    return not_read(sorted(f"{name}/" if (root / name).is_dir() else str(name) for name in names))


def without_row(names: Collection[str]) -> list[str]:
    """The line that names pictures of which no table tells; none of none."""
    if not names:
        return []
    return [f"{len(names)} picture{'s have' if len(names) > 1 else ' has'} no row in the table: {listed(names)}"]


def not_read(names: Collection[str]) -> list[str]:
    """The line that names files which nothing reads, `3 files are not read: a.heic, b.nii, c.csv`; none of none."""
    if not names:
        return []
    return [f"{len(names)} file{'s are' if len(names) > 1 else ' is'} not read: {listed(names)}"]


def listed(names: Iterable[str]) -> str:
    """The first five names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - _NAMED:,} more" * (len(names) > _NAMED)
    return ", ".join(names[:_NAMED]) + more
