"""Runs of several processes through torchrun: the same samples, weights and scores as one process."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from jobs.tracking import mlflow_client, read_run_id
from tests.conftest import REPOSITORY

SETTINGS = [
    "train.global_batch_size=12",
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
        program = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m", "jobs.train"]
    else:
        program = ["-m", "jobs.train"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, *program, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return mlflow_client(f"sqlite:///{folder}/mlruns.db").get_run(read_run_id(run)).data.metrics


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


def test_the_pictures_scored_are_the_same_for_any_number_of_processes(runs, phantom):
    """From the same weights: one process resumes the finished run of three and scores again, to 1e-5."""
    folder, metrics = runs
    before = metrics[3]["eval/fd_random"]
    code = f"""
import json
from pathlib import Path
import lightning as L
from callbacks.evaluation import Evaluation
from callbacks.ema import EMA
from jobs.config import instantiate
from jobs.runs import build_data, load_run
module, config = load_run(Path({str(folder / "run-3")!r}), "last")
data, _ = build_data(config, module)
evaluation = Evaluation(instantiate(config, "evaluation"), Path("again"), config.seed)
trainer = L.Trainer(accelerator="cpu", logger=False, callbacks=[evaluation], enable_progress_bar=False,
                    use_distributed_sampler=False, enable_checkpointing=False)
print(json.dumps(trainer.validate(module, data, verbose=False)[0]))
"""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    after = json.loads(result.stdout.strip().splitlines()[-1])["eval/fd_random"]
    assert after == pytest.approx(before, rel=1e-5)
