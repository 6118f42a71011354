"""RUN/pretrained.json: what the weights from outside were that a run began with, file by file.

A run reads them at its start, at each resume, when it exports and when it draws. Whoever reads them again must find the
same.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from lightning_modules.base import GenerativeModule
from lightning_modules.parts.weights import Weights, file_digest, file_digests, file_stamp
from medsynth.errors import UserError
from medsynth.files import naming_unwritten, read_object, write_whole

FILE = "pretrained.json"


def hold(run_dir: Path, module: GenerativeModule) -> None:
    """Raise UserError where weights that the run began with have changed since.

    A file is read only where its size or times are others than those it had. A run of an earlier version has no record,
    and goes on.
    """
    recorded = _read(Path(run_dir) / FILE)
    for weights in module.read_weights():
        before = recorded.get(weights.key)
        if before is None:
            continue
        reason = _change(before, weights.contents())
        if reason:
            raise UserError(
                f"{weights.key}: {weights.source} is not what {run_dir} was trained on: {reason}; put back what was "
                "there, or train another run_dir"
            )


def record(run_dir: Path, module: GenerativeModule) -> dict[str, str]:
    """Write down what the weights are, on the first process; their digests as tags for MLflow, by their keys.

    Raises:
        UserError: it cannot be written.
    """
    return _record(Path(run_dir), module.read_weights()) or {}


@rank_zero_only
def _record(run_dir: Path, sources: list[Weights]) -> dict[str, str]:
    if not sources:
        return {}
    before = _read(run_dir / FILE)
    described = {weights.key: _described(weights.contents(), before.get(weights.key, {})) for weights in sources}
    with naming_unwritten(f"run_dir={run_dir}"):
        write_whole(run_dir / FILE, json.dumps(described, indent=1) + "\n")
    return {f"weights.{key}": _whole(files) for key, files in described.items()}


def _described(files: dict[str, Path], before: dict[str, Any]) -> dict[str, Any]:
    """SHA-256 and stamp of each file, the digest from before where the stamp is the same."""
    stamps = {name: list(file_stamp(path)) for name, path in files.items()}
    known = {name: said["sha256"] for name, said in before.items() if said["stamp"] == stamps.get(name)}
    new = [name for name in files if name not in known]
    known |= dict(zip(new, file_digests([files[name] for name in new]), strict=True))
    return {name: {"sha256": known[name], "stamp": stamp} for name, stamp in stamps.items()}


def _whole(files: dict[str, Any]) -> str:
    return hashlib.sha256("".join(f"{name} {files[name]['sha256']}\n" for name in sorted(files)).encode()).hexdigest()


def _change(before: dict[str, Any], now: dict[str, Path]) -> str | None:
    """The first file that has changed, and how; None where none has."""
    for name in sorted(before.keys() | now.keys()):
        if name not in now:
            return f"{name} is missing"
        if name not in before:
            return f"{name} is new"
        if list(file_stamp(now[name])) == before[name]["stamp"]:
            continue
        digest = file_digest(now[name])
        if digest != before[name]["sha256"]:
            return f"{name} has changed (SHA-256 was {before[name]['sha256'][:12]}…, is {digest[:12]}…)"
    return None


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return read_object(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); remove it if the pretrained weights are what the run began with"
        ) from None
