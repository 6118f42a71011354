"""A run of two processes, killed at random moments until it is through, comes to what an undisturbed one comes to.

    python -m tests.soak --kills 100 --strategy ddp --seed 0

The processes are forked from this one, which has imported all, with torchrun's environment. Half of the kills strike
both, the others one of them. A fifth of the moments is drawn from the time that a start takes, a fifth from that of a
save, a twentieth from that after the last step, and the rest from all the time between, as an undisturbed run has
shown them before.
"""

import os

# Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import ctypes
import json
import random
import shutil
import socket
import sys
import tempfile
import time
import traceback
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from enum import IntEnum
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import click
import lightning as L
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import jobs.train
from callbacks.durable import DurableCheckpointIO, newest_verified, read_manifest
from datamodules.phantoms.colonoscopy import write_colonoscopy
from jobs.run.config import load_config
from jobs.tracking.server import mlflow_client
from jobs.tracking.spool import read_run_id
from tests.callbacks.test_checkpoint import assert_same
from tests.processes import FORK

TINY = Path(__file__).parent.parent / "configs/tiny/msdm.yaml"
PROCESSES = 2
STEPS_A_KILL = 4
"""Of 3 kills, the fewest, 12 steps are enough for a validation."""
PATIENCE = 60.0
"""Seconds in which a process ends by itself after the other was killed in training; MLflow may take 30 of them."""
START_PATIENCE = 5.0
"""The same in a start, where it may still wait for the other; then it is killed, as a launcher does."""
WALL = ("throughput/",)
"""Metrics that tell of time, and differ from run to run."""


class Stage(IntEnum):
    """What a process is at."""

    START, TRAINING, VALIDATION, SAVE, END = range(5)


class Seen(ctypes.Structure):
    """How far the first process of a start has come, in memory that is shared with this one; times are monotonic."""

    _fields_ = (
        ("stage", ctypes.c_int),
        ("steps", ctypes.c_long),  # done in this start
        ("saved", ctypes.c_long),  # step of the newest save that has returned
        ("saves", ctypes.c_long),
        ("save_seconds", ctypes.c_double),  # of all saves together
        ("save_began", ctypes.c_double),  # when the newest save began, 0 before the first
        ("ended", ctypes.c_double),  # when training had ended, 0 before
    )


class Watch(L.Callback):
    """Keeps a `Seen` up to date, and the times at which steps were done or began training; first of all callbacks."""

    def __init__(self, seen: Seen, times: Sequence[float]):
        self.seen, self.times = seen, times

    def on_train_start(self, trainer, pl_module) -> None:
        self.seen.stage = Stage.TRAINING
        self.times[trainer.global_step] = time.monotonic()

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        self.seen.steps += 1
        self.times[trainer.global_step] = time.monotonic()

    def on_validation_start(self, trainer, pl_module) -> None:
        self.seen.stage = Stage.VALIDATION

    def on_validation_end(self, trainer, pl_module) -> None:
        self.seen.stage = Stage.TRAINING

    def on_train_end(self, trainer, pl_module) -> None:
        self.seen.stage = Stage.END
        self.seen.ended = time.monotonic()

    def on_fit_end(self, trainer, pl_module) -> None:
        if not self.seen.ended:  # nothing was left to train
            self.on_train_end(trainer, pl_module)


def watch(seen: Seen, times: Sequence[float]) -> None:
    """Let the training of this process tell `seen` and `times` of itself; it goes on as it would."""
    build, save = jobs.train._build_trainer, DurableCheckpointIO.save_checkpoint

    def built(*arguments):
        trainer = build(*arguments)
        trainer.callbacks.insert(0, Watch(seen, times))
        return trainer

    def saved(self, checkpoint, *arguments, **options):
        before, seen.stage, seen.save_began = seen.stage, Stage.SAVE, time.monotonic()
        save(self, checkpoint, *arguments, **options)
        seen.save_seconds += time.monotonic() - seen.save_began
        seen.saves += 1
        seen.saved, seen.stage = checkpoint["global_step"], before

    jobs.train._build_trainer, DurableCheckpointIO.save_checkpoint = built, saved


class Start:
    """The processes of one start of a run, and what the first of them has come to."""

    def __init__(self, config: DictConfig, log: Path):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.seen, self.began = FORK.Value(Seen, lock=False), time.monotonic()
        self.times = FORK.Array("d", config.train.max_steps + 1, lock=False)
        self._logs = [log.with_name(f"{log.name}.{rank}.log") for rank in range(PROCESSES)]
        self._processes = [FORK.Process(target=self._train, args=(rank, port, config)) for rank in range(PROCESSES)]
        for process in self._processes:
            process.start()

    def wait(self, is_time: Callable[[], bool]) -> bool:
        """Wait for a moment; False where the run has finished before.

        Raises:
            ClickException: a process has failed.
        """
        while (codes := [process.exitcode for process in self._processes]) != [0] * PROCESSES:
            if any(codes):
                raise self._failure(f"exit codes {codes}, though none was killed")
            if is_time():
                return True
            time.sleep(0.002)
        return False

    def kill(self, alone: bool, dice: random.Random) -> float | None:
        """Kill a random one of the processes or all; seconds until all have ended.

        None where the other one waited on in a start, and was killed too.

        Raises:
            ClickException: it hung when training had begun.
        """
        stage, began = Stage(self.seen.stage), time.monotonic()
        running = [process for process in self._processes if process.exitcode is None]
        for process in [dice.choice(running)] if alone and running else running:
            process.kill()
        for process in self._processes:
            process.join(max(0, began + (START_PATIENCE if stage == Stage.START else PATIENCE) - time.monotonic()))
        took = time.monotonic() - began
        hung = any(process.exitcode is None for process in self._processes)
        if hung and stage != Stage.START:
            raise self._failure(f"in {stage.name} a process hung after the other was killed")
        self._end()
        return None if hung else took

    def _train(self, rank: int, port: int, config: DictConfig) -> None:
        descriptor = os.open(self._logs[rank], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)  # the parent's may be held by its progress
        place = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "TORCHELASTIC_RUN_ID": "soak"}
        place |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), PROCESSES)
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {key: str(value) for key, value in place.items()}
        if rank == 0:
            watch(self.seen, self.times)
        code = 1
        try:
            jobs.train.train(config)
            code = 0
        except BaseException as error:
            traceback.print_exc()
            code = getattr(error, "exit_code", getattr(error, "code", 1))
        finally:
            sys.stdout.flush()
            os._exit(code)  # without the parent's handlers of exit

    def _end(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()

    def _failure(self, what: str) -> click.ClickException:
        """An error with the ends of what the processes wrote."""
        self._end()
        said = [f"{log}\n{log.read_text()[-3000:]}" for log in self._logs if log.exists()]
        return click.ClickException("\n".join([f"{what}:", *said]))


class Moment(NamedTuple):
    """When to kill: `delay` seconds after the start (START), after step `step` (TRAINING), after the first save from
    then on has begun (SAVE), or after training (END)."""

    stage: Stage
    delay: float
    step: int = 0

    def has_come(self, start: Start) -> bool:
        if start.seen.ended and self.stage in (Stage.TRAINING, Stage.SAVE):
            return True  # training was faster this time
        since = self._since(start)
        return since is not None and time.monotonic() >= since + self.delay

    def _since(self, start: Start) -> float | None:
        if self.stage == Stage.START:
            return start.began
        if self.stage == Stage.END:
            return start.seen.ended or None
        # A start from beyond the step counts from its own beginning.
        reached = next(filter(None, start.times[self.step :]), None)
        if self.stage != Stage.SAVE or reached is None:
            return reached
        return start.seen.save_began if start.seen.save_began >= reached else None


def draw_moments(kills: int, start: Start, finished: float, dice: random.Random) -> list[Moment]:
    """Random moments of the undisturbed run `start` that ended at `finished`, in an order in which they can come."""
    times, seen = list(start.times), start.seen
    at_start, in_save, at_end = kills // 5, kills // 5, kills // 20
    inside = sorted(dice.uniform(times[0], seen.ended) for _ in range(kills - at_start - at_end))
    steps = [bisect_right(times, moment) - 1 for moment in inside]
    moments = [Moment(Stage.TRAINING, m - times[s], s) for m, s in zip(inside, steps, strict=True)]
    for i in dice.sample(range(len(moments)), in_save):
        moments[i] = Moment(Stage.SAVE, dice.uniform(0, seen.save_seconds / seen.saves), moments[i].step)
    for _ in range(at_start):
        moment = Moment(Stage.START, dice.uniform(0, times[0] - start.began))
        moments.insert(dice.randrange(len(moments)), moment)
    return moments + [Moment(Stage.END, dice.uniform(0, finished - seen.ended)) for _ in range(at_end)]


@dataclass
class Record:
    """What the kills met."""

    stages: Counter = field(default_factory=Counter)
    """Kills by stage."""
    ones: int = 0
    """Kills of one process of the two."""
    ended: list[float] = field(default_factory=list)
    """Seconds in which the other ended by itself."""
    leftovers: int = 0
    """Kills that left a part of a checkpoint."""
    starts: int = 0
    steps: int = 0
    """Steps of all starts."""


def disturb(config: DictConfig, moments: list[Moment], dice: random.Random, folder: Path) -> Record:
    """Start a run again and again, kill it at `moments`, and let the last start finish.

    Raises:
        ClickException: a process failed or hung, or a kill cost more than the save it struck.
    """
    record, waiting = Record(), list(moments)
    alone = [i < len(moments) // 2 for i in range(len(moments))]
    dice.shuffle(alone)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("kills · {task.fields[at]}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=len(moments), at="step 0")
        while True:
            start = Start(config, folder / f"start-{record.starts:03d}")
            record.starts += 1
            is_last = not waiting
            if start.wait(lambda s=start: bool(waiting) and waiting[0].has_come(s)):
                waiting.pop(0)
                _strike(start, alone.pop(), dice, record)
                step = _check_checkpoint(Path(config.run_dir) / "checkpoints", start.seen.saved, record)
                progress.update(bar, advance=1, at=f"step {step}/{config.train.max_steps}")
            elif waiting:
                # It was faster this time. A run that has finished is started again, as after a requeue.
                waiting[0] = waiting[0]._replace(delay=waiting[0].delay / 2)
            record.steps += start.seen.steps
            if is_last:
                return record


def _strike(start: Start, alone: bool, dice: random.Random, record: Record) -> None:
    record.stages[start.seen.stage] += 1
    took = start.kill(alone, dice)
    if alone:
        record.ones += 1
        record.ended += [] if took is None else [took]


def _check_checkpoint(checkpoints: Path, saved: int, record: Record) -> int:
    """The step of the newest whole checkpoint, 0 for none, which is at most the save that was struck behind."""
    newest, skipped = newest_verified(checkpoints)
    step = read_manifest(newest)["global_step"] if newest else 0
    if skipped or step < saved:
        raise click.ClickException(f"step {saved} was saved, and {newest} of step {step} is found; skipped: {skipped}")
    record.leftovers += any(checkpoints.glob(".*.ckpt.*"))
    return step


def logged(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """Every metric of the one MLflow run of `run_dir` in the order of logging, but for those that tell of time.

    Raises:
        AssertionError: there are several runs, it is not FINISHED, or a metric's steps do not rise.
    """
    client = mlflow_client(f"sqlite:///{run_dir}.db")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    run, *others = client.search_runs(experiments)
    assert not others and run.info.run_id == read_run_id(run_dir), f"{1 + len(others)} runs in MLflow"
    assert run.info.status == "FINISHED", run.info.status
    metrics = {}
    for name in sorted(run.data.metrics):
        history = sorted(client.get_metric_history(run.info.run_id, name), key=lambda p: (p.timestamp, p.step))
        steps = [point.step for point in history]
        assert all(a < b for a, b in pairwise(steps)), f"the steps of {name} do not rise: {steps}"
        if not name.startswith(WALL):
            metrics[name] = [(point.step, point.value) for point in history]
    return metrics


def losses(run_dir: Path) -> Iterator[tuple[int, float]]:
    """Step and loss of each step that a run logged, also of those done again."""
    for line in (run_dir / "tracking/events.jsonl").read_text().splitlines():
        if line.endswith("}"):  # else a kill cut it short
            event = json.loads(line)
            if "train/loss" in event.get("values", {}):
                yield event["step"], event["values"]["train/loss"]


def compare(disturbed: Path, undisturbed: Path) -> int:
    """Check that one run came to what the other did, bit for bit; the points that MLflow misses.

    Raises:
        AssertionError: it did not; the message says where.
    """
    io = DurableCheckpointIO()
    for name in ("last.ckpt", "best.ckpt"):
        ours, theirs = (io.load_checkpoint(run / "checkpoints" / name) for run in (disturbed, undisturbed))
        for checkpoint in (ours, theirs):
            # Counts of validation batches: a resume has them from the validation on with which it began.
            del checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]["total"]
        assert_same(ours, theirs, name)
    expected = dict(losses(undisturbed))
    for step, loss in losses(disturbed):
        assert loss == expected[step], f"step {step} had the loss {loss}, and {expected[step]} undisturbed"
    ours, theirs = logged(disturbed), logged(undisturbed)
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    for name, points in ours.items():
        assert set(points) <= set(theirs[name]), f"{name} differs"
    return sum(len(theirs[name]) - len(points) for name, points in ours.items())


def print_record(record: Record, steps: int, seconds: float) -> None:
    """What there is to record, as a table."""
    table = Table("what", "number", box=None)
    for stage in Stage:
        table.add_row(f"kills in {stage.name.lower()}", str(record.stages[stage]))
    ended = max(record.ended, default=0.0)
    rows = {
        "kills of one process of the two": record.ones,
        "the other then ended by itself": f"{len(record.ended)}, within {ended:.1f} s",
        "the other waited on in a start, and was killed": record.ones - len(record.ended),
        "kills that left a part of a checkpoint": record.leftovers,
        "starts": record.starts,
        "steps done again": record.steps - steps,
        "wall time": timedelta(seconds=round(seconds)),
    }
    for name, value in rows.items():
        table.add_row(name, str(value))
    Console().print(table)


def configured(folder: Path, name: str, strategy: str, kills: int) -> DictConfig:
    """The tiny msdm on two processes, with much validating and saving."""
    return load_config(
        [TINY],
        [
            *(f"data.root={folder}/data", f"run_dir={folder}/{name}", f"evaluation.cache={folder}/{name}-cache"),
            *(f"tracking.uri=sqlite:///{folder}/{name}.db", f"hardware.strategy={strategy}", "hardware.threads=1"),
            *(f"hardware.devices={PROCESSES}", f"train.device_batch_size={4 // PROCESSES}"),
            *(f"train.max_steps={STEPS_A_KILL * kills}", "train.validate_every_steps=10", "checkpoint.every_steps=3"),
            f"preemption.restarts={kills + 1}",  # kills may come faster than checkpoints
        ],
    )


@click.command()
@click.option("--kills", type=click.IntRange(3), default=100, show_default=True)
@click.option("--strategy", type=click.Choice(["ddp", "fsdp"]), default="ddp", show_default=True)
@click.option("--seed", default=0, show_default=True, help="Of the moments and of which process is killed.")
def main(kills: int, strategy: str, seed: int) -> None:
    """Kill a run of two processes at random moments, and compare it with an undisturbed one."""
    began, dice = time.monotonic(), random.Random(seed)
    folder = Path(tempfile.mkdtemp(prefix="medsynth-soak-"))
    click.echo(f"in {folder}, which is removed if all is well")
    write_colonoscopy(folder / "data", images=40, seed=1, size=64)

    undisturbed = configured(folder, "undisturbed", strategy, kills)
    start = Start(undisturbed, folder / "undisturbed")
    start.wait(lambda: False)
    moments = draw_moments(kills, start, time.monotonic(), dice)
    disturbed = configured(folder, "disturbed", strategy, kills)
    record = disturb(disturbed, moments, dice, folder)
    print_record(record, disturbed.train.max_steps, time.monotonic() - began)
    try:
        missing = compare(Path(disturbed.run_dir), Path(undisturbed.run_dir))
    except AssertionError as error:
        raise click.ClickException(f"not as undisturbed: {error}") from error
    click.echo(f"as undisturbed, bit for bit; MLflow misses {missing} points")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
