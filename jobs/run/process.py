"""What holds for a whole process that trains: its threads, and which warnings are worth reading."""

import logging
import os
import warnings
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from jobs.run.strategies import check_machine


def set_up_process(hardware: Any) -> None:
    """Set threads, as a `HardwareConfig` says, and silence what libraries say of things that are settled here.

    Raises:
        UserError: this machine has not what is asked for.
    """
    _quieten()
    check_machine(hardware)
    if hardware.accelerator == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed, which saving imports, would warn of no GPU
    if hardware.threads:
        torch.set_num_threads(hardware.threads)


def _quieten() -> None:
    """Silence what libraries say of things that are settled here."""
    transformers_logging.disable_progress_bar()
    for name in ("utilities.rank_zero", "trainer.connectors.checkpoint_connector"):
        logging.getLogger(f"lightning.pytorch.{name}").setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*weights_only.*",  # DurableCheckpointIO never unpickles code
        ".*isinstance.treespec.*",
        ".*smaller than the logging interval.*",
        ".*found .* module.s. in eval mode.*",
        ".*It is recommended to use .self.log.*sync_dist=True.*",  # what is logged so is the same in all processes
        ".*have overridden `transfer_batch_to_device`.*",
        ".*DeepSpeed handles gradient clipping internally.*",
        ".*`srun` command is available.*",
        ".*`broadcast_buffers` is deprecated.*",  # the name that takes its place is not in every torch we run with
    ):
        warnings.filterwarnings("ignore", message)
