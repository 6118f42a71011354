"""Checkpoints through the real Trainer, with damage, kills at every moment and full disks; and when they are saved."""

import contextlib
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from copy import deepcopy
from enum import Enum
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch import nn

from callbacks.checkpoint import CheckpointConfig, build_checkpoints
from callbacks.durable import (
    CheckpointDamaged,
    DurableCheckpointIO,
    best_checkpoint,
    newest_verified,
    read_manifest,
    verify,
)
from callbacks.ema import EMA, EMAConfig
from callbacks.preemption import Preemption, PreemptionConfig, StopRequest
from medsynth.errors import UserError

FILES = {"weights.safetensors", "ema.safetensors", "state.pt", "manifest.json"}
FORK = multiprocessing.get_context("fork")  # the libraries are imported once


class Numbers(L.LightningDataModule):
    """Six batches an epoch of one endless stream, with the place in it as state."""

    def __init__(self):
        super().__init__()
        self.position = 0

    def train_dataloader(self):
        return self

    def __len__(self):
        return 6

    def __iter__(self):
        for _ in range(6):
            self.position += 1
            yield torch.tensor([[self.position / 10]])

    def val_dataloader(self):
        return [torch.ones(1, 1)]

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


class Toy(L.LightningModule):
    """Two tied layers; a trace of every batch and validation with the weights it met."""

    def __init__(self, fid=()):
        super().__init__()
        torch.manual_seed(0)
        first, second = nn.Linear(1, 1), nn.Linear(1, 1)
        second.weight = first.weight
        self.net = nn.Sequential(first, second)
        self.trace, self.fid = [], list(fid)

    def after_swap(self):
        pass

    def trainable_modules(self):
        return {"net": self.net}

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.net.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.95**step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch, index):
        self.trace.append(("train", self.current_epoch, index, batch.item(), *self.values()))
        return (self.net(batch) - 1).square().sum()

    def validation_step(self, batch, _):
        self.trace.append(("validation", self.trainer.global_step, *self.values()))
        self.log("val/loss", self.net(batch).sum())

    def on_validation_epoch_end(self):
        value = self.fid.pop(0) if self.fid else None
        if value is not None and self.trainer.is_global_zero:
            self.log("eval/fid", value, rank_zero_only=True)

    def values(self):
        return [parameter.item() for parameter in self.net.parameters()]


class Adversaries(Toy):
    """Two optimizers that both step on every batch."""

    automatic_optimization = False

    def configure_optimizers(self):
        return [torch.optim.SGD(layer.parameters(), lr=0.01) for layer in self.net]

    def training_step(self, batch, index):
        for optimizer in self.optimizers():
            self.manual_backward(self.net(batch).sum())
            optimizer.step()


class Recording(DurableCheckpointIO):
    """Remembers what it was given to save."""

    def __init__(self):
        self.saves, self.given = [], {}

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        super().save_checkpoint(checkpoint, path, storage_options)
        self.saves.append((Path(path).name, checkpoint["global_step"]))
        self.given[Path(path)] = deepcopy(checkpoint)


class Moments(Checkpoint):
    """Saves a checkpoint of its own at every moment at which one may be saved."""

    def __init__(self, directory):
        self.directory, self.step, self.traced = directory, 0, {}

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step > self.step:
            self.step = trainer.global_step
            self.save(trainer, f"batch-{self.step}.ckpt")

    def on_validation_end(self, trainer, *_):
        self.save(trainer, f"validation-{trainer.global_step}.ckpt")

    def on_train_end(self, trainer, *_):
        self.save(trainer, "end.ckpt")

    def save(self, trainer, name):
        trainer.save_checkpoint(self.directory / name)
        self.traced[self.directory / name] = len(trainer.lightning_module.trace)


def fit(module, *callbacks, checkpoint=None, io=None, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    saves = any(isinstance(callback, Checkpoint) for callback in callbacks)
    quiet |= {"enable_checkpointing": saves, "num_sanity_val_steps": 0}
    trainer = L.Trainer(callbacks=list(callbacks), plugins=[io or DurableCheckpointIO()], **(quiet | options))
    trainer.fit(module, datamodule=Numbers(), ckpt_path=checkpoint)
    return trainer


def small_checkpoint(step, size=1000):
    weights = {"net.weight": torch.full((size,), float(step)), "net.bias": torch.arange(3)}
    shadow = {"net.weight": torch.full((size,), step + 0.5)}
    callbacks = {"EMA": {"updates": step, "shadow": shadow}}
    optimizers = [{"state": {0: {"exp_avg": torch.full((size,), -float(step))}}}]
    parts = {"state_dict": weights, "callbacks": callbacks, "optimizer_states": optimizers}
    return {"epoch": 0, "global_step": step, "pytorch-lightning_version": "2.6.0", **parts}


def save(path, step, size=1000):
    DurableCheckpointIO().save_checkpoint(small_checkpoint(step, size), path)
    return path


def batches(module):
    return sum(event[0] == "train" for event in module.trace)


def assert_same(left, right, where="checkpoint"):
    if isinstance(right, torch.Tensor):
        assert left.dtype == right.dtype and torch.equal(left, right), where
    elif isinstance(right, dict):
        assert left.keys() == right.keys(), where
        for key in right:
            assert_same(left[key], right[key], f"{where}[{key!r}]")
    elif isinstance(right, (list, tuple)):
        assert type(left) is type(right) and len(left) == len(right), where
        for index, (one, other) in enumerate(zip(left, right, strict=True)):
            assert_same(one, other, f"{where}[{index}]")
    else:
        assert left == right, where


def test_training_checkpoint_comes_back_as_it_was(tmp_path):
    io = Recording()
    fit(Toy(), EMA(EMAConfig(decay=0.9)), *build_checkpoints(CheckpointConfig(), tmp_path), io=io, max_epochs=2)
    assert {path.name for path in tmp_path.iterdir()} == {"best.ckpt", "last.ckpt"}
    for path, given in io.given.items():
        assert {file.name for file in path.iterdir()} == FILES
        assert given["loops"] and given["optimizer_states"] and given["callbacks"]["EMA"]["shadow"]
        assert_same(io.load_checkpoint(path), given)
        state = torch.load(path / "state.pt", weights_only=True)
        assert "state_dict" not in state
        assert "shadow" not in state["callbacks"]["EMA"]
    assert read_manifest(tmp_path / "last.ckpt")["global_step"] == 12


def test_awkward_tensors_and_values_are_kept(tmp_path):
    class Kind(Enum):
        ROUND = "round"

    base = torch.arange(12.0).reshape(3, 4)
    checkpoint = small_checkpoint(1)
    tensors = {"tied": base, "also tied": base, "slice": base[1:], "turned": base.T, "half": base.bfloat16()}
    checkpoint["state_dict"] = tensors | {"scalar": torch.tensor(7), "empty": torch.empty(0)}
    checkpoint["hyper_parameters"] = {"root": Path("a/b"), "kind": Kind.ROUND, "pair": (np.float64(0.1), [np.int64(3)])}
    io = DurableCheckpointIO()
    io.save_checkpoint(checkpoint, tmp_path / "run.ckpt")
    checkpoint["hyper_parameters"] = {"root": "a/b", "kind": "round", "pair": (0.1, [3])}
    assert_same(io.load_checkpoint(tmp_path / "run.ckpt"), checkpoint)
    assert_same(io.load_checkpoint(tmp_path / "run.ckpt", map_location=torch.device("cpu")), checkpoint)
    modes = {file.name: file.stat().st_mode for file in (tmp_path / "run.ckpt").iterdir()}
    assert len(set(modes.values())) == 1, modes


def test_checkpoint_without_average_has_no_file_for_it(tmp_path):
    checkpoint = small_checkpoint(1)
    del checkpoint["callbacks"]
    io = DurableCheckpointIO()
    io.save_checkpoint(checkpoint, tmp_path / "run.ckpt")
    assert {file.name for file in (tmp_path / "run.ckpt").iterdir()} == FILES - {"ema.safetensors"}
    assert_same(io.load_checkpoint(tmp_path / "run.ckpt"), checkpoint)


def test_object_that_needs_code_to_load_is_refused_and_the_older_checkpoint_stays(tmp_path):
    path = save(tmp_path / "run.ckpt", 1)
    with pytest.raises(TypeError, match="random.Random"):
        DurableCheckpointIO().save_checkpoint(small_checkpoint(2) | {"dice": random.Random(0)}, path)
    assert read_manifest(path)["global_step"] == 1
    assert verify(path) is None
    assert [file.name for file in tmp_path.iterdir()] == ["run.ckpt"]


def test_removed_checkpoint_is_gone(tmp_path):
    path = save(tmp_path / "run.ckpt", 1)
    shutil.copytree(path, tmp_path / ".run.ckpt.old")
    DurableCheckpointIO().remove_checkpoint(path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options",
    [
        {"max_epochs": 3},
        {"max_epochs": 3, "accumulate_grad_batches": 2},
        {"max_epochs": 2, "val_check_interval": 2},
        {"max_steps": 15, "check_val_every_n_epoch": 2},
    ],
    ids=str,
)
def test_resume_from_any_moment_continues_as_the_undisturbed_run(tmp_path, options):
    whole, average, moments = Toy(), EMA(EMAConfig(decay=0.9)), Moments(tmp_path)
    fit(whole, average, moments, owing(tmp_path / "whole"), **options)
    assert len(moments.traced) > 9
    for path, traced in moments.traced.items():
        resumed, again = Toy(), EMA(EMAConfig(decay=0.9))
        fit(resumed, again, owing(tmp_path / path.stem), checkpoint=path, **options)
        done = torch.load(path / "state.pt", weights_only=True)["Numbers"]["position"]
        assert batches(resumed) == batches(whole) - done, path.name
        assert resumed.trace == whole.trace[traced:], path.name  # also the validation that was due
        assert resumed.values() == whole.values(), path.name
        assert_same(again.state_dict(), average.state_dict(), path.name)


@pytest.mark.parametrize("options", [{"max_epochs": 2}, {"max_epochs": 1, "val_check_interval": 2}], ids=str)
def test_second_resume_continues_too(tmp_path, options):
    """From the checkpoints of a run that was resumed before a validation was due, and began with it."""
    whole, first = Toy(), Moments(tmp_path / "first")
    fit(whole, first, owing(tmp_path / "whole"), **options)
    validated = [path for path in first.traced if "validation" in path.name]
    for path in validated:
        due = path.with_name(path.name.replace("validation", "batch"))
        second = Moments(tmp_path / f"from-{due.stem}")
        fit(Toy(), second, owing(tmp_path / due.stem), checkpoint=due, **options)
        assert path.name in {again.name for again in second.traced}
        for again in second.traced:
            resumed, name = Toy(), f"{due.stem}-{again.stem}"
            fit(resumed, owing(tmp_path / name), checkpoint=again, **options)
            assert resumed.trace == whole.trace[first.traced[first.directory / again.name] :], name


def owing(run_dir):
    """What marks the validation that a checkpoint owes."""
    return Preemption(PreemptionConfig(), StopRequest(60), run_dir, run_dir / "never.ckpt")


def flip(file, data):
    position = random.Random(len(data)).randrange(len(data))
    file.write_bytes(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])


DAMAGE = {
    "flipped bit": flip,
    "truncated": lambda file, data: file.write_bytes(data[: len(data) // 2]),
    "longer": lambda file, data: file.write_bytes(data + b"\0"),
    "zeros": lambda file, data: file.write_bytes(bytes(len(data))),
    "zeros at the end": lambda file, data: file.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2)),
    "empty": lambda file, data: file.write_bytes(b""),
    "missing": lambda file, data: file.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", sorted(FILES))
def test_damage_is_named_and_passed_over(tmp_path, name, damage):
    older, damaged = save(tmp_path / "best.ckpt", 1), save(tmp_path / "last.ckpt", 2)
    DAMAGE[damage](damaged / name, (damaged / name).read_bytes())
    assert name in verify(damaged)
    with pytest.raises(CheckpointDamaged, match=f"last.ckpt is damaged: {name} "):
        DurableCheckpointIO().load_checkpoint(damaged)
    assert newest_verified(tmp_path) == (older, [(damaged, verify(damaged))])


@pytest.mark.parametrize("name", sorted(FILES))
def test_file_of_another_save_is_passed_over(tmp_path, name):
    """Of the same size, whole in itself, in the place of this save's own."""
    older, mixed = save(tmp_path / "best.ckpt", 1), save(tmp_path / "last.ckpt", 2)
    shutil.copy(older / name, mixed / name)
    wrong = "is not what was saved" if name != "manifest.json" else "weights.safetensors|ema.safetensors|state.pt"
    assert re.search(wrong, verify(mixed))
    assert newest_verified(tmp_path) == (older, [(mixed, verify(mixed))])


def test_file_that_no_save_wrote_is_never_read(tmp_path):
    path = save(tmp_path / "last.ckpt", 2)
    for name in ("shard-00000-of-00001.safetensors", ".nfs0123"):
        (path / name).write_bytes(b"of something else")
    assert newest_verified(tmp_path) == (path, [])
    assert_same(DurableCheckpointIO().load_checkpoint(path), small_checkpoint(2))


def test_any_flipped_bit_of_the_manifest_is_found(tmp_path):
    path = save(tmp_path / "last.ckpt", 1)
    file = path / "manifest.json"
    data = file.read_bytes()
    for position in range(len(data)):
        file.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with pytest.raises(CheckpointDamaged, match=r"manifest\.json"):
            read_manifest(path)


def test_manifest_of_a_later_format_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as later:
        later.setattr("callbacks.manifest.FORMAT", 2)
        path = save(tmp_path / "last.ckpt", 1)
    assert verify(path) == "manifest.json has format 2, and this version reads 1"


def test_newest_is_by_step_and_then_by_time(tmp_path):
    assert newest_verified(tmp_path / "nowhere") == (None, [])
    save(tmp_path / "last.ckpt", 9)
    save(tmp_path / "best.ckpt", 10)
    assert newest_verified(tmp_path) == (tmp_path / "best.ckpt", [])
    save(tmp_path / "last.ckpt", 10)
    assert newest_verified(tmp_path) == (tmp_path / "last.ckpt", [])


def test_no_checkpoint_where_one_is_asked_for(tmp_path):
    with pytest.raises(UserError, match=r"best\.ckpt does not exist.*Use last\.ckpt"):
        best_checkpoint(tmp_path)
    with pytest.raises(CheckpointDamaged, match=r"manifest\.json cannot be read \(No such file"):
        DurableCheckpointIO().load_checkpoint(tmp_path / "none.ckpt")


def killed_save(path, step, moment):
    """Save, and be killed at the `moment`-th time that Python touches the file system."""
    touches = 0

    def audit(event, _):
        nonlocal touches
        touches += event.split(".")[0] in ("os", "open", "shutil")
        if touches == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)
    save(path, step)


def test_kill_at_every_moment_of_a_save_leaves_a_whole_checkpoint(tmp_path):
    found, in_place = [], []
    for moment in range(1, 200):
        directory = tmp_path / str(moment)
        path = save(directory / "best.ckpt", 1)
        child = FORK.Process(target=killed_save, args=(path, 2, moment))
        child.start()
        child.join()
        whole, _ = newest_verified(directory)
        found.append(read_manifest(whole)["global_step"])
        in_place.append(path.exists())
        assert verify(best_checkpoint(directory)) is None
        save(path, 3)
        assert [file.name for file in directory.iterdir()] == ["best.ckpt"]
        assert read_manifest(newest_verified(directory)[0])["global_step"] == 3
        if child.exitcode == 0:
            break
    assert child.exitcode == 0
    assert len(found) > 20 and found == sorted(found) and set(found) == {1, 2}
    assert not all(in_place)  # also killed between the two renames


def test_everything_reaches_the_disk_before_what_depends_on_it(tmp_path, monkeypatch):
    path, steps = save(tmp_path / "run.ckpt", 1), []
    fsync, rename, rmtree = os.fsync, Path.rename, shutil.rmtree

    def note(kind, subject):
        steps.append((kind, str(Path(subject).relative_to(tmp_path)).replace(str(os.getpid()), "")))

    monkeypatch.setattr(os, "fsync", lambda fd: (note("sync", Path(f"/proc/self/fd/{fd}").readlink()), fsync(fd)))
    monkeypatch.setattr(Path, "rename", lambda old, new: (note("rename", new), rename(old, new)))
    monkeypatch.setattr(shutil, "rmtree", lambda doomed, **options: (note("remove", doomed), rmtree(doomed, **options)))
    save(path, 2)

    files = {("sync", f".run.ckpt.tmp-new-/{name}") for name in FILES}
    assert set(steps[:4]) == files
    assert steps[4:] == [
        ("sync", ".run.ckpt.tmp-new-"),
        ("rename", ".run.ckpt.old"),
        ("rename", "run.ckpt"),
        ("sync", "."),
        ("rename", ".run.ckpt.tmp-removed-"),
        ("sync", "."),
        ("remove", ".run.ckpt.tmp-removed-"),
        ("remove", ".run.ckpt.tmp-new-"),
    ]


KILLS = 170
"""Random kills of a process that saves; tests/callbacks/test_checkpoint_sharded.py has more, of two processes."""
KILLED_SIZE = 50_000


@contextlib.contextmanager
def temporary_files_elsewhere(directory):
    """The folder of temporary files on another file system than `directory`, as nothing can be renamed across."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == directory.stat().st_dev:
        pytest.skip("needs checkpoints on another file system than /dev/shm")
    with tempfile.TemporaryDirectory(dir=memory) as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", folder)
        patch.setattr(tempfile, "tempdir", None)
        assert tempfile.gettempdir() == folder
        yield


def save_again_and_again(path, report):
    """Resume as a training does, and save step after step; each is told once it is saved."""
    newest, _ = newest_verified(path.parent)
    first = read_manifest(newest)["global_step"] if newest else 0
    report.send(first)
    for step in range(first + 1, first + 1000):
        save(path, step, size=KILLED_SIZE)
        report.send(step)


class Saver:
    """A process that saves again and again, and what it told."""

    def __init__(self, start):
        self.reports, report = FORK.Pipe(duplex=False)
        self.process = start(report)
        report.close()
        self.told = []

    def hear(self, number):
        """Wait for `number` more steps."""
        for _ in range(number):
            assert self.reports.poll(60), "no save for a minute"
            self.told.append(self.reports.recv())

    def measure(self):
        """How long a save takes, seconds."""
        self.hear(6)
        began = time.monotonic()
        self.hear(20)
        return (time.monotonic() - began) / 20

    def hear_all(self):
        """What was told before the end."""
        with contextlib.suppress(EOFError):
            while True:
                self.told.append(self.reports.recv())


def kill_at_random(number, directory, start, kill, contents):
    """Let savers be killed `number` times at random moments of a save, and check what is there after each kill.

    start(report) gives a running process that reports the step it resumed from, and each one that it has saved;
    kill(process, dice) ends it and all that belongs to it; contents(step) is what was saved.
    """
    seed = random.SystemRandom().randrange(10**6)
    print("seed", seed)  # shown where the test fails
    dice, last, found, duration = random.Random(seed), 0, Counter(), None
    directory.mkdir(exist_ok=True)
    with temporary_files_elsewhere(directory):
        for _ in range(number):
            saver = Saver(start)
            duration = duration or saver.measure()
            saver.hear(dice.randint(1, 4))
            time.sleep(dice.uniform(0, duration))
            kill(saver.process, dice)
            saver.hear_all()
            newest, skipped = newest_verified(directory)
            step = read_manifest(newest)["global_step"]
            assert skipped == [] and last == saver.told[0] and max(saver.told) <= step <= max(saver.told) + 1
            assert_same(DurableCheckpointIO().load_checkpoint(newest), contents(step))
            found[left_of_a_save(directory)] += 1
            last = step
    print(f"{last} saves of {duration * 1000:.1f} ms; under way were", dict(found))
    assert found["nothing"] < number * 3 // 4 and found["before the manifest"] > number // 20, found


def left_of_a_save(directory):
    """Which part of a save a kill struck, by what it left."""
    names = {path.name for path in directory.iterdir() if "ckpt" in path.name}
    (removed, new) = (next(directory.glob(f".*.tmp-{kind}-*"), None) for kind in ("removed", "new"))
    if new is None:
        return "removing the older" if removed else "nothing" if names == {"last.ckpt"} else "renaming"
    if "last.ckpt" not in names or ".last.ckpt.old" in names:
        return "renaming"
    return "before the manifest" if not (new / "manifest.json").exists() else "syncing"


def kill_alone(process, _):
    process.kill()
    process.join()


def test_kills_at_random_moments_lose_at_most_one_save(tmp_path):
    def start(report):
        process = FORK.Process(target=save_again_and_again, args=(tmp_path / "last.ckpt", report))
        process.start()
        return process

    kill_at_random(KILLS, tmp_path, start, kill_alone, lambda step: small_checkpoint(step, KILLED_SIZE))


def save_on_full_disk(path, checkpoint, answer):
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    try:
        DurableCheckpointIO().save_checkpoint(checkpoint, path)
    except UserError as error:
        answer.send(str(error))


@pytest.mark.parametrize("part", ["state_dict", "optimizer_states", "callbacks"])
def test_full_disk_is_told_and_the_older_checkpoint_stays(tmp_path, part):
    path = save(tmp_path / "last.ckpt", 1)
    larger = small_checkpoint(2) | {part: small_checkpoint(2, size=1_000_000)[part]}
    answer, sender = FORK.Pipe(duplex=False)
    child = FORK.Process(target=save_on_full_disk, args=(path, larger, sender))
    child.start()
    child.join()
    assert child.exitcode == 0
    assert answer.poll(1)
    assert "last.ckpt could not be written" in answer.recv()
    assert (read_manifest(path)["global_step"], verify(path)) == (1, None)
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize(
    ("every", "options", "expected"),
    [
        (4, {}, [4, 6, 8, 12, 12]),  # validations after 6 and 12
        (None, {}, [6, 12]),
        (4, {"limit_val_batches": 0}, [4, 8, 12]),
        (5, {"limit_val_batches": 0}, [5, 10, 12]),
        (None, {"limit_val_batches": 0}, [12]),
        (None, {"num_sanity_val_steps": 1}, [6, 12]),
        (2, {"accumulate_grad_batches": 3, "limit_val_batches": 0}, [2, 4]),
    ],
)
def test_last_is_saved_every_so_many_steps_after_validations_and_at_the_end(tmp_path, every, options, expected):
    io = Recording()
    callbacks = build_checkpoints(CheckpointConfig(every_steps=every, monitor="none"), tmp_path)
    fit(Toy(), *callbacks, io=io, max_epochs=2, **options)
    assert io.saves == [("last.ckpt", step) for step in expected]


def test_steps_of_two_optimizers_are_counted_as_the_trainer_counts_them(tmp_path):
    io = Recording()
    callbacks = build_checkpoints(CheckpointConfig(every_steps=5), tmp_path)
    fit(Adversaries(), *callbacks, io=io, max_epochs=2, limit_val_batches=0)
    assert io.saves == [("last.ckpt", step) for step in (6, 10, 16, 20, 24)]


@pytest.mark.parametrize(("mode", "bests"), [("min", {12: 5.0, 30: 3.0}), ("max", {12: 5.0, 24: 7.0})])
def test_best_follows_the_value_where_a_validation_gives_it(tmp_path, mode, bests):
    io = Recording()
    config = CheckpointConfig(monitor="eval/fid", mode=mode)
    module = Toy(fid=[None, 5.0, None, 7.0, 3.0, None, float("nan"), 3.0])
    fit(module, *build_checkpoints(config, tmp_path), io=io, max_epochs=8)
    assert [step for name, step in io.saves if name == "best.ckpt"] == list(bests)
    manifest = read_manifest(best_checkpoint(tmp_path))
    assert manifest["metric"] == {"name": "eval/fid", "value": list(bests.values())[-1]}
    assert manifest["global_step"] == list(bests)[-1]
    assert "metric" not in read_manifest(tmp_path / "last.ckpt")


def test_resumed_run_compares_with_the_best_before_it(tmp_path):
    config = CheckpointConfig(every_steps=4, monitor="eval/fid")
    fit(Toy(fid=[5.0, 3.0, 4.0]), *build_checkpoints(config, tmp_path), max_epochs=3)
    newest, _ = newest_verified(tmp_path)
    assert newest == tmp_path / "last.ckpt"
    io = Recording()
    fit(Toy(fid=[3.5, 2.0]), *build_checkpoints(config, tmp_path), checkpoint=newest, io=io, max_epochs=5)
    assert [step for name, step in io.saves if name == "best.ckpt"] == [30]
    assert [step for name, step in io.saves if name == "last.ckpt"] == [20, 24, 24, 28, 30]

    other = build_checkpoints(CheckpointConfig(monitor="val/loss"), tmp_path / "other")
    fit(Toy(), *other, checkpoint=tmp_path / "last.ckpt", max_epochs=6)
    assert read_manifest(tmp_path / "other" / "best.ckpt")["metric"]["name"] == "val/loss"


def test_validating_alone_saves_nothing(tmp_path):
    trainer = L.Trainer(accelerator="cpu", logger=False, callbacks=build_checkpoints(CheckpointConfig(), tmp_path))
    trainer.validate(Toy(), datamodule=Numbers(), verbose=False)
    assert list(tmp_path.iterdir()) == []


class Processes(DurableCheckpointIO):
    """Notes which process saved what."""

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        super().save_checkpoint(checkpoint, path, storage_options)
        with (Path(path).parent / "saves.jsonl").open("a") as file:
            print(json.dumps([os.getpid(), Path(path).name, checkpoint["global_step"]]), file=file)


def one_of_two(rank, port, directory):
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    os.environ |= address | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    callbacks = build_checkpoints(CheckpointConfig(every_steps=4, monitor="eval/fid"), directory)
    module = Toy(fid=[2.0, 1.0])  # only the first process logs it
    fit(module, EMA(EMAConfig()), *callbacks, io=Processes(), strategy="ddp", devices=2, max_epochs=2)


def test_of_two_processes_the_first_saves_and_decides(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    pair = [FORK.Process(target=one_of_two, args=(rank, port, tmp_path)) for rank in range(2)]
    for process in pair:
        process.start()
    for process in pair:
        process.join(60)
        process.kill()
    assert [process.exitcode for process in pair] == [0, 0]
    saves = [json.loads(line) for line in (tmp_path / "saves.jsonl").read_text().splitlines()]
    assert {process for process, *_ in saves} == {pair[0].pid}
    assert [(name, step) for _, name, step in saves] == [
        *[("last.ckpt", 4), ("best.ckpt", 6), ("last.ckpt", 6)],
        *[("last.ckpt", 8), ("last.ckpt", 12), ("best.ckpt", 12), ("last.ckpt", 12)],
    ]
    assert verify(tmp_path / "last.ckpt") is verify(tmp_path / "best.ckpt") is None
    alone = Toy()
    fit(alone, EMA(EMAConfig()), checkpoint=tmp_path / "last.ckpt", max_epochs=3)
    assert batches(alone) == 6
