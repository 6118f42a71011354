"""Two processes under every strategy have the weights, optimizer state and average of one, also after resumes."""

import os
import shutil

import pytest
import torch

from callbacks.checkpoint import DurableCheckpointIO, read_manifest
from datamodules.base import Conditions
from jobs.config import load_config
from jobs.runs import load_run
from jobs.train import train
from medsynth.errors import UserError
from tests.conftest import REPOSITORY
from tests.processes import together

TINY = REPOSITORY / "configs/tiny/msdm.yaml"
STRATEGIES = ("ddp", "fsdp")
SETTINGS = [
    "model.unet.dropout=0.0",  # its masks are drawn a process at a time
    "model.optim.schedule=linear",
    "model.optim.warmup_steps=10",  # the rate differs at every step
    "train.gradient_clip_norm=0.5",
    "train.validate_every_steps=2",
    "evaluation.images=4",
    "evaluation.grid=0",
    "checkpoint.every_steps=1",
    "ema.decay=0.9",
]


def run(_, phantom, folder, name, strategy, processes, steps):
    os.chdir(folder)
    machine = [f"hardware.devices={processes}", f"hardware.strategy={strategy}"]
    # Two micro-batches a step, whatever the number of processes.
    batch = [f"train.device_batch_size={4 // processes // 2}", f"train.max_steps={steps}"]
    places = [f"data.root={phantom}", f"run_dir={name}", f"tracking.uri=sqlite:///{name}.db", "evaluation.cache=cache"]
    train(load_config([TINY], [*SETTINGS, *machine, *batch, *places]))


def launch(phantom, folder, name, strategy, processes, steps):
    together(processes, run, phantom, folder, name, strategy, processes, steps, log=folder / f"{name}.log")
    return state(folder / name)


def state(run_dir):
    """Weights, average and moments of the last checkpoint, by name; and its number of steps."""
    path = run_dir / "checkpoints/last.ckpt"
    checkpoint = DurableCheckpointIO().load_checkpoint(path)
    moments = checkpoint["optimizer_states"][0]["state"]
    return {
        "weights": checkpoint["state_dict"],
        "average": checkpoint["callbacks"]["EMA"]["shadow"],
        "moments": {f"{i}.{key}": value for i, values in moments.items() for key, value in values.items()},
        "rates": {"lr": torch.tensor([group["lr"] for group in checkpoint["optimizer_states"][0]["param_groups"]])},
        "updates": {"updates": torch.tensor(checkpoint["callbacks"]["EMA"]["updates"])},
    }


def assert_close(left, right, **tolerance):
    for part in right:
        assert left[part].keys() == right[part].keys(), part
        for name, value in right[part].items():
            torch.testing.assert_close(
                left[part][name], value, **tolerance, msg=lambda m, n=name, p=part: f"{p} {n}: {m}"
            )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("strategies")


@pytest.fixture(scope="module")
def alone(phantom, folder):
    return launch(phantom, folder, "alone", "auto", 1, 3)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_and_their_resumes_are_one_process(phantom, folder, alone, strategy):
    whole = launch(phantom, folder, f"{strategy}-whole", strategy, 2, 3)
    assert_close(whole, alone, rtol=1e-4, atol=1e-6)

    launch(phantom, folder, f"{strategy}-first", strategy, 2, 1)
    shutil.copytree(folder / f"{strategy}-first", folder / f"{strategy}-elastic")
    resumed = launch(phantom, folder, f"{strategy}-first", strategy, 2, 3)
    assert_close(resumed, whole, rtol=0, atol=0)

    launch(phantom, folder, f"{strategy}-elastic", strategy, 1, 2)
    elastic = launch(phantom, folder, f"{strategy}-elastic", strategy, 2, 3)
    assert_close(elastic, alone, rtol=1e-4, atol=1e-6)

    manifest = read_manifest(folder / f"{strategy}-whole/checkpoints/last.ckpt")
    shards = [name for name in manifest["files"] if name.startswith("shard-")]
    assert len(shards) == (0 if strategy == "ddp" else 2)
    assert (folder / f"{strategy}-whole/export/unet/diffusion_pytorch_model.safetensors").is_file()
    pictures = load_run(folder / f"{strategy}-whole", "last")[0].sample(Conditions(["a polyp"]), [1])
    expected = load_run(folder / "alone", "last")[0].sample(Conditions(["a polyp"]), [1])
    torch.testing.assert_close(pictures, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["hardware.strategy=zero"], "fsdp"),
        (["hardware.strategy=deepspeed3", "hardware.precision=16-mixed"], "deepspeed3 with 32-true, bf16-mixed"),
    ],
)
def test_what_does_not_go_together_is_refused(settings, said):
    with pytest.raises(UserError, match=said):
        load_config([TINY], settings)


def test_a_strategy_that_the_method_has_not_is_refused_before_anything_is_begun(here, phantom):
    tiny = REPOSITORY / "configs/tiny/msdm_vae.yaml"
    machine = ["hardware.strategy=fsdp", "hardware.devices=2", "train.device_batch_size=2"]
    with pytest.raises(UserError, match="hardware.strategy=fsdp: msdm_vae trains with auto, ddp"):
        train(load_config([tiny], [*machine, f"data.root={phantom}", "run_dir=run"]))
    assert list(here.iterdir()) == []
