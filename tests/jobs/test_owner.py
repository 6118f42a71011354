"""One owner of a run directory: a second start is refused, and a crash leaves nothing to be removed by hand."""

import errno
import fcntl
import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch

from jobs.run.config import load_config
from jobs.train import train
from medsynth import owner
from medsynth.errors import UserError
from medsynth.owner import OWNER_FILE, Owner
from tests.conftest import REPOSITORY
from tests.processes import FORK

TINY = REPOSITORY / "configs/tiny/msdm.yaml"


def hold(folder: Path, ready, seconds: float, heir: bool) -> None:
    """Hold `folder` in a process of its own, perhaps with a child beside it that outlives it."""
    with Owner(folder, "run_dir") as held:
        held.claim()
        if heir and os.fork() == 0:
            ready.send(os.getpid())
            time.sleep(60)
            os._exit(0)
        if not heir:
            ready.send(os.getpid())
        time.sleep(seconds)
    os._exit(0)


@pytest.fixture
def holder():
    """`holder(folder, …)` is a process that holds the folder, and the id of its child."""
    processes, children = [], []

    def start(folder: Path, seconds: float = 60, heir: bool = False):
        ours, theirs = FORK.Pipe()
        process = FORK.Process(target=hold, args=(folder, theirs, seconds, heir))
        process.start()
        processes.append(process)
        assert ours.poll(20)
        child = ours.recv()
        children.extend([child] if heir else [])
        return process, child

    yield start
    for process in processes:
        process.kill()
        process.join()
    for child in children:
        os.kill(child, signal.SIGKILL)


def test_a_second_owner_is_refused_in_one_line_that_names_the_first(holder, tmp_path):
    run = tmp_path / "runs/Study #3"
    process, _ = holder(run)
    with pytest.raises(UserError) as caught, Owner(run, "run_dir"):
        pass
    said = str(caught.value)
    assert said.startswith(f"run_dir={run} is in use by process {process.pid} on {socket.gethostname()}, since 20")
    assert said.endswith("; wait for its end, or choose another run_dir")
    assert "\n" not in said
    with Owner(run, "run_dir", active=False) as other:  # a process of the same run
        other.claim()


def test_a_killed_owner_leaves_no_lock_even_where_its_worker_lives_on(holder, tmp_path):
    process, worker = holder(tmp_path, heir=True)
    process.kill()
    process.join()
    os.kill(worker, 0)  # it is there
    with Owner(tmp_path, "run_dir"):
        assert json.loads((tmp_path / OWNER_FILE).read_text())["process"] == str(os.getpid())
    with Owner(tmp_path, "run_dir"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_made_before_the_claim(tmp_path):
    with Owner(tmp_path / "run", "run_dir") as owned:
        assert not (tmp_path / "run").exists()
        owned.claim()
        owned.claim()
        with pytest.raises(UserError, match="in use by process"), Owner(tmp_path / "run", "run_dir"):
            pass


def test_another_start_by_a_batch_system_waits_for_the_one_before(holder, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    holder(tmp_path, seconds=1)
    with Owner(tmp_path, "run_dir"):
        pass


def test_a_requeued_job_takes_over_from_its_own_earlier_start(holder, tmp_path, monkeypatch):
    """A node that was lost keeps its lock on a file server; Slurm knows that the start before is over."""
    monkeypatch.setattr(owner, "_PATIENCE", 0.3)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    holder(tmp_path)
    with pytest.raises(UserError, match="in use"), Owner(tmp_path, "run_dir"):
        pass  # the same start
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with Owner(tmp_path, "run_dir"):
        assert json.loads((tmp_path / OWNER_FILE).read_text())["process"] == str(os.getpid())
        monkeypatch.setenv("SLURM_JOB_ID", "18")
        with pytest.raises(UserError, match=f"process {os.getpid()} on"), Owner(tmp_path, "run_dir"):
            pass  # another job


def test_a_file_system_without_locks_gets_a_warning(tmp_path, monkeypatch):
    def refuse(*_) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match="its file system has no locks"), Owner(tmp_path, "run_dir"):
        pass


def configured(phantom: Path, *settings: str):
    return load_config([TINY], [f"data.root={phantom}", "run_dir=run", *settings])


def test_a_second_start_is_refused(holder, phantom, here):
    process, _ = holder(Path("run"))
    with pytest.raises(UserError, match=f"run_dir=run is in use by process {process.pid} on "):
        train(configured(phantom))
    assert [path.name for path in Path("run").iterdir()] == [OWNER_FILE]


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        (
            "checkpoint.monitor=val/los",
            "checkpoint.monitor=val/los: this run logs no such value; did you mean val/loss?",
        ),
        (
            "hardware.accelerator=gpu",
            "hardware.accelerator=gpu: torch finds none here; set it to cpu or auto",
        ),
        (
            "hardware.precision=16-mixed",
            "hardware.precision=16-mixed: a CPU does not train so; set it to 32-true or bf16",
        ),
        ("data.validation_images=100", "data.validation_images=100 leaves none"),
    ],
)
def test_what_cannot_be_trained_here_makes_nothing(setting, said, phantom, here):
    if "gpu" in setting and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError) as caught:
        train(configured(phantom, setting))
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["hardware.accelerator=gpu", "hardware.devices=9"], "hardware.devices=9: this machine has 2"),
        (["hardware.accelerator=auto", "hardware.devices=3"], "hardware.devices=3: this machine has 2"),
        (["hardware.precision=bf16-mixed"], "hardware.precision=bf16-mixed: V100 has no bfloat16; set it to 16-mixed"),
    ],
)
def test_a_machine_of_two_old_gpus_is_not_asked_for_more(settings, said, monkeypatch):
    from jobs.run.strategies import check_machine

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "V100")
    many = ["hardware.strategy=ddp", "train.global_batch_size=9", "train.device_batch_size=1"]
    config = load_config([TINY], ["hardware.accelerator=gpu", *many, *settings])
    with pytest.raises(UserError, match=said):
        check_machine(config.hardware)
