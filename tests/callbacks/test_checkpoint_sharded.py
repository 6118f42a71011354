"""Checkpoints that several processes write: damage, a full disk in one of them, and reading by any other number."""

import os
import re
import resource
import shutil
import signal
import time
import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.distributed as dist

from callbacks.checkpoint import CheckpointConfig, build_checkpoints
from callbacks.durable import CheckpointDamaged, DurableCheckpointIO, newest_verified, read_manifest, verify
from callbacks.sharding import Held, by_name, by_number
from medsynth.errors import UserError
from tests.callbacks.test_checkpoint import DAMAGE, Toy, assert_same, fit, kill_at_random
from tests.processes import FORK, together

SIZE = 30_000


def cut(tensor, rank, world):
    """Uneven parts of a tensor, the last one perhaps empty."""
    length = -(-tensor.numel() // world)
    return Held(tensor.reshape(-1)[rank * length : (rank + 1) * length], rank * length, tuple(tensor.shape))


def checkpoint(step, rank, world, size=SIZE):
    matrix = torch.arange(float(size)).reshape(3, -1) + step
    weights = {"net.weight": cut(matrix, rank, world), "net.bias": cut(torch.tensor([step + 0.5]), rank, world)}
    ema = {"updates": step, "shadow": {"net.weight": cut(matrix / 2, rank, world), "net.mean": torch.ones(2)}}
    moments = {"exp_avg": {"net.weight": cut(-matrix, rank, world), "net.bias": cut(torch.ones(1), rank, world)}}
    names = ["net.weight", "net.bias"]
    optimizer = {"names": names, "groups": [{"lr": 0.1}], "steps": dict.fromkeys(names, step), "moments": moments}
    parts = {"state_dict": weights, "callbacks": {"EMA": ema}, "optimizer_states": [optimizer]}
    return {"epoch": 0, "global_step": step, "pytorch-lightning_version": "2.6.0", **parts}


def join(rank):
    dist.init_process_group("gloo", rank=rank, world_size=int(os.environ["WORLD_SIZE"]))
    return rank, dist.get_world_size()


def save_some(rank, path, steps):
    rank, world = join(rank)
    for step in steps:
        DurableCheckpointIO().save_checkpoint(checkpoint(step, rank, world), path)


@pytest.fixture
def saved(tmp_path):
    together(3, save_some, tmp_path / "last.ckpt", [1, 2], log=tmp_path / "log")
    return tmp_path / "last.ckpt"


def test_parts_of_three_processes_are_one_checkpoint(saved):
    manifest = read_manifest(saved)
    shards = {f"shard-0000{rank}-of-00003.safetensors" for rank in range(3)}
    assert set(manifest["files"]) == shards | {"state.pt"}
    assert [path.name for path in saved.parent.iterdir() if "ckpt" in path.name] == ["last.ckpt"]

    whole, expected = DurableCheckpointIO().load_checkpoint(saved), checkpoint(2, 0, 1)
    for name, part in expected["state_dict"].items():
        assert torch.equal(whole["state_dict"][name], part.values.reshape(part.shape)), name
    matrix = torch.arange(float(SIZE)).reshape(3, -1) + 2
    assert torch.equal(whole["callbacks"]["EMA"]["shadow"]["net.weight"], matrix / 2)
    assert torch.equal(whole["callbacks"]["EMA"]["shadow"]["net.mean"], torch.ones(2))
    numbered = whole["optimizer_states"][0]
    assert torch.equal(numbered["state"][0]["exp_avg"], -matrix) and numbered["state"][0]["step"] == 2
    assert numbered["param_groups"] == [{"lr": 0.1, "params": [0, 1]}]
    assert by_number(by_name(numbered, ["net.weight", "net.bias"]))["param_groups"] == numbered["param_groups"]

    lazy = DurableCheckpointIO().open_checkpoint(saved)["state_dict"]
    assert torch.equal(lazy.part("net.weight", 9_995, 20_003), matrix.reshape(-1)[9_995:20_003])
    for rank in range(2):
        part = cut(torch.zeros(3, SIZE // 3), rank, 2)
        part.read(lazy, "net.weight")
        assert torch.equal(part.values, cut(matrix, rank, 2).values)


def save_two(rank, directory):
    rank, world = join(rank)
    for step, name in ((1, "best.ckpt"), (2, "last.ckpt")):
        DurableCheckpointIO().save_checkpoint(checkpoint(step, rank, world), directory / name)


@pytest.fixture
def pair(tmp_path):
    """An older checkpoint and a newer one."""
    together(2, save_two, tmp_path, log=tmp_path / "log")
    return tmp_path / "best.ckpt", tmp_path / "last.ckpt"


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_to_any_part_is_named_and_passed_over(pair, damage):
    older, damaged = pair
    for name in ["manifest.json", *sorted(read_manifest(damaged)["files"])]:
        data = (damaged / name).read_bytes()
        DAMAGE[damage](damaged / name, data)
        assert name in verify(damaged)
        with pytest.raises(CheckpointDamaged, match=f"last.ckpt is damaged: {name} "):
            DurableCheckpointIO().open_checkpoint(damaged)
        assert newest_verified(damaged.parent) == (older, [(damaged, verify(damaged))])
        (damaged / name).write_bytes(data)
    assert verify(damaged) is None


def test_part_of_another_save_or_of_another_process_is_passed_over(pair):
    older, mixed = pair
    first, second = (f"shard-0000{rank}-of-00002.safetensors" for rank in range(2))
    for foreign in (older / second, mixed / first):
        data = (mixed / second).read_bytes()
        shutil.copy(foreign, mixed / second)
        assert re.match(f"{second} (is not what was saved|has .* bytes)", verify(mixed))
        assert newest_verified(mixed.parent) == (older, [(mixed, verify(mixed))])
        (mixed / second).write_bytes(data)
    shutil.copy(older / "manifest.json", mixed)
    assert newest_verified(mixed.parent)[0] == older


def test_part_that_no_save_wrote_is_never_read(pair):
    """For instance of a run of three processes, copied into the same folder."""
    _, path = pair
    shutil.copy(path / "shard-00001-of-00002.safetensors", path / "shard-00002-of-00003.safetensors")
    assert newest_verified(path.parent) == (path, [])
    assert_same(DurableCheckpointIO().load_checkpoint(path), whole(2))


def save_on_full_disk(rank, path, full):
    rank, world = join(rank)
    DurableCheckpointIO().save_checkpoint(checkpoint(1, rank, world), path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == full:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    started = time.monotonic()
    with pytest.raises(UserError, match=f"could not be written: process {full}: .*free space"):
        DurableCheckpointIO().save_checkpoint(checkpoint(2, rank, world), path)
    assert time.monotonic() - started < 10
    assert (read_manifest(path)["global_step"], verify(path)) == (1, None)
    dist.barrier()
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    DurableCheckpointIO().save_checkpoint(checkpoint(3, rank, world), path)


@pytest.mark.parametrize("full", [0, 1])
def test_a_full_disk_in_one_process_is_told_by_all_and_the_older_checkpoint_stays(tmp_path, full):
    path = tmp_path / "last.ckpt"
    together(2, save_on_full_disk, path, full, log=tmp_path / "log", seconds=60)
    assert (read_manifest(path)["global_step"], verify(path)) == (3, None)
    assert [found.name for found in tmp_path.iterdir() if "ckpt" in found.name] == ["last.ckpt"]


KILLS = 40


def save_together_again_and_again(rank, path, report):
    rank, world = join(rank)
    dist.barrier()  # from here on neither waits for one that never came
    first = newest_step(path.parent)
    if rank == 0:
        report.send(first)
    for step in range(first + 1, first + 1000):
        DurableCheckpointIO().save_checkpoint(checkpoint(step, rank, world), path)
        if rank == 0:
            report.send(step)


def whole(step):
    """What a single process reads of `checkpoint(step, …)` of all processes."""
    read = checkpoint(step, 0, 1)
    read["state_dict"], (optimizer,) = filled(read["state_dict"]), read["optimizer_states"]
    read["callbacks"]["EMA"]["shadow"] = filled(read["callbacks"]["EMA"]["shadow"])
    moments = {key: filled(parts) for key, parts in optimizer["moments"].items()}
    return read | {"optimizer_states": [by_number(optimizer | {"moments": moments})]}


def filled(parts):
    return {k: part.values.reshape(part.shape) if isinstance(part, Held) else part for k, part in parts.items()}


def kill_one_or_both(parent, dice):
    """Kill one process, after which the other has to end by itself, or both."""
    children = [int(child) for child in Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()]
    for child in dice.choice([children, children[:1], children[1:]]):
        os.kill(child, signal.SIGKILL)
    parent.join(30)
    assert parent.exitcode is not None, "the other process hangs"


def test_kills_at_random_moments_lose_at_most_one_save(tmp_path):
    folder = tmp_path / "checkpoints"

    def start(report):
        arguments, log = (2, save_together_again_and_again, folder / "last.ckpt", report), tmp_path / "log"
        parent = FORK.Process(target=together, args=arguments, kwargs={"log": log})
        parent.start()
        return parent

    kill_at_random(KILLS, folder, start, kill_one_or_both, whole)


def newest_step(directory):
    newest, _ = newest_verified(directory)
    return read_manifest(newest)["global_step"] if newest else 0


def train_on_full_disk(directory, on_error, answer):
    checkpoints = build_checkpoints(CheckpointConfig(every_steps=4, monitor="val/loss", on_error=on_error), directory)

    class Fill(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            limit = 100 if 4 < trainer.global_step < 11 else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            fit(Toy(), Fill(), *checkpoints, max_epochs=2)
            ended = None
        except UserError as error:
            ended = str(error)
    kept = [str(warning.message) for warning in told if "could not be written" in str(warning.message)]
    answer.send((ended, kept))


@pytest.mark.parametrize("on_error", ["continue", "stop"])
def test_training_goes_on_without_a_checkpoint_or_stops(tmp_path, on_error):
    answer, sender = FORK.Pipe(duplex=False)
    child = FORK.Process(target=train_on_full_disk, args=(tmp_path, on_error, sender))
    child.start()
    assert answer.poll(60)
    ended, told = answer.recv()
    child.join()
    if on_error == "stop":
        assert "could not be written" in ended and newest_step(tmp_path) == 4
    else:
        assert ended is None and told and all("Training goes on" in text for text in told)
        assert newest_step(tmp_path) == 12
