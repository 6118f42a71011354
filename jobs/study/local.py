"""A study on this machine: its runs one after the other, each in a process of its own."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import click
from omegaconf import DictConfig

from jobs.run.config import to_yaml
from jobs.study.plan import Run, all_runs, runs_of
from jobs.study.progress import Progress
from jobs.study.read import Stage, Study
from jobs.study.record import Record, State, claim, note, read_record
from jobs.study.report import report
from jobs.study.tracked import tracked
from medsynth.exit_codes import INTERRUPTED, PREEMPTED
from medsynth.files import write_whole
from medsynth.owner import RESTARTED, Owner

PLANNED = "sweep.yaml"
"""In a run's folder: the config that the study has given it."""


def launch(config: Path, again: bool) -> int:
    """Train a config in a process of its own; its exit code, negative where a signal killed it.

    SIGTERM and SIGUSR1 are passed on. Ctrl-C comes to both by the terminal: the training saves, and is waited for.
    again: whether it has been started before, and may still be leaving.
    """
    asked: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        if child is not None:
            child.send_signal(number)

    with _handling({signal.SIGTERM: pass_on, signal.SIGUSR1: pass_on, signal.SIGINT: lambda *_: asked.append(0)}):
        command = [sys.executable, "-m", "jobs.train", str(config)]
        environment = os.environ | ({RESTARTED: "1"} if again else {})
        child = subprocess.Popen(command, env=environment, preexec_fn=_leave_with_parent)
        for number in filter(None, list(asked)):  # it came before there was a child
            child.send_signal(number)
        code = child.wait()
    if asked and code < 0:  # before python listened: nothing was lost
        return INTERRUPTED if 0 in asked else PREEMPTED
    return code


def _leave_with_parent() -> None:
    """On Linux a training whose sweep is killed saves and leaves, too: the next start would find the run in use."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


# Found before there is a child, in which little may be done.
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


@contextmanager
def _handling(handlers: dict[signal.Signals, Callable[[int, FrameType | None], Any]]):
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class LocalStudy(Progress):
    """The runs of a study, begun and resumed here."""

    def train(self) -> None:
        """Train what is not done, stage by stage, and report.

        Raises:
            UserError: a stage has no best, for its runs failed or have no score.
            SystemExit: with the code of a run that was asked to leave.
        """
        first = next(iter(self.configs.values()))
        with Owner(self.study.folder, "folder") as owner:
            owner.claim()
            claim(self.study)
            with tracked(self.study, first.tracking, to_its_end=not self.only) as tracker:
                try:
                    for number, stage in enumerate(self.study.stages, 1):
                        self._train_stage(number, stage)
                finally:
                    report(self.study, self.records(), self.best_labels(), tracker)

    def _train_stage(self, number: int, stage: Stage) -> None:
        runs = runs_of(self.study, stage)
        chosen = [run for run in runs if self.meant(run)]
        configs = {run.label: self.config(run) for run in chosen}  # all of them, before the first is trained
        for place, run in enumerate(runs, 1):
            if run in chosen:
                title = f"{self.study.name}: stage {number} of {len(self.study.stages)}, {stage.name}"
                self._train_run(f"{title} · run {place} of {len(runs)}, {run.label}", run, configs[run.label])
        if not self.only:
            self.finish(stage)

    def _train_run(self, title: str, run: Run, config: DictConfig) -> None:
        before = read_record(run)
        if before.state is State.DONE:
            click.echo(f"{title}: is done")
            return
        if before.state is State.FAILED and self.skip_failed:
            click.echo(f"{title}: failed and is left out ({before.reason})")
            return
        how = "begins" if before.state is State.WAITING else "goes on"
        click.secho(f"{title}: {how}{self._time_left()}", bold=True)
        note(run, self.study, failed=None)
        write_whole(run.run_dir / PLANNED, to_yaml(config))
        began = time.monotonic()
        code = launch(run.run_dir / PLANNED, again=before.state is not State.WAITING)
        note(run, self.study, seconds=round((before.seconds or 0) + time.monotonic() - began, 1))
        if code in (PREEMPTED, INTERRUPTED):
            click.echo(f"{title}: left; the same command goes on")
            raise SystemExit(code)
        if code:
            said = f"ended with exit code {code}" if code > 0 else f"was ended by signal {-code}"
            note(run, self.study, failed=said)
            click.echo(f"{title}: failed, {read_record(run).reason}")

    def _time_left(self) -> str:
        """What the runs that are done have taken, times those that are not; nothing before one is done."""
        records = {run.label: read_record(run) for run in all_runs(self.study)}
        seconds = time_left(self.study, records, [run for run in all_runs(self.study) if self.meant(run)])
        return "" if seconds is None else f"; about {timedelta(seconds=round(seconds))} left"


def time_left(study: Study, records: Mapping[str, Record], runs: Iterable[Run]) -> float | None:
    """Seconds that those of `runs` which are not done will take, each as the mean of those done in its stage, or of all
    those done; None before one is."""
    taken = {stage.name: _taken(study, stage, records) for stage in study.stages}
    every = [seconds for times in taken.values() for seconds in times]
    if not every:
        return None
    left = 0.0
    for run in runs:
        times, record = taken[run.stage.name] or every, records[run.label]
        if record.state is not State.DONE:
            left += max(0.0, sum(times) / len(times) - (record.seconds or 0.0))
    return left


def _taken(study: Study, stage: Stage, records: Mapping[str, Record]) -> list[float]:
    done = [records[run.label] for run in runs_of(study, stage) if records[run.label].state is State.DONE]
    return [record.seconds for record in done if record.seconds is not None]
