"""Where pretrained weights come from: a hub id, a published URL, a local path, or nowhere ("random")."""

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from medsynth.errors import UserError

RANDOM = "random"
"""The source that means: made here from a fixed seed, nothing to load."""
# Configs, tokenizers and safetensors; never pickles, nor the same weights for other frameworks.
_HASHED = {".json", ".txt", ".safetensors"}
_HUB_FILES = ("*.json", "*.txt", "*.model", "*.safetensors")


@contextmanager
def made_here() -> Iterator[None]:
    """Inside, random weights are the same ones on each machine and in each run; outside, nothing is disturbed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@dataclass(frozen=True)
class Weights:
    """Pretrained weights that a method needs before it can train.

    key: the config key that names them. source: hub id ("owner/name"), URL, local file or local folder. files: patterns
    of what to fetch of a hub's repository.
    """

    key: str
    source: str
    files: tuple[str, ...] = _HUB_FILES

    def digest(self, *parts: str) -> str:
        """SHA-256 over the weights and configs in the folder, or in the folders `parts` of it; of "random", its name.

        Raises:
            UserError: the folder is absent.
        """
        if self.source == RANDOM:
            return RANDOM
        folder, digest = self.require(), hashlib.sha256()
        files = [file for part in parts or (".",) for file in (folder / part).glob("*") if file.suffix in _HASHED]
        for file in sorted(files):
            with file.open("rb") as content:
                digest.update(file.name.encode() + hashlib.file_digest(content, "sha256").digest())
        return digest.hexdigest()

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
        """Bring the weights into the local cache, with a progress bar, and return where they are."""
        if (path := self.find()) is not None:
            return path
        try:
            return self._download()
        except Exception as error:  # whatever the network libraries raise: the user can only mend source or network
            raise UserError(f"{self.key}: {self.source} could not be fetched: {error}") from error

    def _download(self) -> Path:
        if self.is_url:
            target = Path(torch.hub.get_dir()) / "checkpoints" / self.source.rsplit("/", 1)[-1]
            target.parent.mkdir(parents=True, exist_ok=True)
            # A published file carries the start of its SHA-256 in its name: name-01234567.pth.
            digest = re.search(r"-([0-9a-f]{8,})\.\w+$", target.name)
            torch.hub.download_url_to_file(self.source, str(target), hash_prefix=digest and digest[1])
            return target
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(self.source, allow_patterns=list(self.files)))

    def _find_in_hub_cache(self) -> Path | None:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        try:
            return Path(snapshot_download(self.source, local_files_only=True))
        except (LocalEntryNotFoundError, HFValidationError):
            return None
