"""Who has started the processes of a run: torchrun, srun, or nobody, so that the run starts the others by itself.

A shell may still hold what an earlier launch put there: RANK and its like, or an allocation of Slurm in which nothing
was started. What only looks like a launch is no reason to wait for others, or to take oneself for one of them.
"""

import os
import socket
import time
from typing import Any

import click
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    LSFEnvironment,
    MPIEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.fabric.utilities.rank_zero import rank_zero_only

from medsynth.errors import UserError

_SIZES, _ADDRESS = ("WORLD_SIZE", "LOCAL_WORLD_SIZE"), ("MASTER_ADDR", "MASTER_PORT")
_PLACE = ("RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", *_SIZES, *_ADDRESS)
"""What says where a process stands among others; read by Lightning, torch, DeepSpeed."""
_STARTED_BY = "MEDSYNTH_STARTED_BY"
"""The process that has started this one to share its run."""
_STORE_SECONDS = 10.0


def cluster_environment(hardware: Any) -> ClusterEnvironment:
    """What tells Lightning of the other processes of a `HardwareConfig`, and whether it is to start them.

    Variables that an earlier program has left are taken out of the environment; a line says so where they contradict.

    Raises:
        UserError: a launcher says another number of processes than the config, or does not answer; nobody has started
            the processes on several machines.
    """
    processes = hardware.devices * hardware.nodes
    if TorchElasticEnvironment.detect():
        _require_as_many("torchrun", "WORLD_SIZE", processes)
        _require_store()
        return TorchElasticEnvironment()
    if _is_of_a_step():
        _require_as_many("srun", "SLURM_STEP_NUM_TASKS", processes)
        return _of_slurm()
    for kind in (LSFEnvironment, MPIEnvironment):
        if kind.detect():
            return kind()
    if hardware.nodes > 1 and not {"NODE_RANK", "MASTER_ADDR"} <= os.environ.keys():
        raise UserError(
            f"hardware.nodes={hardware.nodes}: nothing has started this run on several machines; start it by sbatch, "
            "srun, torchrun or `medsynth submit`, or set hardware.nodes=1"
        )
    if hardware.nodes == 1 and not _is_shared(processes):
        _forget_others(processes)
    return LightningEnvironment()


def join_on_this_machine(local_rank: int, port: int) -> None:
    """Make this process one of several that something else has started here, whatever the shell says of others."""
    for name in [name for name in os.environ if name.startswith(("SLURM_", "TORCHELASTIC_")) or name in _PLACE]:
        del os.environ[name]
    os.environ |= {"LOCAL_RANK": str(local_rank), "NODE_RANK": "0", _STARTED_BY: str(os.getppid())}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _require_as_many(launcher: str, name: str, processes: int) -> None:
    if (number := os.environ.get(name)) != str(processes):
        raise UserError(
            f"{launcher} says {name}={number}, the config {processes} (hardware.devices × hardware.nodes): make them "
            f"the same; or, where this shell has it left from an earlier launch, begin with `{_without_launch()}`"
        )


def _require_store() -> None:
    """Raise UserError where torchrun keeps a store for its processes and it is not there any more."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    deadline = time.monotonic() + _STORE_SECONDS
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=_STORE_SECONDS).close()
            return
        except (OSError, ValueError):
            if time.monotonic() > deadline:
                break
        time.sleep(0.2)
    raise UserError(
        f"torchrun does not answer at {host}:{port} (MASTER_ADDR, MASTER_PORT); where it has ended and this shell has "
        f"them left, begin with `{_without_launch()}`"
    )


def _without_launch() -> str:
    """The beginning of a command that runs without what says of a launch."""
    names = [name for name in os.environ if name in _PLACE or name.startswith(("TORCHELASTIC_", "SLURM_STEP_"))]
    return "env " + " ".join(f"-u {name}" for name in sorted(names))


def _is_of_a_step() -> bool:
    """Whether srun has started several processes, this one among them, and not a shell in which it was typed.

    An allocation alone, or its batch script, starts one.
    """
    several = os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1"
    return several and "SLURM_PROCID" in os.environ and "SLURM_PTY_PORT" not in os.environ


def _of_slurm() -> ClusterEnvironment:
    try:
        return SLURMEnvironment(auto_requeue=False)  # whoever started the job requeues it, and not Lightning
    except RuntimeError as error:
        raise UserError(f"srun: {str(error).splitlines()[0]}") from None


def _is_shared(processes: int) -> bool:
    """Whether the environment speaks of processes that this one, or the one that has started it, has started."""
    starter = os.environ.get(_STARTED_BY)
    return starter == str(os.getppid()) or (processes > 1 and starter == str(os.getpid()))


def _forget_others(processes: int) -> None:
    """Take out of the environment where an earlier program stood among others."""
    left = {name: os.environ.pop(name) for name in _PLACE if name in os.environ}
    # Lightning has read it there, or from Slurm, when it was imported.
    rank_zero_only.rank = 0  # pyrefly: ignore[missing-attribute]
    if any(value != ("1" if name in _SIZES else "0") for name, value in left.items() if name not in _ADDRESS):
        told = " ".join(f"{name}={value}" for name, value in left.items())
        here = "one process" if processes == 1 else f"{processes} processes, which this one starts"
        click.echo(f"medsynth: {told}: left by another launch, and ignored; this run is {here}", err=True)
    if processes > 1:
        os.environ[_STARTED_BY] = str(os.getpid())
