"""The sample stream: each sample once a pass, in an order that no number of processes and no restart changes."""

import multiprocessing
import os
import resource
import shutil
import signal
import tempfile
import time
from collections import Counter

import lightning as L
import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from datamodules import base
from datamodules.base import DataConfig, ImageDataModule, leave_signals_to_the_parent
from datamodules.batches import Conditions, ImageBatch, collate
from datamodules.stream import (
    EvaluationSampler,
    PlainLoader,
    SampleStream,
    StreamBatchSampler,
    StreamLoader,
    derive_seed,
)
from medsynth.errors import UserError, WorkerLost, naming_lost_workers


class Positions(Dataset):
    """Samples whose caption is their (pass, index) and whose seed is their position."""

    def __init__(self, length: int, seed: int = 0):
        self.length, self.stream = length, SampleStream(length, seed)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, position: int) -> ImageBatch:
        return ImageBatch(
            images=torch.full((1, 3, 2, 2), position / 100),
            conditions=Conditions(captions=[str(self.stream(position))], labels=torch.tensor([position % 3])),
            seeds=torch.tensor([position]),
            is_prior=torch.tensor([False]),
        )


class PositionData(ImageDataModule):
    """A DataModule of `Positions`, for the loaders and the state that stand in the base class."""

    def check(self, on_progress=None):
        return {}

    def fingerprint(self):
        return ""

    def training_set(self):
        return Positions(20, self.seed)

    def validation_set(self):
        return Positions(7)

    def reference_set(self, split):
        return Positions(7)

    def evaluation_conditions(self, rows):
        return Conditions(captions=[""] * rows)

    def all_captions(self):
        return [""]


class Recorder(L.LightningModule):
    """Learns nothing, remembers the positions it was trained on, one list an optimizer step."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.steps: dict[int, list[int]] = {}

    def training_step(self, batch, batch_idx):
        self.steps.setdefault(self.global_step, []).extend(batch.seeds.tolist())
        return self.weight * batch.images.mean()

    def on_load_checkpoint(self, checkpoint):
        self.trainer.datamodule.rescale_progress(checkpoint)

    def configure_optimizers(self):
        assert self.trainer.estimated_stepping_batches > 0  # makes the loader before Lightning restores its loops
        return torch.optim.SGD(self.parameters())


def drawn(length, batch_size, accumulate, world, epochs=1):
    """Stream positions by optimizer step, over all processes."""
    steps: dict[int, list[int]] = {}
    for rank in range(world):
        sampler = StreamBatchSampler(length, batch_size, accumulate, rank, world)
        for epoch in range(epochs):
            for micro, batch in enumerate(sampler):
                assert len(batch) == batch_size
                steps.setdefault(epoch * sampler.steps_per_epoch + micro // accumulate, []).extend(batch)
            sampler.position += sampler.steps_per_epoch * sampler.global_batch_size
    return [sorted(steps[step]) for step in sorted(steps)]


def test_seeds_are_fixed_and_depend_on_every_part():
    assert derive_seed(1, "noise", 2) == derive_seed(np.int64(1), "noise", torch.tensor(2)) == 7481662704696607958
    others = {
        derive_seed(1, "noise", 2),
        derive_seed(2, "noise", 2),
        derive_seed(1, "order", 2),
        derive_seed(1, "noise"),
    }
    assert len(others) == 4
    assert all(0 <= derive_seed(i) < 2**63 for i in range(100))


def test_each_pass_is_another_permutation():
    stream = SampleStream(50, seed=3)
    samples = [stream(p) for p in range(150)]
    for epoch in range(3):
        assert {index for e, index in samples if e == epoch} == set(range(50))
    assert samples[:50] != [(0, index) for _, index in samples[50:100]]
    assert samples != [SampleStream(50, seed=4)(p) for p in range(150)]


def test_position_needs_no_history():
    stream = SampleStream(11, seed=3)
    forward = [stream(p) for p in range(60)]
    assert [SampleStream(11, seed=3)(p) for p in range(60)] == forward
    assert [stream(p) for p in reversed(range(60))] == forward[::-1]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_position_comes_once(world, accumulate):
    steps = drawn(24, batch_size=2, accumulate=accumulate, world=world, epochs=2)
    assert [p for step in steps for p in step] == list(range(48))
    stream = SampleStream(24, seed=0)
    assert Counter(stream(p)[1] for step in steps for p in step) == dict.fromkeys(range(24), 2)


def test_steps_do_not_depend_on_how_the_global_batch_is_divided():
    layouts = [(12, 1, 1), (6, 1, 2), (4, 1, 3), (3, 2, 2), (2, 6, 1), (2, 2, 3)]
    steps = [drawn(30, *layout, epochs=3) for layout in layouts]
    assert all(other == steps[0] for other in steps)
    assert steps[0] == [list(range(12 * s, 12 * s + 12)) for s in range(6)]


def test_a_set_smaller_than_the_batch_still_has_a_step():
    assert drawn(5, batch_size=8, accumulate=1, world=1) == [list(range(8))]


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_resumes_where_whole_steps_ended(workers):
    def loader(position):
        sampler = StreamBatchSampler(20, batch_size=2, accumulate=2)
        sampler.position = position
        options = {"num_workers": workers, "persistent_workers": workers > 0, "prefetch_factor": 3 if workers else None}
        return StreamLoader(Positions(20), sampler, **options)

    undisturbed = loader(0)
    order = [batch.seeds.tolist() for _ in range(3) for batch in undisturbed]
    assert order == [[2 * i, 2 * i + 1] for i in range(30)]
    assert undisturbed.position == 60

    stopped = loader(0)
    batches = iter(stopped)
    taken = [next(batches).seeds.tolist() for _ in range(7)]  # three steps and half of the fourth
    assert taken == order[:7]
    assert stopped.position == 12
    resumed = loader(stopped.position)
    assert [batch.seeds.tolist() for _ in range(2) for batch in resumed] == order[6:26]
    # The loader that was left half-way drops what it had prefetched and takes the open step again.
    assert [batch.seeds.tolist() for batch in stopped] == order[6:16]


class SaveAfter(L.Callback):
    """Saves a checkpoint at the end of the given micro-batch, counted from 1."""

    def __init__(self, micro, path):
        self.micro, self.path = micro, path

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.fit_loop.total_batch_idx + 1 == self.micro:
            trainer.save_checkpoint(self.path)


@pytest.mark.filterwarnings("error:.*dataloader is not resumable")
@pytest.mark.parametrize("micro", [6, 7, 10, 16, None])
@pytest.mark.parametrize(("workers", "batch_size"), [(0, 2), (2, 2), (0, 1), (0, 4)])
def test_trainer_resumes_anywhere_on_any_accumulation(tmp_path, workers, batch_size, micro):
    """Ten micro-batches of 2 an epoch, two a step; saved by a hook after `micro` of them, or once training is over."""

    def run(max_steps, batch_size, callbacks=None, checkpoint=None):
        data = PositionData(DataConfig(workers=workers), seed=5, batch_size=batch_size, accumulate=4 // batch_size)
        module = Recorder()
        trainer = L.Trainer(
            max_steps=max_steps,
            accumulate_grad_batches=4 // batch_size,
            accelerator="cpu",
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            use_distributed_sampler=False,
        )
        trainer.fit(module, data, ckpt_path=checkpoint)
        return trainer, module

    path = tmp_path / "last.ckpt"
    first, undisturbed = run(13 if micro else 3, 2, SaveAfter(micro, path) if micro else None)
    if not micro:
        first.save_checkpoint(path)
    _, resumed = run(13, batch_size, checkpoint=path)
    steps = {s: list(range(4 * s, 4 * s + 4)) for s in range(13)}
    assert undisturbed.steps == {s: steps[s] for s in range(first.global_step)}
    assert resumed.steps == {s: steps[s] for s in range(micro // 2 if micro else 3, 13)}


def test_state_survives_before_and_after_the_loader_exists():
    data = PositionData(DataConfig(workers=0), batch_size=4)
    data.load_state_dict({"position": 12})
    assert data.state_dict()["position"] == 12
    batches = iter(data.train_dataloader())
    assert next(batches).seeds.tolist() == [12, 13, 14, 15]
    assert data.state_dict()["position"] == 16
    data.load_state_dict({"position": 4})
    assert data.state_dict()["position"] == 4


@pytest.mark.parametrize("length", [1, 7, 12, 13])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_covers_all_once_in_equally_many_batches(length, world):
    dealt = [list(EvaluationSampler(length, 2, rank, world)) for rank in range(world)]
    assert len({len(batches) for batches in dealt}) == 1
    assert all(len(batches) == len(EvaluationSampler(length, 2, 0, world)) and all(batches) for batches in dealt)
    indices = [index for batches in dealt for batch in batches for index in batch]
    assert sorted(index for index in indices if index >= 0) == list(range(length))


def test_evaluation_of_nothing_has_no_batches():
    assert list(EvaluationSampler(0, 2)) == []


@pytest.mark.parametrize(
    "index", [[4, 0], slice(0, 5, 4), torch.tensor([4, 0]), torch.tensor([True, False, False, False, True])]
)
def test_rows_of_a_batch_stay_together(index):
    batch = collate([Positions(9)[p] for p in range(5)])
    rows = batch[index]
    assert sorted(rows.seeds.tolist()) == [0, 4]
    stream = SampleStream(9, 0)
    assert rows.conditions.captions == [str(stream(p)) for p in rows.seeds.tolist()]
    assert rows.conditions.labels.tolist() == [p % 3 for p in rows.seeds.tolist()]
    assert torch.equal(rows.images[:, 0, 0, 0], rows.seeds / 100)
    assert len(rows) == len(rows.conditions) == 2
    assert rows.latents is None


def test_no_rows():
    batch = collate([Positions(9)[0]])[[]]
    assert len(batch) == 0 and batch.images.shape == (0, 3, 2, 2) and batch.conditions.captions == []


# What cannot be read


class Cut(Dataset):
    """Reads all but one of its items."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int):
        if index == 7:
            raise RefusedError("images/p7.png cannot be decoded (image file is truncated)")
        return torch.tensor([index])


class RefusedError(UserError):
    """With an exit code of its own."""

    exit_code = 76


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batch_size", [None, 4])
def test_a_mistake_in_a_worker_is_the_one_line_that_it_is(workers, batch_size):
    loader = PlainLoader(Cut(), batch_size=batch_size, collate_fn=lambda items: items, num_workers=workers)
    taken = []
    with pytest.raises(RefusedError) as refused:
        taken.extend(loader)
    assert str(refused.value) == "images/p7.png cannot be decoded (image file is truncated)"
    assert refused.value.exit_code == 76
    assert taken == (list(torch.arange(7)[:, None]) if batch_size is None else [list(torch.arange(4)[:, None])])


class Large(Dataset):
    """40 samples of 1 MiB."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((1 << 18,), float(index))


def no_more_files(worker: int) -> None:
    """As `ulimit -n` with a small number."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))


def small_shared_memory(worker: int) -> None:
    """A file of shared memory may be no larger than 64 KiB, as where /dev/shm has no more."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))


@pytest.mark.parametrize(
    ("limit", "said"),
    [
        (no_more_files, r"\(too many open files\): raise `ulimit -n`; or take fewer workers"),
        (small_shared_memory, r"\(unable to .*/torch_.*: /dev/shm is too small: start the container with"),
    ],
)
def test_a_batch_that_cannot_be_handed_over_is_told_and_not_waited_for(limit, said):
    loader = PlainLoader(Large(), batch_size=2, collate_fn=torch.stack, num_workers=1, worker_init_fn=limit, timeout=60)
    with pytest.raises(UserError, match=said) as caught:
        list(loader)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("folder", "said"), [("x" * 90, "AF_UNIX path too long"), ("none", "No such file")])
def test_workers_without_a_place_for_their_sockets_are_not_begun(tmp_path, monkeypatch, folder, said):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / folder))
    if folder != "none":
        (tmp_path / folder).mkdir()
    with pytest.raises(UserError, match=f"{said}.*: let TMPDIR be a folder with a short path"):
        PlainLoader(Large(), batch_size=2, num_workers=1)
    PlainLoader(Large(), batch_size=2)


def test_shared_memory_that_would_run_out_is_named_before_training(monkeypatch):
    row = 4 * 3 * 2 * 2 + 8 + 8 + 1  # picture, label, seed, whether it is a prior's
    data = PositionData(DataConfig(workers=3, root=""), batch_size=2)
    ready = 2 * 3 + 4  # ahead in training, and all batches of a validation of 7
    usage = shutil.disk_usage("/dev/shm")
    monkeypatch.setattr(base.shutil, "disk_usage", lambda path: usage._replace(free=row * 2 * ready))
    data.require_room()
    with pytest.raises(UserError, match=r"data.workers=3: .* give the container --shm-size=2m, or set data.workers=1$"):
        data.require_room(processes=2)
    PositionData(DataConfig(workers=0, root=""), batch_size=2).require_room(processes=2)


class Deadly:
    """Items, the third of which ends the worker that reads it, as a machine without memory does."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.zeros(1)


def test_a_worker_that_is_killed_is_one_line_that_says_so_and_another_start_may_go_through():
    loader = PlainLoader(Deadly(), collate_fn=torch.stack, num_workers=2, worker_init_fn=leave_signals_to_the_parent)
    began = time.monotonic()
    said = r"worker \(pid.* (is killed by signal: Killed|exited unexpectedly): .* more memory"
    with pytest.raises(WorkerLost, match=said) as lost, naming_lost_workers():
        list(loader)
    assert time.monotonic() - began < 30 and "\n" not in str(lost.value)
    assert lost.value.exit_code == 1 != UserError.exit_code
    assert not multiprocessing.active_children(), "Python would wait for them at its end"
    with pytest.raises(RuntimeError, match="of another kind"), naming_lost_workers():
        raise RuntimeError("of another kind")
