"""manifest.json of a checkpoint: what its files are, so that what is not what was saved is known."""

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from medsynth.errors import UserError
from medsynth.files import read_object, sha256_of

MANIFEST = "manifest.json"
FORMAT = 1


class CheckpointDamaged(UserError):  # noqa: N818
    """A checkpoint is not what was saved. `reason` names the file and what is wrong with it."""

    def __init__(self, path: Path, reason: str):
        super().__init__(f"checkpoint {path} is damaged: {reason}. Use another checkpoint of the run")
        self.reason = reason


def read_manifest(path: str | Path) -> dict[str, Any]:
    """`manifest.json` of the checkpoint `path`: format, global_step, epoch, finite, files; a best one's metric too.

    Raises:
        CheckpointDamaged: there is none, it is not what was saved, or a later version of this package wrote it.
    """
    path = Path(path)
    try:
        manifest = read_object(path / MANIFEST)
    except OSError as error:
        raise CheckpointDamaged(path, f"{MANIFEST} cannot be read ({error.strerror})") from error
    except ValueError:
        manifest = {}
    if manifest.pop("sha256", None) != _digest(manifest):
        raise CheckpointDamaged(path, f"{MANIFEST} is not what was saved")
    if (found := manifest.get("format")) != FORMAT:
        raise CheckpointDamaged(path, f"{MANIFEST} has format {found}, and this version reads {FORMAT}")
    if not isinstance(manifest.get("global_step"), int) or not _names_files(manifest.get("files")):
        raise CheckpointDamaged(path, f"{MANIFEST} is none of a checkpoint")
    return manifest


def write_manifest(directory: Path, entries: Mapping[str, Any], files: Mapping[str, Any]) -> None:
    """Write what `read_manifest` reads. files: by their names, as `listed` gives them."""
    manifest = {"format": FORMAT, **entries, "files": files}
    text = json.dumps({**manifest, "sha256": _digest(manifest)}, indent=2)
    (directory / MANIFEST).write_text(text + "\n", encoding="utf-8")


def listed(files: list[Path]) -> dict[str, Any]:
    """What the manifest says of files."""
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(sha256_of, files))
    return {f.name: {"bytes": f.stat().st_size, "sha256": d} for f, d in zip(files, digests, strict=True)}


def verified(path: Path) -> dict[str, Any]:
    """The manifest of the checkpoint `path`, after a check of all its files.

    Raises:
        CheckpointDamaged: a file is missing or not what was saved.
    """
    manifest = read_manifest(path)
    files = [path / name for name in manifest["files"]]
    with ThreadPoolExecutor() as pool:
        faults = list(pool.map(_fault, files, manifest["files"].values()))
    for file, fault in zip(files, faults, strict=True):
        if fault:
            raise CheckpointDamaged(path, f"{file.name} {fault}")
    return manifest


def _fault(file: Path, saved: Mapping[str, Any]) -> str | None:
    try:
        if file.exists() and not file.is_file():  # reading a pipe would wait for ever
            return "is no file"
        size = file.stat().st_size
        if size != saved["bytes"]:
            return f"has {size} bytes, and {saved['bytes']} were saved"
        return None if sha256_of(file) == saved["sha256"] else "is not what was saved (its SHA-256 differs)"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _names_files(files: Any) -> bool:
    """Whether it is files of the checkpoint's own folder, each with its size and digest."""
    return (
        isinstance(files, dict)
        and bool(files)
        and all(
            PurePosixPath(name).name == name and isinstance(facts, dict) and facts.keys() >= {"bytes", "sha256"}
            for name, facts in files.items()
        )
    )


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
