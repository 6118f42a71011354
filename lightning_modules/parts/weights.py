"""Where pretrained weights come from: a hub id, a published URL, a local path, or nowhere ("random")."""

import hashlib
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

import torch

from lightning_modules.parts.hub_layout import CONFIG, choose, incomplete, weight_files
from medsynth.errors import UserError
from medsynth.files import sha256_of
from medsynth.loading import one_line
from medsynth.process import can_write

RANDOM = "random"
"""The source that means: made here from a fixed seed, nothing to load."""
_CONFIGS, _SAFE, _PICKLED = {".json", ".txt", ".model"}, ".safetensors", ".bin"
_HASHED = {*_CONFIGS, _SAFE}


@contextmanager
def made_here() -> Iterator[None]:
    """Inside, random weights are the same ones on each machine and in each run; outside, nothing is disturbed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@dataclass(frozen=True)
class Weights:
    """Pretrained weights that a method needs before it can train.

    key: the config key that names them. source: hub id ("owner/name"), URL, local file or local folder. parts: folders
    of it that are read, "." for itself. nested: folders that are read instead where all of them are there.
    """

    key: str
    source: str
    parts: tuple[str, ...] = (".",)
    nested: tuple[str, ...] = ()

    def digest(self, *parts: str) -> str:
        """SHA-256 over the weights and configs in the folder, or in the folders `parts` of it; of "random", its name.

        Raises:
            UserError: the folder is absent.
        """
        if self.source == RANDOM:
            return RANDOM
        folder, digest = self.require(), hashlib.sha256()
        files = [file for part in parts or self._read_parts(folder) for file in _hashed(folder / part)]
        for file in sorted(files):
            digest.update(file.name.encode() + bytes.fromhex(file_digest(file)))
        return digest.hexdigest()

    def contents(self) -> dict[str, Path]:
        """The files that are read, by their names below the source: configs, words and weights; of a file, itself.

        Raises:
            UserError: the source is absent, or an index of it cannot be read.
        """
        found = self.require()
        if found.is_file():
            return {found.name: found}
        return {
            str(PurePosixPath(part, name)): found / part / name
            for part in self._read_parts(found)
            for name in _read_names(found / part)
        }

    @property
    def is_url(self) -> bool:
        return "://" in self.source

    def find(self) -> Path | None:
        """The local file or folder, or None where it is absent. Never goes to the network."""
        if self.is_url:
            path = Path(torch.hub.get_dir()) / "checkpoints" / self.source.rsplit("/", 1)[-1]
            return path if path.is_file() else None
        if Path(self.source).exists():
            return Path(self.source)
        return self._find_in_hub_cache()

    def require(self) -> Path:
        """The local file or folder.

        Raises:
            UserError: it is absent; the message names the command that fetches it.
        """
        path = self.find()
        if path is None:
            raise UserError(
                f"{self.key}: {self.source} is not on this machine; run `medsynth prepare weights CONFIG` where there "
                f"is internet, or set {self.key} to a local path"
            )
        return path

    def fetch(self) -> Path:
        """Bring the weights into the local cache, with a progress bar, and return where they are.

        Raises:
            UserError: they cannot be fetched; or a local folder is not whole.
        """
        path = self.find()
        lacking = incomplete(path, self._read_parts(path)) if path is not None and path.is_dir() else None
        if path is not None and lacking is None:
            return path
        if Path(self.source).exists():
            raise UserError(f"{self.key}: {self.source} has {lacking}; copy it there whole, or name another")
        try:
            path = self._download()
        except UserError:
            raise
        except Exception as error:  # whatever the network libraries raise: the user can only mend source or network
            raise UserError(f"{self.key}: {self.source} could not be fetched: {one_line(error)}") from error
        lacking = incomplete(path, self._read_parts(path)) if path.is_dir() else None
        if lacking:
            raise UserError(f"{self.key}: the repository {self.source} has {lacking}; name another")
        return path

    def _download(self) -> Path:
        if self.is_url:
            target = Path(torch.hub.get_dir()) / "checkpoints" / self.source.rsplit("/", 1)[-1]
            self._require_writable(target.parent, "TORCH_HOME")
            target.parent.mkdir(parents=True, exist_ok=True)
            # A published file carries the start of its SHA-256 in its name: name-01234567.pth.
            digest = re.search(r"-([0-9a-f]{8,})\.\w+$", target.name)
            torch.hub.download_url_to_file(self.source, str(target), hash_prefix=digest and digest[1])
            return target
        from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download

        self._require_writable(Path(constants.HF_HUB_CACHE), "HF_HOME")

        def read(name: str) -> str:
            return Path(hf_hub_download(self.source, name)).read_text(encoding="utf-8")

        names = HfApi().list_repo_files(self.source)
        return Path(snapshot_download(self.source, allow_patterns=self.wanted(names, read)))

    def _require_writable(self, cache: Path, variable: str) -> None:
        if not can_write(cache):
            raise UserError(
                f"{self.key}: {self.source} cannot be kept in {cache}, where nothing can be written: set {variable} to "
                "a folder for weights, here and where the run is started"
            )

    def wanted(self, names: list[str], read: Callable[[str], str]) -> list[str]:
        """Of a repository's files those that are read here; an index's shards, but not the same weights twice.

        read: gives the text of a file, for an index.
        """
        there = {str(PurePosixPath(name).parent) for name in names}
        nested = self.nested and there.issuperset(self.nested)
        parts = self.nested if nested else self.parts
        return [name for part in parts for name in _wanted(names, part, read, f"{self.source}/{part}")]

    def _read_parts(self, folder: Path) -> tuple[str, ...]:
        """The folders of a local one that are read."""
        return self.nested if self.nested and all((folder / part).is_dir() for part in self.nested) else self.parts

    def _find_in_hub_cache(self) -> Path | None:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        # Only what is read was fetched: asked for the whole repository, the library would say that it is not there.
        configs = [str(PurePosixPath(part, CONFIG)) for part in (*self.parts, *self.nested)]
        try:
            return Path(snapshot_download(self.source, local_files_only=True, allow_patterns=configs))
        except (LocalEntryNotFoundError, HFValidationError):
            return None


def file_digest(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal; computed once for each content, as its size and times tell."""
    return _digest_of(file.resolve(), *file_stamp(file))


def file_stamp(file: Path) -> tuple[int, int, int]:
    """Size, and times of the last change of content and of anything, in ns: another where the content was changed."""
    found = file.stat()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def file_digests(files: list[Path]) -> list[str]:
    """`file_digest` of each, several at once."""
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(file_digest, files))


@lru_cache(maxsize=1024)
def _digest_of(file: Path, *stamp: int) -> str:
    return sha256_of(file)


def _hashed(folder: Path) -> list[Path]:
    """Configs and weights of a folder: all safetensors, or pickles where there are none."""
    there = list(folder.glob("*"))
    pickled = [] if any(file.suffix == _SAFE for file in there) else [f for f in there if f.suffix == _PICKLED]
    return [file for file in there if file.suffix in _HASHED] + pickled


def _read_names(folder: Path) -> list[str]:
    """The files of a folder that loading reads."""
    configs = {path.name for path in folder.glob("*") if path.suffix in _CONFIGS and ".index." not in path.name}
    found = weight_files(folder)
    return sorted(configs | set(found.names if found else ()))


def _wanted(names: list[str], part: str, read: Callable[[str], str], where: str) -> list[str]:
    def below(name: str) -> str:
        return str(PurePosixPath(part, name))

    here = {path.name for path in map(PurePosixPath, names) if path.parent == PurePosixPath(part)}
    wanted = {name for name in here if PurePosixPath(name).suffix in _CONFIGS and ".index." not in name}
    found = choose(here, lambda name: read(below(name)), where) if CONFIG in here else None
    return [below(name) for name in sorted(wanted | set(found.names if found else ()))]
