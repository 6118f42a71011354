"""Signals to a run: it saves, leaves with exit code 75, and goes on exactly where it was; and it never hangs."""

import errno
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from safetensors.torch import load_file

import callbacks.durable
import jobs.run.folder
from callbacks.checkpoint import LastCheckpoint
from callbacks.durable import read_manifest
from callbacks.ema import EMA
from callbacks.preemption import (
    ATTEMPTS_FILE,
    DifferentCheckpoints,
    NoProgress,
    Preempted,
    Preemption,
    PreemptionConfig,
    StopRequest,
)
from callbacks.scoring import Scoring
from jobs import cli
from jobs.run.config import load_config
from jobs.tracking.server import mlflow_client
from jobs.tracking.spool import read_run_id
from jobs.train import train
from lightning_modules.base import GenerativeModule
from medsynth.errors import UserError
from tests.conftest import REPOSITORY
from tests.processes import FORK, begin, together

TINY = REPOSITORY / "configs/tiny/msdm.yaml"
SETTINGS = [
    "train.max_steps=6", "train.validate_every_steps=3", "train.device_batch_size=2", "evaluation.images=4",
    "evaluation.grid=0", "evaluation.cache=cache", "checkpoint.every_steps=100", "checkpoint.monitor=val/loss",
    "hardware.threads=1", "data.validation_images=2",  # each of them with nine prompts
]  # fmt: skip


def configured(phantom: Path, run_dir: str, *settings: str):
    return load_config([TINY], [f"data.root={phantom}", f"run_dir={run_dir}", *SETTINGS, *settings])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, phantom) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train(configured(phantom, "run"))
    return folder / "run"


def disturb(patch: pytest.MonkeyPatch, owner: Any, method: str, call: int, disturbance: Callable[[], None]) -> None:
    """Let something happen before the `call`-th call of a method."""
    original, calls = getattr(owner, method), []

    def disturbed(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            disturbance()
        return original(*args, **kwargs)

    patch.setattr(owner, method, disturbed)


def signal_at(patch: pytest.MonkeyPatch, owner: Any, method: str, call: int, *numbers: signal.Signals) -> None:
    """Send this process the signals before the `call`-th call of a method."""

    def send() -> None:
        for number in numbers or (signal.SIGUSR1,):
            os.kill(os.getpid(), number)
        time.sleep(0.1)  # the thread that listens has heard of it

    disturb(patch, owner, method, call, send)


def forked(work: Callable[[], None], log: Path = Path("log"), seconds: float = 120) -> int:
    """Do `work` in a process of its own; its exit code. What it says is in `log`."""

    def child() -> None:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        work()

    process = FORK.Process(target=child)
    process.start()
    process.join(seconds)
    process.kill()
    process.join()
    return process.exitcode


def preempt(phantom: Path, *place) -> None:
    with pytest.MonkeyPatch.context() as patch:
        signal_at(patch, *place)
        with pytest.raises(Preempted) as left:
            train(configured(phantom, "run"))
    assert left.value.code == (130 if signal.SIGINT in place[3:] else 75)


def check_like_undisturbed(run: Path, undisturbed: Path) -> None:
    """Both checkpoints bit for bit, and every value that was logged, each of them once."""
    for checkpoint in ("last.ckpt", "best.ckpt"):
        ours, theirs = (folder / "checkpoints" / checkpoint for folder in (run, undisturbed))
        check_same(ours, theirs)
    assert metrics(run) == metrics(undisturbed)


def check_same(left: Path, right: Path) -> None:
    """Two checkpoints have the same weights, averages, optimizer, learning rate, progress and best value."""
    for file in ("weights", "ema"):
        ours, theirs = (load_file(folder / f"{file}.safetensors") for folder in (left, right))
        assert ours.keys() == theirs.keys()
        assert all((ours[key] == theirs[key]).all() for key in theirs), f"{left}: {file}"
    ours, theirs = (torch.load(folder / "state.pt", weights_only=True) for folder in (left, right))
    for key in ("optimizer_states", "lr_schedulers", "global_step", "MedVQAGI"):
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=0)
    for key in ("EMA", "Evaluation", "BestCheckpoint"):
        assert ours["callbacks"][key] == theirs["callbacks"][key]
    assert read_manifest(left).get("metric") == read_manifest(right).get("metric")
    ours, theirs = (dict(state["loops"]["fit_loop"]) for state in (ours, theirs))
    for progress in (ours, theirs):
        progress.pop("epoch_loop.val_loop.batch_progress")  # also counts the batches of a validation broken off
    assert ours == theirs


def metrics(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Every logged value by step, but for those that tell of time."""
    client = mlflow_client(f"sqlite:///{run.parent}/mlruns.db")
    run_id = read_run_id(run)
    names = [name for name in client.get_run(run_id).data.metrics if name.startswith(("train/", "val/", "eval/"))]
    histories = {name: client.get_metric_history(run_id, name) for name in names if "second" not in name}
    return {name: [(point.step, point.value) for point in history] for name, history in histories.items()}


def statuses(run: Path) -> list[str]:
    """All that were ever told to MLflow, in order."""
    events = [json.loads(line) for line in (run / "tracking/events.jsonl").read_text().splitlines()]
    return [event["status"] for event in events if event["kind"] == "status"]


def status(run: Path) -> str:
    return mlflow_client(f"sqlite:///{run.parent}/mlruns.db").get_run(read_run_id(run)).info.status


PLACES: dict[str, tuple] = {
    "after a step": (EMA, "_update", 2),
    "after a step that a validation follows": (EMA, "_update", 3),
    "before the first step": (Preemption, "on_fit_start", 1),
    "within an accumulation": (GenerativeModule, "training_step", 7),
    "in a validation": (Preemption, "on_validation_batch_end", 1),
    "in the last validation": (Preemption, "on_validation_start", 2),
    "while pictures are drawn": (Scoring, "_load_reference", 1),
    "by SIGTERM": (EMA, "_update", 4, signal.SIGTERM),
    "at the keyboard": (EMA, "_update", 4, signal.SIGINT),
    "by both signals at once": (EMA, "_update", 4, signal.SIGUSR1, signal.SIGTERM),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_run_stopped_anywhere_goes_on_as_if_it_had_not_been(place, undisturbed, phantom, here):
    """Weights, average, learning rate, losses and scores, each of them logged once."""
    preempt(phantom, *PLACES[place])
    assert status(here / "run") == "KILLED"
    train(configured(phantom, "run"))
    check_like_undisturbed(here / "run", undisturbed)
    assert status(here / "run") == "FINISHED"
    assert "FAILED" not in statuses(here / "run")
    assert not (here / "run" / ATTEMPTS_FILE).exists()


def test_a_run_that_is_interrupted_at_the_keyboard_has_not_failed(phantom, here):
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        disturb(patch, EMA, "_update", 2, interrupt)
        with pytest.raises(SystemExit):
            train(configured(phantom, "run"))
    assert status(here / "run") == "KILLED"
    assert "FAILED" not in statuses(here / "run")


def killed_at(owner: type, method: str, call: int, phantom: Path, *settings: str) -> None:
    """Train in a process that ends, as by SIGKILL, before the `call`-th call of a method."""

    def work() -> None:
        with pytest.MonkeyPatch.context() as patch:
            disturb(patch, owner, method, call, lambda: os._exit(9))
            train(configured(phantom, "run", *settings))

    assert forked(work) == 9


KILLS: dict[str, tuple] = {
    "within an accumulation": (GenerativeModule, "training_step", 9),
    "after a save": (Preemption, "on_train_batch_end", 6),
    "between a save and the validation due": (Preemption, "on_validation_start", 1),
    "in the validation after a save": (Preemption, "on_validation_batch_end", 2),
    "while pictures are drawn after a save": (Scoring, "_load_reference", 1),
    "after the best was saved": (LastCheckpoint, "on_validation_end", 1),
    "in the save after a validation": (callbacks.durable, "_put_in_place", 3),
    "between the last save and the last validation": (Preemption, "on_validation_start", 2),
    "after the last validation": (Preemption, "on_train_end", 1),
}


@pytest.mark.parametrize("place", KILLS)
def test_a_run_killed_anywhere_goes_on_from_its_last_checkpoint(place, undisturbed, phantom, here):
    """Saves and validations fall on the same steps: what is due after a save is done by whoever resumes from it."""
    killed_at(*KILLS[place], phantom, "checkpoint.every_steps=3")
    assert statuses(here / "run") == ["RUNNING"]
    train(configured(phantom, "run", "checkpoint.every_steps=3"))
    check_like_undisturbed(here / "run", undisturbed)
    assert status(here / "run") == "FINISHED"


def test_the_validation_that_ends_an_epoch_is_done_however_often_it_is_killed(phantom, here):
    """Two epochs of four steps; the second validation is the run's end."""
    epochs = ["train.max_steps=null", "train.max_epochs=2", "train.validate_every_steps=null", "evaluation.images=0"]
    epochs += ["train.global_batch_size=64", "train.device_batch_size=32", "checkpoint.every_steps=4"]
    train(configured(phantom, "undisturbed", *epochs))
    killed_at(Preemption, "on_validation_start", 1, phantom, *epochs)
    killed_at(Preemption, "on_validation_batch_end", 1, phantom, *epochs)
    killed_at(Preemption, "on_validation_start", 2, phantom, *epochs)
    assert read_manifest("run/checkpoints/last.ckpt")["global_step"] == 8
    train(configured(phantom, "run", *epochs))
    assert len(metrics(here / "run")["val/loss"]) == 2
    check_like_undisturbed(here / "run", here / "undisturbed")


def test_a_validation_that_is_done_is_not_done_again(undisturbed, phantom, here):
    train(configured(phantom, "run", "train.max_steps=3"))
    train(configured(phantom, "run"))
    check_like_undisturbed(here / "run", undisturbed)


def test_a_signal_during_a_save_is_answered_after_it(undisturbed, phantom, here):
    with pytest.MonkeyPatch.context() as patch:
        signal_at(patch, callbacks.durable, "_put_in_place", 1)
        with pytest.raises(Preempted):
            train(configured(phantom, "run", "checkpoint.every_steps=2"))
    assert read_manifest("run/checkpoints/last.ckpt")["global_step"] in (2, 3)
    train(configured(phantom, "run", "checkpoint.every_steps=2"))
    check_like_undisturbed(here / "run", undisturbed)


def on_full_disk(save: Callable[..., None]) -> Callable[..., None]:
    def saving(*args) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
        try:
            save(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    return saving


def refuse(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(("on_error", "code"), [("continue", 75), ("stop", 2)])
def test_a_run_that_cannot_save_when_it_is_asked_to_leave(on_error, code, undisturbed, phantom, here):
    """It goes on from the checkpoint before; where a failed save ends a run, it is not started again."""
    settings = ["checkpoint.every_steps=1", f"checkpoint.on_error={on_error}"]

    def work() -> None:
        with pytest.MonkeyPatch.context() as patch:
            signal_at(patch, EMA, "_update", 4)
            patch.setattr(Preemption, "_save", on_full_disk(Preemption._save))
            try:
                train(configured(phantom, "run", *settings))
            except UserError as error:
                assert "last.ckpt could not be written" in str(error)
                sys.exit(error.exit_code)

    def start_again() -> None:
        with pytest.MonkeyPatch.context() as patch:
            signal_at(patch, EMA, "_update", 1)
            patch.setattr(Path, "write_text", refuse)
            train(configured(phantom, "run", *settings))

    assert forked(work) == code
    if code == 75:
        assert forked(start_again) == 75, "the disk is still full when it comes back"
    assert read_manifest("run/checkpoints/last.ckpt")["global_step"] == 4
    train(configured(phantom, "run"))
    check_like_undisturbed(here / "run", undisturbed)


def test_a_run_that_comes_no_further_stops_with_the_reason(phantom, here):
    for _ in range(3):
        preempt(phantom, Preemption, "on_fit_start", 1)
    with pytest.raises(
        NoProgress, match=r"started 4 times from step 0 without coming further.*Remove run/attempts.json"
    ):
        train(configured(phantom, "run"))
    assert NoProgress("").exit_code == 76
    assert status(here / "run") == "FAILED"
    Path("run", ATTEMPTS_FILE).unlink()
    train(configured(phantom, "run"))


def test_progress_starts_the_count_anew(phantom, here):
    attempts = Path("run", ATTEMPTS_FILE)
    for step in (1, 2):
        preempt(phantom, EMA, "_update", 1)
        assert read_manifest("run/checkpoints/last.ckpt")["global_step"] == step
        assert json.loads(attempts.read_text()) == {"step": step - 1, "starts": 1}


# Real processes


def started(phantom: Path, *settings: str) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "jobs.train",
        str(TINY),
        f"data.root={phantom}",
        "run_dir=run",
        *SETTINGS,
        *settings,
    ]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def wait_until(condition: Callable[[], bool], seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def test_processes_leave_together_and_never_hang(undisturbed, phantom, here):
    """Two processes: one is asked and both leave, at one step; one is stopped and the other still ends in time."""
    two = ["hardware.devices=2", "hardware.strategy=ddp", "train.device_batch_size=1", "train.max_steps=100000"]
    two += ["train.validate_every_steps=100000", "checkpoint.every_steps=5", "preemption.grace_seconds=5"]
    process = started(phantom, *two)
    wait_until(Path("run/checkpoints/last.ckpt").exists)
    child = int(subprocess.check_output(["pgrep", "-P", str(process.pid), "-f", "jobs.train"], text=True).split()[0])
    os.kill(child, signal.SIGUSR1)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert output.count("saving at the end of this step") == 1
    step = read_manifest("run/checkpoints/last.ckpt")["global_step"]
    assert step > 0

    log = here / "log"
    children = begin(2, lambda _: train(configured(phantom, "run", *two)), log=log)
    try:
        wait_until(lambda: read_manifest("run/checkpoints/last.ckpt")["global_step"] > step)
        os.kill(children[1].pid, signal.SIGSTOP)
        os.kill(children[0].pid, signal.SIGUSR1)
        children[0].join(30)
        said = log.with_name("log.0").read_text()
        assert "5 s after SIGUSR1: leaving without saving" in said
        assert children[0].exitcode == 143, said
    finally:
        for child in children:
            child.kill()
    assert read_manifest("run/checkpoints/last.ckpt")["global_step"] > step


def come_back(rank: int, phantom: Path) -> None:
    two = ["hardware.devices=2", "hardware.strategy=ddp", "train.device_batch_size=1", "train.max_steps=8"]
    with pytest.raises(DifferentCheckpoints, match="rank 0 goes on from step 6, rank 1 from step 0: run_dir must be"):
        os.chdir(f"machine{rank}")
        train(configured(phantom, "run", *two))


def test_processes_that_came_back_from_different_checkpoints_are_refused(undisturbed, phantom, here):
    """One machine has a folder of its own: here the second, where there is no checkpoint."""
    Path("machine1").mkdir()
    shutil.copytree(undisturbed, "machine0/run")
    together(2, come_back, phantom, log=Path("log").absolute())


def test_a_run_that_has_saved_says_so_when_its_time_is_up(undisturbed, phantom, here):
    """Its MLflow never answers: the run leaves with 75 as if all had been sent, which the next start does."""
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        server = f"tracking.uri=http://127.0.0.1:{deaf.getsockname()[1]}"

        def work() -> None:
            with pytest.MonkeyPatch.context() as patch:
                signal_at(patch, EMA, "_update", 2)
                train(configured(phantom, "run", server, "tracking.timeout_seconds=100", "preemption.grace_seconds=6"))

        assert forked(work) == 75
    last = Path("log").read_text().splitlines()[-1]
    assert last.endswith(
        "6 s after SIGUSR1: saved, leaving at once; what has not reached MLflow is sent at the next start"
    )
    assert read_manifest("run/checkpoints/last.ckpt")["global_step"] == 2
    train(configured(phantom, "run"))
    check_like_undisturbed(here / "run", undisturbed)
    assert list(dict.fromkeys(statuses(here / "run"))) == ["RUNNING", "KILLED", "FINISHED"]


def test_a_second_signal_ends_at_once(phantom, here):
    """The main thread is busy for long: it neither saves nor hears."""
    code = (
        "import time\n"
        "from callbacks.preemption import StopRequest\n"
        "with StopRequest(100).listening():\n"
        "    print('ready', flush=True)\n"
        "    while True: time.sleep(1)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR1)
    time.sleep(2.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=5) == 143
    lines = process.stderr.read().splitlines()
    assert lines[0] == "medsynth: SIGUSR1: saving at the end of this step, then leaving"
    assert lines[1].startswith("medsynth: second signal, SIGTERM: leaving without saving")


def test_a_second_ctrl_c_ends_at_once_however_soon_it_comes(here):
    def work() -> None:
        request = StopRequest(100)
        with request.listening():
            request.training = True
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.1)
            time.sleep(60)  # a step that takes long

    assert forked(work, seconds=20) == 130
    lines = Path("log").read_text().splitlines()
    assert lines[0] == "medsynth: SIGINT: saving at the end of this step, then leaving; once more ends it at once"
    assert lines[1].startswith("medsynth: second signal, SIGINT: leaving without saving")
    assert len(lines) == 2


def test_ctrl_c_before_training_ends_at_once_and_leaves_nothing(phantom, here):
    with pytest.MonkeyPatch.context() as patch:
        signal_at(patch, jobs.run.folder, "build_data", 1, signal.SIGINT)
        with pytest.raises(Preempted) as left:
            train(configured(phantom, "run"))
    assert left.value.code == 130
    assert list(here.iterdir()) == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def agree(rank: int) -> None:
    """Only the first process has heard Ctrl-C; all leave at one step, and alike."""
    torch.distributed.init_process_group("gloo")
    request = StopRequest(100)
    preemption = Preemption(PreemptionConfig(), request, Path("run"), Path("last.ckpt"))
    preemption._group = torch.distributed.new_group(backend="gloo")
    assert not preemption._agree()
    if rank == 0:
        request._receive(signal.SIGINT)
    assert not preemption._tell(), "what was told one step before"
    assert preemption._tell()
    assert request.exit_code == 130
    if rank == 0:
        request._deadline.cancel()
    torch.distributed.destroy_process_group()


def test_all_processes_leave_alike_where_one_hears_ctrl_c(here):
    together(2, agree, log=here / "log")


@pytest.mark.parametrize("imported", [True, False])
def test_ctrl_c_ends_any_command_without_a_traceback(imported, here):
    """Within the command, or while its module is still imported."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    def work() -> None:
        sys.argv, sys.stderr = ["medsynth"], Path("said").open("w")  # noqa: SIM115
        cli.run_command(click.Command("sample", callback=interrupt) if imported else interrupt, "medsynth")

    assert forked(work) == 130
    assert Path("said").read_text().split() == ["medsynth:", "interrupted"]


def test_a_process_that_is_leaving_keeps_its_exit_code():
    """srun sends SIGTERM to all processes of a step once the first of them has left."""
    code = (
        "import atexit, os, signal, sys, click\n"
        "from jobs.cli import run_command\n"
        "atexit.register(os.kill, os.getpid(), signal.SIGTERM)\n"
        "run_command(click.Command('train', callback=lambda: sys.exit(75)), 'train')\n"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 75


def test_children_leave_signals_to_their_parent():
    """A batch system signals every process of a job: a DataLoader's worker must not end before the run has saved."""
    from torch.utils.data import DataLoader

    from datamodules.base import leave_signals_to_the_parent

    request = StopRequest(100)
    with request.listening():
        loader = DataLoader(range(8), num_workers=2, worker_init_fn=leave_signals_to_the_parent)
        batches = iter(loader)
        next(batches), next(batches)  # one of each worker: both have begun
        workers = [worker.pid for worker in batches._workers]
        for pid in workers:
            os.kill(pid, signal.SIGUSR1)
            os.kill(pid, signal.SIGTERM)
            os.kill(pid, signal.SIGINT)
        assert len(list(batches)) == 6
        assert not request.requested, "what came to a child is not the parent's"
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
