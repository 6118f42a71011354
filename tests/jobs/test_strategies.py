"""Two processes under every strategy have the weights, optimizer state and average of one, also after resumes."""

import os
import shutil

import pytest
import torch

os.environ.setdefault("DS_ACCELERATOR", "cpu")
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 - here once instead of in each process, for seconds

from callbacks.durable import DurableCheckpointIO, read_manifest
from datamodules.batches import Conditions
from jobs.run.config import load_config
from jobs.run.folder import build_data, build_module, load_run
from jobs.run.summary import estimate_memory, try_picture
from jobs.train import train
from lightning_modules.base import count_parameters
from medsynth.errors import UserError
from tests.conftest import REPOSITORY
from tests.lightning_modules.test_contract import tiny
from tests.processes import together

TINY = REPOSITORY / "configs/tiny/msdm.yaml"
STRATEGIES = ("ddp", "fsdp", "deepspeed2", "deepspeed3")
CUT = ("fsdp", "deepspeed3")  # which cut the weights of a method; deepspeed2 only what its optimizer holds
ROUNDED = {"rtol": 1e-4, "atol": 3e-6}  # sums in another order, of which Adam divides the nearly vanished by themselves
SETTINGS = [
    "model.unet.widths=[16,16]",  # DeepSpeed's part 3 takes time with the square of the number of modules
    "model.self_conditioning=0.0",  # and twice in a step that estimates first
    "model.unet.dropout=0.0",  # its masks are drawn a process at a time
    "model.optim.schedule=linear",
    "model.optim.warmup_steps=10",  # the rate differs at every step
    "train.gradient_clip_norm=0.5",
    "train.validate_every_steps=2",
    "data.validation_images=1",  # with nine prompts
    "train.max_epochs=100",  # to count their steps Lightning makes the loader early, before parts are loaded
    "evaluation.grid=0",
    "checkpoint.monitor=val/loss",
    "checkpoint.every_steps=1",
    "ema.decay=0.9",
]
BRIEF = [
    "train.validate_every_steps=2",
    "data.validation_images=1",
    "evaluation.images=0",
    "checkpoint.monitor=val/loss",
    "evaluation.grid=0",
    "checkpoint.monitor=val/loss",
    "ema.decay=0.9",
    "model.optim.eps=1e-4",  # else Adam makes whole steps of gradients that are 0 but for rounding
]


def run(_, phantom, folder, name, strategy, processes, steps, images):
    os.chdir(folder)
    machine = [f"hardware.devices={processes}", f"hardware.strategy={strategy}"]
    # Two micro-batches a step, whatever the number of processes.
    batch = [f"train.device_batch_size={4 // processes // 2}", f"train.max_steps={steps}"]
    places = [f"data.root={phantom}", f"run_dir={name}", f"tracking.uri=sqlite:///{name}.db", "evaluation.cache=cache"]
    train(load_config([TINY], [*SETTINGS, *machine, *batch, *places, f"evaluation.images={images}"]))


def launch(phantom, folder, name, strategy, processes, steps, images=0):
    """The state after `steps`; `images`: drawn and scored at each validation."""
    together(processes, run, phantom, folder, name, strategy, processes, steps, images, log=folder / f"{name}.log")
    return state(folder / name)


def learned(method, phantoms, folder, name, processes, *settings):
    """The state after two steps of a method's tiny config."""

    def learn(_):
        os.chdir(folder)
        places = [f"run_dir={name}", "tracking.uri=sqlite:///methods.db"]
        machine = [f"hardware.devices={processes}", f"train.device_batch_size={4 // processes}"]
        train(tiny(method, phantoms, *places, *BRIEF, *machine, *settings))

    if not (folder / name).exists():
        together(processes, learn, log=folder / f"{name}.log")
    return state(folder / name)


def gradient(moments):
    """The mean gradient, all in one vector."""
    return torch.cat([value.flatten() for name, value in moments.items() if name.endswith("exp_avg")])


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
    whole = launch(phantom, folder, f"{strategy}-whole", strategy, 2, 3, images=4)
    assert_close(whole, alone, **ROUNDED)

    launch(phantom, folder, f"{strategy}-first", strategy, 2, 1)
    shutil.copytree(folder / f"{strategy}-first", folder / f"{strategy}-elastic")
    resumed = launch(phantom, folder, f"{strategy}-first", strategy, 2, 3)
    assert_close(resumed, whole, rtol=0, atol=0)

    launch(phantom, folder, f"{strategy}-elastic", strategy, 1, 2)
    elastic = launch(phantom, folder, f"{strategy}-elastic", strategy, 2, 3)
    assert_close(elastic, alone, **ROUNDED)

    manifest = read_manifest(folder / f"{strategy}-whole/checkpoints/last.ckpt")
    shards = [name for name in manifest["files"] if name.startswith("shard-")]
    assert len(shards) == (0 if strategy == "ddp" else 2)
    assert (folder / f"{strategy}-whole/export/unet/diffusion_pytorch_model.safetensors").is_file()
    pictures = load_run(folder / f"{strategy}-whole", "last")[0].sample(Conditions(["a polyp"]), [1])
    expected = load_run(folder / "alone", "last")[0].sample(Conditions(["a polyp"]), [1])
    torch.testing.assert_close(pictures, expected, rtol=0, atol=1e-3)


# Kandinsky 3 has so many modules that it would take minutes under deepspeed3.
IN_PARTS = {
    "stable_diffusion": CUT, "stable_diffusion_lora": STRATEGIES[1:], "hypernetwork": CUT, "controlnet": CUT,
    "llcm": CUT, "kandinsky22_prior_whole": CUT, "kandinsky22_prior": CUT, "kandinsky22_decoder_whole": CUT,
    "kandinsky22_decoder": CUT, "kandinsky3_whole": ("fsdp",), "kandinsky3": ("fsdp",),
}  # fmt: skip


@pytest.mark.parametrize("method", IN_PARTS)
def test_each_method_learns_the_same_in_parts(method, phantoms, folder):
    """Two processes under each strategy that cuts weights, two steps: the weights of one process."""
    alone = learned(method, phantoms, folder, f"{method}-alone", 1)
    for strategy in IN_PARTS[method]:
        parts = learned(method, phantoms, folder, f"{method}-{strategy}", 2, f"hardware.strategy={strategy}")
        assert_close(parts, alone, **ROUNDED)


@pytest.mark.parametrize(
    ("strategy", "precision"),
    [("ddp", "bf16"), ("fsdp", "bf16"), ("fsdp", "16"), ("deepspeed2", "bf16"), ("deepspeed3", "bf16")],
)
def test_mixed_precision_keeps_the_trained_weights_in_float32(strategy, precision, phantoms, folder):
    """And computes in the narrower type: gradients differ from float32's by its rounding, neither more nor less."""
    alone = learned("stable_diffusion", phantoms, folder, "float32", 1)
    settings = [f"hardware.strategy={strategy}", f"hardware.precision={precision}-mixed"]
    mixed = learned("stable_diffusion", phantoms, folder, f"{strategy}-{precision}", 2, *settings)
    for part in ("weights", "average", "moments"):
        assert {tensor.dtype for tensor in mixed[part].values()} == {torch.float32}
    gradients, exact = (gradient(run["moments"]) for run in (mixed, alone))
    least, most = {"bf16": (3e-3, 3e-2), "16": (4e-4, 4e-3)}[precision]
    assert least < (gradients - exact).norm() / exact.norm() < most


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["hardware.strategy=zero"], "fsdp"),
        (["hardware.strategy=deepspeed3", "hardware.precision=16-mixed"], "deepspeed3 with 32-true, bf16-mixed"),
        (["hardware.strategy=deepspeed2", "hardware.compile=true"], "hardware.compile: not with .*deepspeed2"),
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


def test_the_estimated_memory_is_shared_among_the_processes(phantom):
    """A quarter each of 16 bytes a trained weight (its value, gradient and two moments), and of 4 for its average."""

    def estimated(strategy, devices):
        settings = [f"hardware.strategy={strategy}", f"hardware.devices={devices}", "train.device_batch_size=1"]
        config = load_config([TINY], [f"data.root={phantom}", *settings])
        module = build_module(config)
        module.configure_model()
        trial = try_picture(module, build_data(config, module)[0])
        return estimate_memory(module, trial, config), count_parameters(module)

    whole, (trained, frozen) = estimated("auto", 1)
    assert whole["weights"] == 4 * (trained + frozen)
    parts = {strategy: estimated(strategy, 4)[0] for strategy in STRATEGIES}
    state = {strategy: sum(part.values()) - part["activations"] - 4 * frozen for strategy, part in parts.items()}
    assert state == pytest.approx(
        {"ddp": 20 * trained, "fsdp": 5 * trained, "deepspeed2": 9 * trained, "deepspeed3": 6 * trained}, abs=32
    )


def test_a_discriminator_that_is_read_whole_is_not_cut(here, phantoms):
    settings = ["model.adversarial_weight=0.1", "model.discriminator_widths=[16,16]", "run_dir=run"]
    machine = ["hardware.strategy=fsdp", "hardware.devices=2", "train.device_batch_size=2"]
    with pytest.raises(UserError, match="hardware.strategy=fsdp: controlnet trains with auto, ddp, deepspeed2$"):
        train(tiny("controlnet", phantoms, *settings, *machine))
