"""What a run is about to do, before its first step."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

from datamodules.base import ImageDataModule
from datamodules.batches import collate
from jobs.run.checks import accumulation
from jobs.run.registry import METHODS
from lightning_modules.base import GenerativeModule, count_parameters


class Trial(NamedTuple):
    """One picture through the losses: the bytes that autograd keeps for it, and the losses' names."""

    activations: int
    losses: list[str]


def print_summary(
    config: DictConfig, module: GenerativeModule, trial: Trial, facts: Mapping[str, object], notes: Sequence[str] = ()
) -> None:
    """Print method, data, sizes and estimated memory.

    facts, notes: the data module's counts, and what else it has to say.
    """
    trained, frozen = count_parameters(module)
    memory = estimate_memory(module, trial, config)
    train, hardware = config.train, config.hardware
    processes = hardware.devices * hardware.nodes
    table = Table(show_header=False, box=None, pad_edge=False)
    rows = {
        "method": f"{config.method} — {METHODS[config.method].title}",
        "data": f"{config.data.name} · " + ", ".join(f"{value:,} {name}" for name, value in facts.items()),
        "parameters": f"{trained / 1e6:,.2f} M trained, {frozen / 1e6:,.2f} M frozen",
        "batch": f"{train.global_batch_size} = {processes} × {train.device_batch_size} × {accumulation(config)} "
        "(processes × pictures a process × accumulation)",
        "memory": f"about {_gigabytes(sum(memory.values()))} a process ("
        + ", ".join(f"{name} {_gigabytes(size)}" for name, size in memory.items())
        + ")",
        "run directory": config.run_dir,
    }
    for name, value in rows.items():
        table.add_row(f"[bold]{name}", value)
    for note in notes:
        table.add_row("[bold]note", escape(note))
    Console().print(table, highlight=False)


def estimate_memory(module: GenerativeModule, trial: Trial, config: DictConfig) -> dict[str, int]:
    """Bytes a process needs to train: weights, gradients, optimizer, average, and activations.

    Activations are measured: what autograd keeps for one picture, times the pictures a process holds at once.
    """
    hardware, (trained, frozen) = config.hardware, count_parameters(module)
    averaged = sum(p.numel() for network in module.averaged_modules().values() for p in network.parameters())
    processes = hardware.devices * hardware.nodes
    state_parts = 1 if hardware.strategy in ("auto", "ddp") else processes
    weight_parts = 1 if hardware.strategy == "deepspeed2" else state_parts
    width = 4 if hardware.precision == "32-true" else 2  # of frozen weights, in bytes
    part = 4 * trained // state_parts
    sizes = {
        "weights": 4 * (trained + averaged) // weight_parts + width * (frozen - averaged),
        "gradients": part,
        "optimizer": 2 * part,
    }
    if hardware.strategy.startswith("deepspeed"):
        sizes["weights"] += part  # its optimizer steps on a copy
    if config.ema.decay:
        sizes["average"] = part
    sizes["activations"] = trial.activations * config.train.device_batch_size
    return sizes


def try_picture(module: GenerativeModule, data: ImageDataModule) -> Trial:
    """Compute the losses of one validation picture; the module's state stays as it is."""
    parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
    storages: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    module.eval()  # running statistics must not see this picture
    batch = collate([data.validation_set()[0]])
    with torch.autograd.graph.saved_tensors_hooks(note, nn.Identity()):
        losses = module.losses(batch)
    module.train()
    return Trial(sum(storages.values()), list(losses))


def _gigabytes(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
