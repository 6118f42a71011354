"""Runs of several processes: the same samples, weights and scores as one; disturbed, as if they had not been."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import lightning as L
import pytest
import torch
from safetensors.torch import load_file

from callbacks.durable import read_manifest
from callbacks.evaluation import Evaluation
from callbacks.preemption import Preempted
from jobs.run.config import instantiate, load_arguments, load_config
from jobs.run.folder import build_data, load_run
from jobs.tracking.server import mlflow_client
from jobs.tracking.spool import read_run_id
from jobs.train import train
from lightning_modules.base import GenerativeModule
from tests.callbacks.test_preemption import check_like_undisturbed, disturb
from tests.conftest import REPOSITORY
from tests.processes import together

SETTINGS = [
    "train.global_batch_size=12",
    "data.validation_images=2",  # each of them with nine prompts
    "train.max_steps=3",
    "train.validate_every_steps=3",
    "evaluation.images=7",
    "evaluation.batch_size=2",
    "evaluation.grid=0",
    "model.unet.dropout=0.0",  # its masks are drawn a process at a time
    "ema.decay=0.9",
]


def launch(processes: int, phantom, folder, *settings: str) -> dict[str, float]:
    """Train the tiny msdm with `processes` and give its last metrics."""
    run = folder / f"run-{processes}"
    arguments = [str(REPOSITORY / "configs/tiny/msdm.yaml"), f"data.root={phantom}", f"run_dir={run}", *SETTINGS]
    arguments += [f"train.device_batch_size={12 // processes}", f"evaluation.cache={folder}/cache-{processes}"]
    arguments += [f"tracking.uri=sqlite:///{folder}/mlruns.db", *settings]
    if processes > 1:
        arguments += [f"hardware.devices={processes}", "hardware.strategy=ddp"]
    if processes == 2:
        by_torchrun(processes, arguments, folder)
    else:
        together(processes, learn, arguments, folder, log=folder / f"log-{processes}")
    return mlflow_client(f"sqlite:///{folder}/mlruns.db").get_run(read_run_id(run)).data.metrics


def by_torchrun(processes: int, arguments: list[str], folder: Path) -> None:
    program = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m", "jobs.train"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, *program, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]


def learn(_: int, arguments: list[str], folder: Path) -> None:
    os.chdir(folder)
    train(load_arguments(arguments))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, phantom):
    folder = tmp_path_factory.mktemp("distributed")
    return folder, {n: launch(n, phantom, folder) for n in (1, 2, 3)}


@pytest.mark.parametrize("processes", [2, 3])
def test_the_weights_are_those_of_one_process(runs, processes):
    folder, _ = runs
    for file in ("weights", "ema"):
        one, many = (load_file(folder / f"run-{n}/checkpoints/last.ckpt/{file}.safetensors") for n in (1, processes))
        for key, value in one.items():
            torch.testing.assert_close(many[key], value, rtol=1e-3, atol=2e-5, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("processes", [2, 3])
def test_the_scores_are_those_of_one_process(runs, processes):
    """Seven pictures do not divide by two or three."""
    _, metrics = runs
    names = [name for name in metrics[1] if name.startswith(("eval/", "val/"))]
    assert {"eval/fd_random", "eval/precision_random", "eval/kd_random", "val/loss"} <= set(names)
    for name in names:
        assert metrics[processes][name] == pytest.approx(metrics[1][name], rel=2e-3, abs=1e-6), name


def test_the_pictures_scored_are_the_same_for_any_number_of_processes(runs, monkeypatch):
    """From the same weights: one process resumes the finished run of three and scores again, to 1e-5."""
    folder, metrics = runs
    monkeypatch.chdir(folder)
    module, config = load_run(folder / "run-3", "last")
    data, _ = build_data(config, module)
    evaluation = Evaluation(instantiate(config, "evaluation"), Path("again"), config.seed)
    trainer = L.Trainer(
        accelerator="cpu", logger=False, callbacks=[evaluation], enable_progress_bar=False,
        use_distributed_sampler=False, enable_checkpointing=False,
    )  # fmt: skip
    after = trainer.validate(module, data, verbose=False)[0]["eval/fd_random"]
    assert after == pytest.approx(metrics[3]["eval/fd_random"], rel=1e-5)


# Two processes, each of two micro-batches a step, disturbed between them


PAIR = [
    "hardware.devices=2", "hardware.strategy=ddp", "train.device_batch_size=1", "train.max_steps=6",
    "train.validate_every_steps=3", "checkpoint.every_steps=2", "checkpoint.monitor=val/loss", "evaluation.images=4",
    "evaluation.grid=0", "evaluation.cache=cache", "ema.decay=0.9", "data.validation_images=2",
]  # fmt: skip


def pair(rank: int, phantom: Path, folder: Path, name: str, disturbance: str = "", step: int = 0) -> None:
    """Train in this process of two; what it trains on is appended to samples-<rank>.jsonl of the run.

    disturbance: "preempted", one of the two is asked to leave, or "killed", both end; between the batches of `step`.
    """
    os.chdir(folder)
    Path(name).mkdir(exist_ok=True)
    learn = GenerativeModule.training_step

    def recorded(self, batch, index):
        with Path(name, f"samples-{rank}.jsonl").open("a") as file:
            file.write(json.dumps([self.trainer.global_step, batch.seeds.tolist()]) + "\n")
        return learn(self, batch, index)

    def be_preempted() -> None:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.1)  # the thread that listens has heard of it

    def be_killed() -> None:
        time.sleep(0.5)  # what this process has sent reaches the other
        os._exit(0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GenerativeModule, "training_step", recorded)
        if disturbance:
            disturbances = {"preempted": be_preempted, "killed": be_killed}
            disturb(patch, GenerativeModule, "training_step", 2 * step, disturbances[disturbance])
        config = load_config(
            [REPOSITORY / "configs/tiny/msdm.yaml"], [f"data.root={phantom}", f"run_dir={name}", *PAIR]
        )
        if disturbance == "preempted":
            with pytest.raises(Preempted):
                train(config)
        else:
            train(config)


def samples(run: Path) -> dict[tuple[int, int], list[list[int]]]:
    """By process and step, the seeds of the step's two micro-batches as they were trained on last."""
    found: dict[tuple[int, int], list[list[int]]] = {}
    for rank in (0, 1):
        for line in (run / f"samples-{rank}.jsonl").read_text().splitlines():
            step, seeds = json.loads(line)
            found.setdefault((rank, step), []).append(seeds)
    return {place: batches[-2:] for place, batches in found.items()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, phantom) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    together(2, pair, phantom, folder, "run", log=folder / "log")
    return folder / "run"


@pytest.mark.parametrize(
    ("disturbance", "step", "saved"),
    [
        ("preempted", 4, 5),  # told at the end of step 4, acted on at the end of step 5
        ("preempted", 5, 6),  # likewise, before the validation that ends the run
        ("killed", 5, 4),
    ],
)
def test_two_processes_disturbed_within_an_accumulation_go_on_exactly(
    disturbance, step, saved, undisturbed, phantom, tmp_path
):
    """Bit for bit: weights, average, optimizer, learning rate, samples in their order, and all that was logged."""
    together(2, pair, phantom, tmp_path, "run", disturbance, step, log=tmp_path / "disturbed.log")
    assert read_manifest(tmp_path / "run/checkpoints/last.ckpt")["global_step"] == saved
    together(2, pair, phantom, tmp_path, "run", log=tmp_path / "resumed.log")
    check_like_undisturbed(tmp_path / "run", undisturbed)
    expected = samples(undisturbed)
    assert sorted(expected) == [(rank, done) for rank in (0, 1) for done in range(6)]
    assert samples(tmp_path / "run") == expected
