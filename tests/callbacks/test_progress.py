"""What a run says of how far it has come."""

import lightning as L
import torch
from torch.utils.data import DataLoader

from callbacks.progress import RunProgress, Throughput
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


def test_each_line_has_the_loss_of_its_batch(tmp_path, capsys):
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
    assert [line.split(" · ")[1] for line in lines] == [f"loss {i}.0000" for i in (0, 1, 2, 3, 4, 5, 5)]
    assert lines[-1].startswith("step 3/3 ")


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
    assert list(whole) == [0, 1, 2, 3]
    assert half == {step: whole[step] for step in (1, 3)}
