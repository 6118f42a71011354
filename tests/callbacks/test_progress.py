"""What a run says of how far it has come."""

import math
from datetime import timedelta

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from callbacks.progress import RunProgress, Throughput, TimeLeft
from jobs.run.config import load_config
from jobs.tracking.server import mlflow_client
from jobs.tracking.spool import read_run_id
from jobs.train import train
from tests.conftest import REPOSITORY


class Counting(L.LightningModule):
    """The loss of each batch is its number, and is never logged."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, index):
        return batch.squeeze() + 0 * self.weight

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_each_line_has_the_mean_loss_of_the_newest_step(tmp_path, capsys):
    throughput = Throughput(global_batch_size=2)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=3,
        accumulate_grad_batches=2,
        callbacks=[throughput, RunProgress(throughput, seconds=0)],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(Counting(), DataLoader(torch.arange(6.0)))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split(" · ")[1] for line in lines] == [f"loss {loss:.4f}" for loss in (0.5, 2.5, 4.5, 4.5)]
    assert lines[-1].startswith("step 3/3 ")
    assert not any("left" in line for line in lines)  # of three steps nothing is known


class Clock:
    """A clock that is set."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def steps(left: TimeLeft, clock: Clock, number: int, seconds: float) -> None:
    for _ in range(number):
        clock.now += seconds
        left.step()


def test_nothing_is_said_before_it_can_be_known():
    clock = Clock()
    left = TimeLeft(clock)
    steps(left, clock, 1, 600)  # it compiles
    for _ in range(13):
        assert left.seconds(1000, 0) is None
        steps(left, clock, 1, 2)
    steps(left, clock, 1, 2)
    assert left.seconds(1000, 0) == pytest.approx(2000)


def test_a_pace_of_before_is_forgotten():
    """Half a run beside another job, and then alone: of 600 steps at 10 a second a minute is left."""
    clock = Clock()
    left = TimeLeft(clock)
    steps(left, clock, 1000, 5)
    assert left.seconds(600, 0) == pytest.approx(3000)
    steps(left, clock, 1300, 0.1)
    assert left.seconds(600, 0) == pytest.approx(60)
    steps(left, clock, 12, 300)  # and slow again: as soon as there are as many steps as it takes
    assert left.seconds(600, 0) == pytest.approx(600 * 300)


def test_validations_that_are_due_are_counted_apart():
    clock = Clock()
    left = TimeLeft(clock)
    steps(left, clock, 50, 1)
    assert math.isnan(left.seconds(100, 2)) and left.of_steps(100) == pytest.approx(100)
    for pause in (900, 30, 30, 30, 30):  # the first one computes the statistics of the real pictures
        left.pause()
        clock.now += pause
        left.go_on()
        steps(left, clock, 50, 1)
    assert left.of_steps(100) == pytest.approx(100)
    assert left.seconds(100, 2) == pytest.approx(160)


class Slow(Counting):
    """Steps of 10 seconds and a validation of 100 after each 20th, on a clock of its own."""

    def __init__(self, clock: Clock):
        super().__init__()
        self.clock = clock

    def training_step(self, batch, index):
        self.clock.now += 10
        return super().training_step(batch, index)

    def validation_step(self, batch, index):
        self.clock.now += 100


def test_the_lines_of_a_run_say_what_it_then_takes(tmp_path, capsys):
    clock = Clock()
    throughput = Throughput(global_batch_size=1)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=60,
        val_check_interval=20,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        callbacks=[throughput, RunProgress(throughput, seconds=100, clock=clock)],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(Slow(clock), DataLoader(torch.arange(60.0)), DataLoader(torch.arange(1.0)))
    lines = [line.split(" · ") for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    said = {int(line[0].split()[1].split("/")[0]): line[3] for line in lines if len(line) > 3}
    assert 10 not in said and said[20] == "0:06:40 left without validations"
    assert said[31] == f"{timedelta(seconds=29 * 10 + 2 * 100)} left"
    assert said[60] == "0:00:00 left"


def test_losses_are_logged_at_every_log_every_steps_and_are_those_of_the_step(phantom, here):
    tiny = REPOSITORY / "configs/tiny/msdm.yaml"
    settings = [
        f"data.root={phantom}",
        "train.max_steps=4",
        "train.device_batch_size=2",
        "evaluation.images=0",
        "checkpoint.monitor=val/loss",
    ]
    histories = []
    for every in (1, 2):
        config = load_config([tiny], [*settings, f"run_dir=every-{every}", f"train.log_every_steps={every}"])
        train(config)
        client = mlflow_client(f"sqlite:///{here}/mlruns.db")
        history = client.get_metric_history(read_run_id(here / f"every-{every}"), "train/loss")
        histories.append({point.step: point.value for point in history})
    whole, half = histories
    assert list(whole) == [1, 2, 3, 4]
    assert half == {step: whole[step] for step in (2, 4)}
