"""How a checkpoint is written, verified and found: a folder that is whole or known to be damaged."""

import os
import shutil
import stat
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.io import CheckpointIO
from lightning_utilities.core.apply_func import apply_to_collection
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from callbacks.ema import EMA
from callbacks.finite import NotFinite, first_not_finite
from callbacks.manifest import MANIFEST, CheckpointDamaged, listed, read_manifest, verified, write_manifest
from callbacks.sharding import Held, ShardedTensors, by_number, write_shard
from medsynth.errors import UserError
from medsynth.files import disk_fault, remove, sync
from medsynth.loading import one_line
from medsynth.pickled import read_pickled

WEIGHTS, AVERAGE, STATE = "weights.safetensors", "ema.safetensors", "state.pt"
SHARD = "shard-{:05d}-of-{:05d}.safetensors"
BEST, LAST = "best.ckpt", "last.ckpt"
_FINITE = "finite"  # in a manifest: weights and average were looked through; earlier versions did not


class DurableCheckpointIO(CheckpointIO):
    """Checkpoints as directories that are whole or known to be damaged.

    `<name>.ckpt/` holds `weights.safetensors` (the module's state), `ema.safetensors` (the average, if there is one),
    `state.pt` (all the rest; loads with `weights_only=True`) and `manifest.json` (global step, epoch, and the size and
    SHA-256 of each file). Where the processes hold the state in parts, each writes `shard-<process>-of-<number>
    .safetensors` with its parts of weights, average and optimizer state instead; such a checkpoint is read by any
    number of processes and by a plain one.

    A save writes and fsyncs all of it in `.<name>.ckpt.tmp-…` beside, moves an older `<name>.ckpt` aside to
    `.<name>.ckpt.old`, moves the new one into its place, fsyncs the parent, and only then removes the older one. So a
    whole checkpoint exists at every moment; `newest_verified` also looks aside. What a killed save left, the next save
    of that name removes. Only one run may write to a directory.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Mapping[str, Any] | None = None
    ) -> None:
        """Save Lightning's `checkpoint` as the directory `path`; `storage_options` are further entries of its manifest.

        Raises:
            UserError: it could not be written, as on a full disk, or is not finite. What stood at `path` stays there.
            TypeError: it holds an object that could only be loaded by running code.
        """
        target = Path(path)
        notes = {"global_step": checkpoint["global_step"], "epoch": checkpoint["epoch"], **(storage_options or {})}
        notes[_FINITE] = True
        in_parts = any(isinstance(value, Held) for value in checkpoint["state_dict"].values())
        (_save_together if in_parts else _save_alone)(checkpoint, target, notes)

    def load_checkpoint(
        self, path: str | Path, map_location: torch.device | str | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """The dict that was saved, on the CPU or on `map_location`. No code is unpickled, whatever `weights_only` says.

        Raises:
            CheckpointDamaged: a file is missing or not what was saved.
        """
        device = str(map_location or "cpu")
        checkpoint = self.open_checkpoint(path, device)
        if not isinstance(checkpoint["state_dict"], ShardedTensors):
            return checkpoint
        checkpoint["state_dict"] = _gathered(checkpoint["state_dict"], device)
        checkpoint["optimizer_states"] = [
            by_number({**state, "moments": {k: _gathered(m, device) for k, m in state["moments"].items()}})
            for state in checkpoint["optimizer_states"]
        ]
        if EMA.state_key in checkpoint["callbacks"]:
            ema = checkpoint["callbacks"][EMA.state_key]
            ema["shadow"] = _gathered(ema["shadow"], device)
        return checkpoint

    def open_checkpoint(self, path: str | Path, device: str = "cpu") -> dict[str, Any]:
        """The same, but what several processes wrote stays on disk as `ShardedTensors`, by parameter names.

        Raises:
            CheckpointDamaged: as `load_checkpoint`.
        """
        path = Path(path)
        manifest = verified(path)
        try:
            return self._opened(path, manifest, device)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whole, and yet not what a save makes: it fails wherever it is first missed
            raise CheckpointDamaged(path, f"it holds no training ({one_line(error)})") from error

    def _opened(self, path: Path, manifest: Mapping[str, Any], device: str) -> dict[str, Any]:
        checkpoint = read_pickled(path / STATE, device)
        shards = [path / name for name in manifest["files"] if name.startswith("shard-")]
        average = checkpoint.get("callbacks", {}).get(EMA.state_key)
        if shards:
            checkpoint["state_dict"] = ShardedTensors(shards, "weights/")
            for state in checkpoint["optimizer_states"]:
                state["moments"] = {key: ShardedTensors(shards, f"{key}/") for key in state["moments"]}
        else:
            checkpoint["state_dict"] = load_file(path / WEIGHTS, device=device)
        if average is not None:
            average["shadow"] = ShardedTensors(shards, "ema/") if shards else load_file(path / AVERAGE, device=device)
        return checkpoint

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove the checkpoint `path`; nobody ever sees a part of it."""
        target = Path(path)
        for found in (_aside(target), target):
            if found.exists():
                _discard(found, target)


def verify(path: str | Path) -> str | None:
    """None when the checkpoint `path` is what was saved, and finite, else the file and what is wrong with it."""
    try:
        if verified(Path(path)).get(_FINITE):
            return None
        unfit = first_not_finite(DurableCheckpointIO().open_checkpoint(path))  # an earlier version's
    except CheckpointDamaged as damage:
        return damage.reason
    return f"{unfit} is not finite" if unfit else None


def newest_verified(directory: str | Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The whole, finite checkpoint in `directory` of the highest global step (of equals the one written last), or None.

    Second, the checkpoints that were passed over on the way to it, each with the reason.
    """
    readable, skipped = [], []
    for path in [*Path(directory).glob("*.ckpt"), *Path(directory).glob(".*.ckpt.old")]:
        try:
            step = read_manifest(path)["global_step"]
            readable.append((step, (path / MANIFEST).stat().st_mtime_ns, path))
        except CheckpointDamaged as damage:
            skipped.append((path, damage.reason))
    for *_, path in sorted(readable, reverse=True):
        reason = verify(path)
        if reason is None:
            return path, skipped
        skipped.append((path, reason))
    return None, skipped


def best_checkpoint(directory: str | Path) -> Path:
    """The checkpoint in `directory` with the best monitored value; loading it verifies it.

    Raises:
        UserError: there is none yet.
    """
    path = Path(directory) / BEST
    for found in (path, _aside(path)):
        if found.exists():
            return found
    raise UserError(f"{path} does not exist: no validation has given the monitored value yet. Use {LAST}")


def _temporary(target: Path, kind: str = "new") -> Path:
    return target.with_name(f".{target.name}.tmp-{kind}-{os.getpid()}")


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _remove_leftovers(target: Path) -> None:
    """Remove what a killed save of `target` left; the older checkpoint only where the new one got into its place."""
    for leftover in target.parent.glob(f".{target.name}.tmp-*"):
        remove(leftover)
    if target.exists() and _aside(target).exists():
        _discard(_aside(target), target)


def _save_alone(checkpoint: Mapping[str, Any], target: Path, notes: Mapping[str, Any]) -> None:
    if unfit := first_not_finite(checkpoint):
        raise NotFinite(target, unfit)
    temporary = _temporary(target)
    try:
        _make(temporary, target)
        _write(checkpoint, temporary, notes)
        _put_in_place(temporary, target)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise _unwritten(target, disk_fault(error) or str(error)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # after a success there is none


def _save_together(checkpoint: Mapping[str, Any], target: Path, notes: Mapping[str, Any]) -> None:
    """Every process writes its part, the first one all else and, once it knows of all parts, the manifest.

    The processes agree after each stage, so that all raise where one failed, and none waits for one that has given up.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    for unfit in filter(None, _agreed(lambda: first_not_finite(checkpoint), target)):
        raise NotFinite(target, unfit)
    (temporary, *_) = _agreed(lambda: _temporary(target), target)
    try:
        _agreed(lambda: _make(temporary, target) if rank == 0 else None, target)
        written = _agreed(lambda: _write_part(checkpoint, temporary, rank, world), target)
        _agreed(lambda: _finish(temporary, target, notes, written) if rank == 0 else None, target)
    finally:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)


def _agreed(work: Callable[[], Any], target: Path) -> list[Any]:
    """What `work` gives in each process; raises in all of them where it fails in one."""
    result = failure = None
    try:
        result = work()
    except Exception as error:  # of whatever kind: the others must hear of it
        failure = error
    outcomes: list[Any] = [None] * dist.get_world_size()
    said = None if failure is None else disk_fault(failure) or f"{type(failure).__name__}: {failure}"
    dist.all_gather_object(outcomes, (result, said))
    if isinstance(failure, TypeError):
        raise failure
    told = [f"process {rank}: {message}" for rank, (_, message) in enumerate(outcomes) if message]
    if told:
        raise _unwritten(target, "; ".join(told)) from failure
    return [given for given, _ in outcomes]


def _unwritten(target: Path, reason: str) -> UserError:
    mend = "Check the free space and the quota of its disk"
    return UserError(f"checkpoint {target} could not be written: {reason}. {mend}")


def _make(temporary: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target)
    temporary.mkdir()


def _write(checkpoint: Mapping[str, Any], directory: Path, notes: Mapping[str, Any]) -> None:
    weights, average, rest = _split(checkpoint)
    _write_state(rest, directory)
    save_file(_separate(weights), directory / WEIGHTS)
    if average is not None:
        save_file(_separate(average), directory / AVERAGE)
    write_manifest(directory, notes, listed(sorted(directory.iterdir())))
    for file in directory.iterdir():
        shutil.copymode(directory / STATE, file)  # safetensors writes for the owner alone
        sync(file)
    sync(directory)


def _write_part(checkpoint: Mapping[str, Any], directory: Path, rank: int, world: int) -> dict[str, Any]:
    """Write what this process holds; what the manifest says of the files."""
    weights, average, rest = _split(checkpoint)
    tensors = {f"weights/{name}": value for name, value in weights.items()}
    tensors |= {f"ema/{name}": value for name, value in (average or {}).items()}
    for state in rest["optimizer_states"]:
        tensors |= {f"{key}/{name}": v for key, parts in state["moments"].items() for name, v in parts.items()}
    rest["optimizer_states"] = [{**state, "moments": list(state["moments"])} for state in rest["optimizer_states"]]
    shard = directory / SHARD.format(rank, world)
    write_shard(shard, tensors, rank)
    files = [shard]
    if rank == 0:
        _write_state(rest, directory)
        files.append(directory / STATE)
    for file in files:
        file.chmod(stat.S_IMODE(directory.stat().st_mode) & 0o666)  # safetensors writes for the owner alone
        sync(file)
    return listed(files)


def _finish(temporary: Path, target: Path, notes: Mapping[str, Any], written: list[dict[str, Any]]) -> None:
    write_manifest(temporary, notes, {name: facts for files in written for name, facts in files.items()})
    sync(temporary / MANIFEST)
    sync(temporary)
    _put_in_place(temporary, target)


def _write_state(rest: Mapping[str, Any], directory: Path) -> None:
    with (directory / STATE).open("wb") as file:
        torch.save(rest, file)
    refused = torch.serialization.get_unsafe_globals_in_checkpoint(directory / STATE)
    if refused:
        raise TypeError(f"a checkpoint takes tensors and plain Python values, and was given {', '.join(refused)}")


def _gathered(tensors: Mapping[str, Tensor], device: str) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def _split(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor] | None, dict[str, Any]]:
    """The weights, the average or None, and the rest with paths, enums and NumPy scalars as plain values."""
    rest = {key: value for key, value in checkpoint.items() if key != "state_dict"}
    average = None
    if EMA.state_key in rest.get("callbacks", {}):
        ema = dict(rest["callbacks"][EMA.state_key])
        average = ema.pop("shadow")
        rest["callbacks"] = {**rest["callbacks"], EMA.state_key: ema}
    return checkpoint["state_dict"], average, apply_to_collection(rest, (PurePath, Enum, np.generic), _plain)


def _plain(value: PurePath | Enum | np.generic) -> Any:
    if isinstance(value, PurePath):
        return str(value)
    return value.value if isinstance(value, Enum) else value.item()


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same values as safetensors takes them: contiguous, and no two names on one memory."""
    separate, seen = {}, set()
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        separate[name] = (tensor.clone() if memory in seen else tensor).detach().contiguous()
        seen.add(memory)
    return separate


def _put_in_place(temporary: Path, target: Path) -> None:
    aside = _aside(target)
    if target.exists():
        target.rename(aside)
    temporary.rename(target)
    sync(target.parent)
    if aside.exists():
        _discard(aside, target)


def _discard(path: Path, target: Path) -> None:
    """Remove `path`, `target` or its older copy, under a temporary name, so that no part of it is ever found."""
    doomed = _temporary(target, "removed")
    path.rename(doomed)
    sync(doomed.parent)
    remove(doomed)
