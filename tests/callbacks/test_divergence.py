"""Steps that are not finite: left out, counted, the end of a run; and nothing that is not finite is saved or shown."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from lightning.pytorch.plugins import MixedPrecision

os.environ.setdefault("DS_ACCELERATOR", "cpu")
import deepspeed  # noqa: F401 - here once instead of in each process

from callbacks import durable, finite
from callbacks.checkpoint import BestCheckpoint, CheckpointConfig, build_checkpoints
from callbacks.divergence import Diverged, Divergence
from callbacks.durable import DurableCheckpointIO, newest_verified, read_manifest
from callbacks.ema import EMA, EMAConfig
from jobs.run.config import HardwareConfig, load_config
from jobs.run.folder import load_weights
from jobs.run.strategies import trainer_options
from jobs.sample import main as sample
from jobs.tracking.server import mlflow_client
from jobs.tracking.spool import read_run_id
from jobs.train import train
from lightning_modules.base import to_image_range
from lightning_modules.msdm_vae import LatentCodecConfig, MSDMVAEConfig, MSDMVAEModule
from medsynth.errors import UserError
from metrics.images import quantise
from tests.callbacks.line import Line, fit, logged
from tests.callbacks.test_checkpoint import small_checkpoint
from tests.conftest import REPOSITORY
from tests.processes import together


def saving(folder: Path, tolerate: int = 20, every: int = 1) -> list:
    return [Divergence(tolerate, folder), *build_checkpoints(CheckpointConfig(every_steps=every), folder)]


def test_the_run_of_the_table_ends_in_one_line(phantom, here):
    """lr=1e30: weights that are finite and useless after the first step, and NaN whatever is computed with them."""
    tiny = REPOSITORY / "configs/tiny/msdm.yaml"
    settings = [f"data.root={phantom}", "train.max_steps=12", "train.validate_every_steps=4", "run_dir=run"]
    config = load_config([tiny], [*settings, "model.optim.lr=1e30", "ema.decay=0.5", "checkpoint.every_steps=4"])
    with pytest.raises(Diverged) as ended:
        train(config)
    said = str(ended.value)
    assert ended.value.exit_code == 2 and "\n" not in said
    assert "from step 2 to 12 the loss or its gradient was not finite" in said
    for mend in ("model.optim.lr", "train.gradient_clip_norm", "bf16-mixed", "no good checkpoint"):
        assert mend in said
    client = mlflow_client(f"sqlite:///{here}/mlruns.db")
    assert client.get_run(read_run_id(here / "run")).info.status == "FAILED"
    assert not (here / "run/export").exists()
    assert list((here / "run").glob("checkpoints/*.ckpt")) == []
    assert list((here / "run").glob("grids/*")) == []
    history = client.get_metric_history(read_run_id(here / "run"), "train/loss")
    assert [p.step for p in history] == list(range(1, 13)) and not math.isfinite(history[-1].value)


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_and_the_run_goes_on(tmp_path, how):
    module = Line(spoilt={3: how, 4: how})
    trainer = fit(module, tmp_path, *saving(tmp_path, tolerate=3), EMA(EMAConfig(decay=0.5)))
    assert trainer.global_step == 6
    assert module.after[2] == module.after[3] == module.after[4] != module.after[5]
    state = trainer.optimizers[0].state_dict()["state"]
    assert {float(values["step"]) for values in state.values()} == {4.0}
    assert all(torch.isfinite(moment).all() for values in state.values() for moment in values.values())
    assert math.isnan(logged(trainer, "train/loss")[3]) is (how == "loss")
    path, _ = newest_verified(tmp_path)
    assert read_manifest(path)["global_step"] == 6 and read_manifest(path)["finite"] is True


@pytest.mark.parametrize("tolerate", [1, 3, 8, 20])
def test_a_run_ends_after_so_many_steps_in_a_row_and_goes_on_from_before_them(tmp_path, tolerate):
    module = Line(spoilt=dict.fromkeys([2, *range(5, 60)], "gradient"))
    options = {"max_steps": 60, "val_check_interval": 3}
    good = 1 if tolerate == 1 else 4
    with pytest.raises(Diverged, match=f"last good checkpoint is {tmp_path}/last.ckpt of step {good}"):
        fit(module, tmp_path, *saving(tmp_path, tolerate), **options)
    steps = len(module.after)
    if tolerate == 1:  # of the lone step 2
        assert steps <= 4
        return
    assert 4 + tolerate <= steps <= 4 + tolerate + max(2, tolerate // 2)
    mended = Line()
    trainer = fit(mended, tmp_path, *saving(tmp_path), checkpoint=tmp_path / "last.ckpt")
    assert trainer.global_step == 6 and len(mended.after) == 2
    assert newest_verified(tmp_path)[0] is not None


def test_a_tolerance_below_one_is_refused():
    with pytest.raises(UserError, match="train.tolerate_nonfinite=0"):
        load_config([REPOSITORY / "configs/tiny/msdm.yaml"], ["train.tolerate_nonfinite=0"])


def test_a_run_whose_last_validation_is_not_finite_did_not_end_well(tmp_path):
    class Blind(Line):
        def losses(self, batch):
            losses = super().losses(batch)
            return losses if self.training else losses | {"loss": losses["loss"] * torch.inf}

    with pytest.raises(Diverged, match="val/loss after step 6 is not finite"):
        fit(Blind(), tmp_path, *saving(tmp_path, every=4), val_check_interval=6)
    assert read_manifest(tmp_path / "last.ckpt")["global_step"] == 4
    assert not (tmp_path / "best.ckpt").exists()


def test_what_the_scaler_of_float16_leaves_out_is_no_divergence(tmp_path):
    """Gradients times the first scales, 2^24 and half of it and so on, overflow."""
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**24))
    module = Line()
    trainer = fit(module, tmp_path, Divergence(2, tmp_path), plugins=[plugin], max_steps=20)
    assert module.after[0] == module.after[5] != [p.item() for p in module.parameters()]
    assert all(math.isfinite(loss) for loss in logged(trainer, "train/loss").values())
    with pytest.raises(Diverged):  # and a loss that is not finite is one
        fit(Line(spoilt=dict.fromkeys(range(4, 20), "loss")), tmp_path, Divergence(2, tmp_path), max_steps=20)


def _in_one_of_two(rank: int, folder: Path, strategy: str) -> None:
    module = Line(spoilt=dict.fromkeys(range(3, 30), "loss") if rank else {})
    hardware = HardwareConfig(accelerator="cpu", devices=2, strategy=strategy)
    options = trainer_options(hardware, []) | {"max_steps": 30}
    try:
        fit(module, folder / str(rank), *saving(folder / "checkpoints", tolerate=4), **options)
    except Diverged as ended:
        (folder / f"ended-{rank}").write_text(f"{len(module.after)} {module.after[-1]} {ended}")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "deepspeed2"])
def test_all_processes_end_at_one_step_with_one_state(tmp_path, strategy):
    together(2, _in_one_of_two, tmp_path, strategy, log=tmp_path / "log", seconds=60)
    first, second = ((tmp_path / f"ended-{rank}").read_text() for rank in (0, 1))
    assert first == second and f"{tmp_path}/checkpoints/last.ckpt of step 2" in first
    assert "nan" not in first.split("training diverged")[0]


def _with(where: str, value: float) -> dict:
    checkpoint = small_checkpoint(2)
    tensors = checkpoint["state_dict"] if where == "weight" else checkpoint["callbacks"]["EMA"]["shadow"]
    tensors["net.weight"][7] = value
    return checkpoint


@pytest.mark.parametrize("where", ["weight", "averaged weight"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_such_weights_are_not_saved_and_the_checkpoint_before_stays(tmp_path, where, value):
    io = DurableCheckpointIO()
    io.save_checkpoint(small_checkpoint(1), tmp_path / "last.ckpt")
    with pytest.raises(UserError, match=f"last.ckpt is not written: the {where} net.weight is not finite"):
        io.save_checkpoint(_with(where, value), tmp_path / "last.ckpt")
    assert read_manifest(tmp_path / "last.ckpt")["global_step"] == 1


def test_an_earlier_versions_checkpoint_of_such_weights_is_passed_over_and_refused(tmp_path, monkeypatch):
    io = DurableCheckpointIO()
    io.save_checkpoint(small_checkpoint(1), tmp_path / "best.ckpt")
    with monkeypatch.context() as before:  # it did not look, and left no mark
        before.setattr(durable, "first_not_finite", lambda checkpoint: None)
        before.setattr(durable, "_FINITE", "of another version")
        io.save_checkpoint(_with("averaged weight", math.nan), tmp_path / "last.ckpt")
    assert newest_verified(tmp_path) == (
        tmp_path / "best.ckpt", [(tmp_path / "last.ckpt", "the averaged weight net.weight is not finite")]
    )  # fmt: skip
    with pytest.raises(UserError, match="last.ckpt: the averaged weight net.weight is not finite"):
        load_weights(Line(), tmp_path / "last.ckpt")
    assert finite.first_not_finite(small_checkpoint(1)) is None


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_never_the_best(tmp_path, mode, value):
    best = BestCheckpoint(tmp_path / "best.ckpt", "eval/fid", mode)
    assert not best._is_better(value)
    best.load_state_dict({"monitor": "eval/fid", "mode": mode, "value": value})  # as earlier versions may have it
    assert best._is_better(3.0) and not best._is_better(value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_such_a_pixel_is_refused_and_never_black_or_white(value):
    images = torch.full((1, 3, 2, 2), 0.5)
    assert (quantise(images) == 128).all()
    images[0, 1, 1, 0] = value
    with pytest.raises(UserError, match="hold values that are not finite") as refused:
        quantise(images)
    assert "\n" not in str(refused.value)
    decoded = torch.tensor([-2.0, 0.0, 2.0, value])
    assert to_image_range(decoded)[:3].tolist() == [0.0, 0.5, 1.0] and to_image_range(decoded)[3].isnan()


def test_pictures_that_are_not_finite_are_neither_shown_nor_scored_and_training_goes_on(phantom, here, monkeypatch):
    """As of a decoder that overflows: the losses are fine."""
    from lightning_modules.msdm import MSDM

    settings = [f"data.root={phantom}", "run_dir=run", "checkpoint.monitor=val/loss", "train.max_steps=2"]
    with monkeypatch.context() as spoilt:
        spoilt.setattr(MSDM, "decode", lambda self, z: torch.full((len(z), 3, 32, 32), torch.nan))
        with pytest.warns(UserWarning, match="after step 2 are not finite: they are neither shown nor scored"):
            train(load_config([REPOSITORY / "configs/tiny/msdm.yaml"], settings))
        result = CliRunner().invoke(sample, ["run", "--prompt", "a polyp", "--count", "1", "--out", "drawn"])
        assert isinstance(result.exception, UserError) and "hold values that are not finite" in str(result.exception)
    assert list(Path("drawn").glob("*.png")) == [] and list(Path("run/grids").glob("*")) == []
    events = [json.loads(line) for line in Path("run/tracking/events.jsonl").read_text().splitlines()]
    assert not [event for event in events if any(key.startswith("eval/") for key in event.get("values", ()))]


def test_running_statistics_outlive_such_a_step():
    codec = LatentCodecConfig(latent_channels=4, widths=[8, 8], norm_groups=4)
    module = MSDMVAEModule(MSDMVAEConfig(codec=codec, perceptual_weight=0.0))
    module.configure_model()
    module.train()
    z = torch.randn(4, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    module._track(z)
    before = {name: buffer.clone() for name, buffer in module.codec.statistics.named_buffers()}
    torch.testing.assert_close(before["running_mean"], 0.01 * z.mean((0, 2, 3)))
    z[0, 0, 0, 0] = torch.nan
    module._track(z)
    for name in ("running_mean", "running_var"):
        assert torch.equal(getattr(module.codec.statistics, name), before[name])
