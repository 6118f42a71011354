"""What the contract gives a method that steps optimizers of its own, draws for classes, or compares its samples."""

import json
import re
import shutil
from pathlib import Path

import lightning as L
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from callbacks.ema import EMA, EMAConfig, load_ema_weights
from callbacks.samples import draw_grid, grid_rows
from datamodules.cytology import Cytology, CytologyConfig
from jobs.drawing.asked import _each_class
from jobs.run.config import load_config
from jobs.run.folder import build_data, build_module, load_weights
from jobs.run.registry import METHODS, Method
from jobs.run.strategies import trainer_options
from jobs.sample import main as sample
from jobs.train import check_support, train
from medsynth.errors import UserError
from tests.lightning_modules.small_methods import TwoPlayers
from tests.processes import together


@pytest.fixture
def config(monkeypatch, here, phantoms):
    """Of a run of `TwoPlayers` on pictures of two classes, which the registry knows meanwhile."""
    target = "tests.lightning_modules.small_methods:TwoPlayers"
    monkeypatch.setitem(METHODS, "two_players", Method(target, "test", "Two players"))
    (here / "two.yaml").write_text(
        "{method: two_players, run_dir: run, data: {name: cytology, template: null, filewords: class, resolution: 32,"
        " workers: 0, validation_images: 2}, evaluation: {images: 0, grid: 2}, hardware: {accelerator: cpu},"
        " train: {global_batch_size: 4, device_batch_size: 4, max_steps: 4, log_every_steps: 1,"
        " validate_every_steps: 4, gradient_clip_norm: 0.5}}"
    )
    return load_config(["two.yaml"], [f"data.root={phantoms['cytology']}"])


def logged(run: str, name: str) -> dict[int, float]:
    events = (json.loads(line) for line in Path(run, "tracking/events.jsonl").read_text().splitlines())
    return {e["step"]: e["values"][name] for e in events if name in e.get("values", ())}


def test_one_batch_is_one_step_and_both_players_resume_bit_for_bit(config, here):
    trainer = train(config)
    assert trainer.global_step == 4
    assert list(logged("run", "train/critic")) == [1, 2, 3, 4]
    assert logged("run", "lr/generator") == logged("run", "lr/critic") == dict.fromkeys([1, 2, 3, 4], 1e-2)
    assert list(logged("run", "val/loss")) == [4]
    config.run_dir, config.train.max_steps = "halves", 2
    train(config)
    config.train.max_steps = 4
    assert train(config).global_step == 4
    whole, halves = build_module(config), build_module(config)
    for module, run in ((whole, "run"), (halves, "halves")):
        module.configure_model()
        load_weights(module, here / run / "checkpoints/last.ckpt")
    for (name, a), b in zip(whole.state_dict().items(), halves.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_such_a_module_clips_each_of_its_players(config, monkeypatch):
    norms = []
    clip = TwoPlayers.clip_gradients

    def noting(self, optimizer, value, algorithm):
        clip(self, optimizer, value, algorithm)
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(torch.stack([grad.norm() for grad in grads]).norm()))

    monkeypatch.setattr(TwoPlayers, "clip_gradients", noting)
    config.train.max_steps = 2
    train(config)
    assert len(norms) == 4
    assert max(norms) == pytest.approx(0.5, rel=1e-3)


def test_micro_batches_are_refused_where_they_do_not_add_up(config):
    config.train.device_batch_size = 2
    with pytest.raises(UserError, match="device_batch_size=2: two_players takes each step over one batch.* set 4"):
        check_support(config, build_module(config))
    module = build_module(config)
    module.automatic_optimization = True
    check_support(config, module)
    module.loss_is_a_mean = False  # a contrastive loss compares the samples of a batch
    with pytest.raises(UserError, match="takes each step over one batch"):
        check_support(config, module)


def test_ddp_looks_for_weights_without_a_gradient_only_where_there_are_some(config):
    for wanted in (False, True):
        config.hardware.strategy, config.hardware.devices = "ddp", 2
        strategy = trainer_options(config.hardware, [], find_unused=wanted)["strategy"]
        assert strategy._ddp_kwargs["find_unused_parameters"] is wanted


def test_two_processes_learn_what_one_learns(config, here):
    train(config)
    settings = {"run_dir": "pair", "hardware.strategy": "ddp", "hardware.devices": 2, "train.device_batch_size": 2}
    pair = load_config(["two.yaml"], [f"data.root={config.data.root}", *(f"{k}={v}" for k, v in settings.items())])
    together(2, lambda rank: train(pair), log=here / "pair.log")
    alone, both = (build_module(config) for _ in range(2))
    for module, run in ((alone, "run"), (both, "pair")):
        module.configure_model()
        load_weights(module, here / run / "checkpoints/last.ckpt")
    for (name, a), b in zip(alone.named_parameters(), both.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


class Watch(L.Callback):
    """The largest singular value of the critic's first layer while the average stands in its place."""

    def on_validation_start(self, trainer, module):
        self.seen = float(torch.linalg.matrix_norm(module.critic[0].weight.detach(), 2))


def test_what_depends_on_the_weights_is_mended_after_an_average_is_swapped_in(config):
    """Spectral norm's vectors belong to the live weights: with the average's, sigma would not be 1."""
    module = build_module(config)
    module.configure_model()
    data, _ = build_data(config, module)
    ema, watch = EMA(EMAConfig(decay=0.9, warmup=False)), Watch()
    trainer = L.Trainer(
        accelerator="cpu", max_steps=12, callbacks=[ema, watch], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    assert watch.seen == pytest.approx(1, abs=1e-3)
    live = {name: buffer.clone() for name, buffer in module.named_buffers()}
    with ema.swapped():
        assert float(torch.linalg.matrix_norm(module.eval().critic[0].weight, 2)) == pytest.approx(1, abs=1e-3)
        assert any(not torch.equal(buffer, live[name]) for name, buffer in module.named_buffers())
    assert all(torch.equal(buffer, live[name]) for name, buffer in module.named_buffers())

    loaded = build_module(config)
    loaded.configure_model()
    load_ema_weights(loaded, ema.state_dict())
    assert float(torch.linalg.matrix_norm(loaded.eval().critic[0].weight, 2)) == pytest.approx(1, abs=1e-3)


REFUSED = {
    ("--labels", "midl"): "--labels: there is no class midl; did you mean mild?",
    ("--labels", "2"): "--labels: there is no class 2; there are mild, normal",
    ("--prompt", "a polyp"): "run: two_players draws for labels, not for captions",
    ("--per-class", "2", "--labels", "mild"): "give one of --prompts FILE",
    ("--per-class", "2", "--count", "3"): "--count goes with --prompt or --labels",
    ("--labels", "mild", "--steps", "3"): "--steps: TwoPlayers draws without steps",
    ("--labels", "mild", "--negative", "a"): "--negative: run: two_players is led away from no words",
}


def test_classes_are_drawn_by_name_or_number_and_nothing_else(config, here):
    train(config)
    for given in ("normal,mild", "1,0"):
        out = here / given
        result = CliRunner().invoke(sample, ["run", "--labels", given, "--count", "2", "--out", str(out)])
        assert result.exception is None, result.exception
        pictures = [Image.open(out / f"{i:06d}.png") for i in range(4)]
        assert [picture.info["label"] for picture in pictures] == ["normal", "normal", "mild", "mild"]
        assert pictures[0].tobytes() != pictures[1].tobytes()
    assert (here / "1,0/000003.png").read_bytes() == (here / "normal,mild/000003.png").read_bytes()

    for arguments, said in REFUSED.items():
        result = CliRunner().invoke(sample, ["run", *arguments, "--out", "pictures"])
        assert isinstance(result.exception, UserError)
        assert said in str(result.exception)
        assert not (here / "pictures").exists()


def drawn(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in sorted(out.rglob("*.png"))}


def test_every_class_is_drawn_into_a_folder_of_its_own_and_shown_in_a_row(config, here):
    train(config)
    arguments = ["run", "--out", str(here / "out"), "--sheet", str(here / "sheet.png")]
    for count in ("2", "3"):  # the second call goes on where the first one ended
        before = drawn(here / "out")
        result = CliRunner().invoke(sample, [*arguments, "--per-class", count], catch_exceptions=False)
        assert f"{2 * int(count)} of them in" in result.output
        after = drawn(here / "out")
        assert sorted(after) == [f"{name}/{i:06d}.png" for name in ("mild", "normal") for i in range(int(count))]
        assert before.items() <= after.items()
        with Image.open(here / "sheet.png") as sheet:
            assert sheet.width == 8 + int(count) * (160 + 8)  # a row a class
            assert sheet.height == 8 + 2 * (160 + 24 + 8)
    for name in ("mild", "normal"):
        with Image.open(here / f"out/{name}/000002.png") as picture:
            assert picture.info["label"] == name
    assert len(set(drawn(here / "out").values())) == 6
    found = Cytology(CytologyConfig(root=str(here / "out"), template=None, resolution=32, validation_images=1)).check()
    assert (found["pictures of mild"], found["pictures of normal"]) == (3, 3)  # a data set of its own


def test_a_grid_has_a_row_for_each_class():
    assert grid_rows(8, 4) == ([0, 2, 4, 6], 4)
    assert grid_rows(3, 8) == ([0, 1, 2], 4)  # there are no more
    labels = [0, 0, 0, 0, 1, 2, 2, 1]
    assert grid_rows(8, 6, labels) == ([0, 2, 4, 7, 5, 6], 2)
    assert grid_rows(8, 8, labels) == ([0, 2, 4, 7, 5, 6], 2)  # there are no more of each
    assert grid_rows(8, 3, labels) == ([0, 4, 5], 1)
    assert grid_rows(8, 2, labels) == ([0, 4], 4)  # no room for all
    assert grid_rows(4, 2, [1, 1, 1, 1]) == ([0, 2], 4)


def test_the_grid_of_a_training_names_its_classes(config, here, monkeypatch):
    shown = []
    monkeypatch.setattr("callbacks.evaluation.draw_grid", lambda *given: shown.append(given) or draw_grid(*given))
    config.data.validation_images, config.evaluation.grid, config.train.max_steps = 8, 4, 4
    train(config)
    assert [(captions, columns) for _, captions, columns in shown] == [(["mild", "mild", "normal", "normal"], 2)]
    with Image.open(here / "run/grids/step-0000004.png") as grid:
        assert grid.size == (8 + 2 * 168, 8 + 2 * (160 + 24 + 8))


def test_classes_of_any_name_stay_within_the_folder(tmp_path):
    """They may be a table's, and it may say anything."""
    (tmp_path / "split.json").write_text(json.dumps({"classes": ["..", "a/b", ".hidden", "grade 2"]}))
    names = ["class-0/000000", "class-1/000000", "class-2/000000", "grade 2/000000"]
    assert _each_class(tmp_path, 1).names == names


def test_labels_that_mean_other_classes_are_refused(config, here):
    """A folder more before theirs, and each label would be another class's."""
    root = here / "pictures"
    shutil.copytree(config.data.root, root)
    config.data.root = str(root)
    train(config)
    shutil.copytree(root / "mild", root / "benign")
    line = (
        "run_dir=run: the run has the classes mild, normal, and .*pictures has benign, mild, normal: .*benign; give it"
    )
    with pytest.raises(UserError, match=line):
        train(config)
    result = CliRunner().invoke(sample, ["run", "--validation", "2", "--out", "drawn"])
    assert isinstance(result.exception, UserError) and re.search(line, str(result.exception))
    shutil.rmtree(root / "benign")
    (root / "mild").rename(root / "moderate")
    result = CliRunner().invoke(sample, ["run", "--validation", "2", "--out", "drawn"])
    assert "not in both: mild, moderate; give it the folders" in str(result.exception)
    assert not (here / "drawn").exists()
