"""The benchmark: both loops do the same work on the same weights, and what is counted is what the closed form says."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from benchmarks import peers, scores
from benchmarks.cell import DIFFERENT, METHODS, Batches, Cell, build
from benchmarks.flops import count, per_picture
from benchmarks.plain import LOOPS, Draws
from benchmarks.train_step import batch_of_eager, largest_batch, main, measured_row
from lightning_modules.maths.diffusion import SampleRandom
from medsynth.errors import UserError
from tests.conftest import REPOSITORY


def both(cell: Cell):
    module = build(cell)
    batches = Batches(cell, module)
    return module, LOOPS[cell.method](cell, module, batches), batches


def draws_of_ours(module, seeds, method: str) -> Draws:
    """The numbers that ours draws for these seeds, in the order in which it does."""
    random, shape = SampleRandom(seeds), module.latent_shape()
    posterior, noise = random.normal(*shape), random.normal(*shape)
    if method == "llcm":
        return Draws(posterior, noise, random.integers(module.config.solver_steps), random.uniform())
    return Draws(posterior, noise, random.integers(module.config.noise.steps))


def sums(parameters) -> list[tuple]:
    """What tells two sets of weights apart, in whichever order they come."""
    plain = [p.detach().contiguous().double() for p in parameters]
    return sorted((tuple(p.shape), p.sum().item(), p.square().sum().item()) for p in plain)


@pytest.mark.parametrize("cached", [False, True], ids=["pictures", "cached"])
@pytest.mark.parametrize("method", METHODS)
def test_both_loops_begin_alike_and_compute_the_same(method, cached):
    module, plain, batches = both(Cell(method, cached=cached))
    learned = [p for p in module.parameters() if p.requires_grad]
    assert sums(learned) == sums(plain.learned)

    draws = draws_of_ours(module, batches[0].seeds, method)
    losses = [module.losses(batches[0])["loss"], plain.loss(batches.plain(0), draws)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
    for loss in losses:
        loss.backward()
    norms = [nn.utils.get_total_norm([p.grad for p in weights]) for weights in (learned, plain.learned)]
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-4, atol=0)
    assert norms[0] > 0


def test_mixed_precision_clips_gradients_too():
    """Lightning refuses to with a fused optimizer that offers to unscale gradients."""
    assert peers.measure(Cell("hypernetwork", precision="bf16-mixed"), rounds=1, steps=1).ours


def test_nothing_frozen_is_float32_in_mixed_precision():
    _, plain, _ = both(Cell("stable_diffusion_lora", precision="bf16-mixed"))
    frozen = [p for p in plain.unet.parameters() if not p.requires_grad]
    assert {p.dtype for p in frozen} == {torch.bfloat16}
    assert {p.dtype for p in plain.learned} == {torch.float32}
    assert plain.step().isfinite()


def test_prompts_and_seeds_never_come_twice_but_pictures_do():
    cell = Cell("stable_diffusion")
    batches = Batches(cell, build(cell))
    first, later = batches[0], batches[DIFFERENT]
    assert first.images is later.images
    assert not set(first.conditions.captions) & set(later.conditions.captions)
    assert not set(first.seeds.tolist()) & set(later.seeds.tolist())


@pytest.mark.parametrize("method", ["stable_diffusion_lora", "llcm"])
def test_the_loops_take_turns(method, monkeypatch):
    """Blocks of ours (o) and plain (p), two steps each: op, po, op after the warm-up."""
    steps = []
    loop = LOOPS[method]

    class Watched(loop):
        def step(self):
            steps.append("p")
            return super().step()

    def watch(self, trainer, module, outputs, batch, batch_idx):
        steps.append("o")
        return turn(self, trainer, module, outputs, batch, batch_idx)

    turn = peers._Turns.on_train_batch_end
    monkeypatch.setitem(LOOPS, method, Watched)
    monkeypatch.setattr(peers._Turns, "on_train_batch_end", watch)
    measured = peers.measure(Cell(method, cached=True), rounds=3, steps=2)
    assert "".join(steps) == "o" * peers.WARM_UP + "p" * peers.WARM_UP + "oopp" + "ppoo" + "oopp"
    assert len(measured.ours) == len(measured.plain) == 3
    assert min(measured.ours + measured.plain) > 0
    assert measured.ours_bytes is None


def test_units_of_a_row():
    row = measured_row(Cell("stable_diffusion", cached=True), rounds=2, steps=2)
    ours, plain = row["rounds"]["ours_seconds"], row["rounds"]["plain_seconds"]
    assert row["ours"][1] == pytest.approx(sum(4 / seconds for seconds in ours) / 2)
    assert row["ratio"][1] == pytest.approx((plain[0] / ours[0] + plain[1] / ours[1]) / 2)
    assert row["extra_us"][1] == pytest.approx(1e6 * (sum(ours) - sum(plain)) / 2)
    median = sum(plain) / 2
    assert row["plain_mfu"] == pytest.approx(4 * row["flops_per_picture"] / median / row["peak_flops"])
    assert row["ours"] == sorted(row["ours"])
    assert 0 < row["ours_mfu"] < 1


# Counting


def test_a_linear_and_a_convolution_count_as_the_closed_form_says():
    linear, convolution = nn.Linear(7, 5), nn.Conv2d(3, 6, 3, padding=1)
    x, picture = torch.randn(4, 7, requires_grad=True), torch.randn(2, 3, 8, 8, requires_grad=True)
    assert count(lambda: linear(x)) == 2 * 4 * 7 * 5
    # Backward: the gradients of input and weight, each as much as forward.
    assert count(lambda: linear(x).sum().backward()) == 3 * 2 * 4 * 7 * 5
    assert count(lambda: convolution(picture).sum().backward()) == 3 * 2 * (2 * 8 * 8) * 6 * (3 * 3 * 3)


def test_attention_counts_its_two_products_and_nothing_twice():
    q = torch.randn(2, 3, 10, 8, requires_grad=True)
    product = 2 * (2 * 3) * 10 * 10 * 8

    def attend():
        return nn.functional.scaled_dot_product_attention(q, q, q)

    assert count(attend) == 2 * product
    assert count(lambda: attend().sum().backward()) == 3 * 2 * product


def test_checkpointing_is_not_counted_as_work():
    cell = Cell("stable_diffusion", cached=True)
    flops = []
    for checkpointing in (False, True):
        module = build(replace(cell, checkpointing=checkpointing))
        flops.append(per_picture(cell, module, Batches(cell, module)))
        assert any(getattr(m, "gradient_checkpointing", False) for m in module.modules()) == checkpointing
        assert all(p.grad is None for p in module.parameters())
    assert flops[0] == flops[1] > 0


# The command


def test_a_row_that_fails_says_why_and_the_others_are_kept(tmp_path):
    file = tmp_path / "rows.json"
    command = ["--methods", "stable_diffusion", "--resolution", "30,32", "--rounds", "2", "--steps", "1"]
    command += ["--device", "cpu", "--shape", "tiny", "--json", str(file)]
    result = CliRunner().invoke(main, command, catch_exceptions=False)
    rows = json.loads(file.read_text())
    assert ["multiple of 8" in row["status"] for row in rows] == [True, True, False, False]
    assert [row["status"] for row in rows[2:]] == ["ok", "ok"]
    assert rows[3]["over_uncached"] == rows[3]["ours"][1] / rows[2]["ours"][1]
    assert "multiple of 8" in result.stdout

    kept = [row["rounds"] for row in rows[2:]]
    CliRunner().invoke(main, [*command[:3], "32", *command[4:]], catch_exceptions=False)
    assert [row["rounds"] for row in json.loads(file.read_text()) if row["status"] == "ok"] == kept


def test_the_largest_batch_is_found_by_doubling(monkeypatch):
    def fits_up_to_16(cell, rounds, steps):
        if cell.batch > 16:
            raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(peers, "measure", fits_up_to_16)
    assert largest_batch(Cell("stable_diffusion", batch=2)).batch == 16
    with pytest.raises(torch.OutOfMemoryError):
        largest_batch(Cell("stable_diffusion", batch=32))


def test_a_compiled_row_has_the_batch_of_the_row_without():
    eager = asdict(Cell("llcm", batch=64)) | {"largest": True, "status": "ok"}
    compiled = asdict(Cell("llcm", batch=8, compile=True)) | {"largest": True}
    assert batch_of_eager(compiled, [eager]) == 64
    assert batch_of_eager(compiled | {"cached": True}, [eager]) is None
    assert batch_of_eager(compiled, [eager | {"status": "out of memory"}]) is None
    assert batch_of_eager(eager, [eager]) is None


def test_an_unknown_method_and_an_odd_batch_are_refused():
    result = CliRunner().invoke(main, ["--methods", "stable_diffusion,gan"])
    assert result.exit_code == 2
    assert "gan is not one of" in result.stderr
    with pytest.raises(UserError, match="even"):
        Cell("dreambooth", batch=3)


def test_nothing_is_needed_that_training_alone_does_not_need():
    """Tracking, scoring and reading data have packages of their own, which a machine lent for speed may not have."""
    absent = ("mlflow", "lpips", "webdataset", "submitit", "deepspeed", "metrics", "jobs.tracking")
    code = (
        f"import sys; sys.modules |= dict.fromkeys({absent})\n"
        "from benchmarks.peers import measure; from benchmarks.cell import Cell\n"
        "assert measure(Cell('controlnet'), 1, 1).ours"
    )
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=REPOSITORY)


def test_scores_and_torchmetrics_come_to_the_same(tmp_path):
    command = ["--features", "48", "--batch", "8", "--images", "0", "--rounds", "2", "--json"]
    printed = CliRunner().invoke(scores.main, [*command, str(tmp_path / "rows.json")], catch_exceptions=False).stdout
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["name"].split(":")[0] for row in rows] == [
        "Fréchet distance, full rank", "Fréchet distance, deficient", "statistics, an update"
    ]  # fmt: skip
    for row in rows:
        assert row["difference"] < 1e-6 and row["name"].split(",")[0] in printed
        pairs = zip(row["rounds"]["ours"], row["rounds"]["theirs"], strict=True)
        assert row["ratio"][1] == pytest.approx(sum(theirs / ours for ours, theirs in pairs) / 2)
