"""What is logged of a step: means over micro-batches and processes, one count of steps, one name of the rate."""

import math
from pathlib import Path

import pytest
import torch

from callbacks.checkpoint import CheckpointConfig, build_checkpoints
from jobs.run.strategies import Replicated
from lightning_modules.parts.optim import OptimConfig, rates
from tests.callbacks.line import Line, LineConfig, fit, logged
from tests.processes import together


def test_a_loss_is_the_mean_over_the_micro_batches_of_its_step(tmp_path):
    trainer = fit(Line(), tmp_path, accumulate_grad_batches=4, max_steps=3)
    assert logged(trainer, "train/inputs") == {1: 1.5, 2: 5.5, 3: 9.5}
    assert float(trainer.callback_metrics["train/inputs"]) == 9.5
    frozen = Line(LineConfig(OptimConfig(lr=1e-30)))  # so that the loss is a function of the inputs alone
    trainer = fit(frozen, tmp_path / "2", accumulate_grad_batches=4, max_steps=3, log_every_n_steps=3)
    weight, bias = (p.item() for p in frozen.parameters())
    mean = sum((weight * x + bias + 1) ** 2 for x in (8, 9, 10, 11)) / 4
    assert logged(trainer, "train/loss") == {3: pytest.approx(mean, rel=1e-5)}


def _of_two(rank: int, folder: Path) -> None:
    inputs = [[float(100 * rank + i)] for i in range(12)]
    options = {"strategy": Replicated(), "devices": 2, "accumulate_grad_batches": 2, "max_steps": 4}
    trainer = fit(Line(), folder / str(rank), inputs=inputs, log_every_n_steps=2, **options)
    if rank == 0:
        assert logged(trainer, "train/inputs") == {2: 52.5, 4: 56.5}


def test_and_over_the_processes(tmp_path):
    together(2, _of_two, tmp_path, log=tmp_path / "log", seconds=60)


def test_all_that_is_logged_has_the_number_of_the_step_that_made_the_weights(tmp_path):
    """Also after a resume with other validations, which Lightning's own count loses a step by."""
    saves = build_checkpoints(CheckpointConfig(every_steps=1), tmp_path)
    first = fit(Line(), tmp_path, *saves, max_steps=4, val_check_interval=4)
    assert list(logged(first, "train/loss")) == [1, 2, 3, 4] == list(logged(first, "lr"))
    assert list(logged(first, "val/loss")) == [4]
    again = fit(Line(), tmp_path / "2", checkpoint=tmp_path / "last.ckpt", max_steps=8, val_check_interval=3)
    assert list(logged(again, "train/loss")) == [5, 6, 7, 8] == list(logged(again, "lr"))
    assert list(logged(again, "val/loss")) == [6]


SCHEDULES = {
    "constant": lambda s, steps, warm: 1.0,
    "linear": lambda s, steps, warm: (steps - s) / (steps - warm),
    "cosine": lambda s, steps, warm: 0.5 * (1 + math.cos(math.pi * (s - warm) / (steps - warm))),
}


def rate(schedule: str, lr: float, step: int, steps: int, warm: int) -> float:
    """Of the `step`-th step, from 1: the closed form."""
    done = step - 1
    return lr * (done / warm if done < warm else SCHEDULES[schedule](done, steps, warm))


@pytest.mark.parametrize("warm", [0, 1, 6])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_run_that_goes_on_longer_has_the_rates_of_one_that_was_as_long_from_the_start(tmp_path, schedule, warm):
    saves = build_checkpoints(CheckpointConfig(), tmp_path)
    config = LineConfig(OptimConfig(lr=1e-5, schedule=schedule, warmup_steps=warm))
    trainer = fit(Line(config), tmp_path, *saves, max_steps=4)
    expected = {step: pytest.approx(rate(schedule, 1e-5, step, 4, warm)) for step in range(1, 5)}
    assert warm > 4 or logged(trainer, "lr") == expected
    trainer = fit(Line(config), tmp_path / "2", checkpoint=tmp_path / "last.ckpt", max_steps=8)
    expected = {step: pytest.approx(rate(schedule, 1e-5, step, 8, warm)) for step in range(5, 9)}
    assert logged(trainer, "lr") == expected
    if (schedule, warm) == ("linear", 1):
        assert logged(trainer, "lr")[5] == pytest.approx(5.714e-6, rel=1e-4)


def test_settings_of_the_optimizer_are_the_configs_and_its_moments_the_checkpoints(tmp_path):
    saves = build_checkpoints(CheckpointConfig(), tmp_path)
    before = fit(Line(), tmp_path, *saves, max_steps=4)
    moments = [s["exp_avg"].clone() for s in before.optimizers[0].state.values()]
    other = OptimConfig(name="adam", lr=0.5, betas=[0.0, 0.9], weight_decay=0.25, eps=1e-3, warmup_steps=8)

    class Watched(Line):
        def on_train_batch_start(self, batch, batch_idx):
            (optimizer,) = self.trainer.optimizers
            self.seen = [s["exp_avg"].clone() for s in optimizer.state.values()] if not self.after else self.seen
            self.group = dict(optimizer.param_groups[0])
            super().on_train_batch_start(batch, batch_idx)

    module = Watched(LineConfig(other))
    trainer = fit(module, tmp_path / "2", checkpoint=tmp_path / "last.ckpt", max_steps=5)
    assert logged(trainer, "lr") == {5: pytest.approx(0.5 * 4 / 8)}
    assert all(torch.equal(a, b) for a, b in zip(module.seen, moments, strict=True))
    group = {key: module.group[key] for key in ("betas", "weight_decay", "eps")}
    assert group == {"betas": (0.0, 0.9), "weight_decay": 0.25, "eps": 1e-3}


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_one_optimizer_has_one_rate_of_one_name(tmp_path, name):
    trainer = fit(Line(LineConfig(OptimConfig(name=name, lr=0.02))), tmp_path, max_steps=2)
    assert logged(trainer, "lr") == {1: 0.02, 2: 0.02}
    columns = (tmp_path / "log/metrics.csv").read_text().splitlines()[0].split(",")
    assert sorted(columns) == ["epoch", "lr", "step", "train/inputs", "train/loss"]


def test_several_rates_are_named_by_their_group_or_by_what_they_train():
    modules = {"generator": torch.nn.Linear(1, 1), "critic": torch.nn.Linear(1, 1)}
    players = [torch.optim.SGD(module.parameters(), lr=i) for i, module in enumerate(modules.values(), 1)]
    assert rates(players, modules) == {"lr/generator": 1.0, "lr/critic": 2.0}
    weight, bias = modules["critic"].parameters()
    groups = [{"params": [weight], "name": "weights"}, {"params": [bias], "name": "biases", "lr": 5.0}]
    assert rates([torch.optim.Adam(groups, lr=0.5)], modules) == {"lr/weights": 0.5, "lr/biases": 5.0}
    unnamed = torch.optim.Adam([{"params": [weight]}, {"params": [bias], "lr": 5.0}], lr=0.5)
    assert rates([unnamed], modules) == {"lr/1": 0.5, "lr/2": 5.0}
