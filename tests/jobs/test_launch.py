"""Who has started the processes of a run: what an earlier launch has left in a shell starts nothing."""

import os
import re
import socket

import pytest
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only

from jobs.run import launch
from jobs.run.config import HardwareConfig
from jobs.run.launch import cluster_environment, join_on_this_machine
from jobs.submit import _make_slurm_executor
from medsynth.errors import UserError

OF_A_LAUNCH = re.compile("SLURM_|TORCHELASTIC_|MEDSYNTH_|RANK|LOCAL_|GROUP_RANK|NODE_RANK|WORLD_SIZE|MASTER_")
LEFT = {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "10.255.255.1", "MASTER_PORT": "29500"}
TORCHRUN = LEFT | {"TORCHELASTIC_RUN_ID": "none", "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "4"}
ALLOCATION = {"SLURM_JOB_ID": "17", "SLURM_NTASKS": "4", "SLURM_NNODES": "1", "SLURM_JOB_NAME": "work"}
BATCH = ALLOCATION | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
STEP = BATCH | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS_PER_NODE": "4", "SLURM_PROCID": "3"}
INTERACTIVE = STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_JOB_NAME": "interactive"}


@pytest.fixture
def shell(monkeypatch):
    """`shell(variables)` is a shell in which these say of launches, and no others."""

    def set_all(variables: dict[str, str]) -> None:
        for name in [name for name in os.environ if OF_A_LAUNCH.match(name)]:
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    monkeypatch.setattr(rank_zero_only, "rank", 3)  # as Lightning reads it when it is imported
    yield set_all
    for name in [name for name in os.environ if OF_A_LAUNCH.match(name)]:
        monkeypatch.delenv(name)  # what a launch has set


@pytest.mark.parametrize(
    ("variables", "ignored"),
    [
        ({}, ""),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "pod-0", "MASTER_PORT": "23456"}, ""),
        (LEFT, "medsynth: RANK=3 LOCAL_RANK=3 WORLD_SIZE=4 MASTER_ADDR=10.255.255.1 MASTER_PORT=29500: left by"),
        (ALLOCATION, ""),
        (BATCH, ""),
        (INTERACTIVE, ""),
        (STEP | {"SLURM_JOB_NAME": "bash", "SLURM_PTY_PORT": "40000"}, ""),
        (ALLOCATION | LEFT | {"SLURM_PROCID": "3"}, "medsynth: RANK=3"),
    ],
    ids=["nothing", "alone", "left", "salloc", "batch", "salloc's step", "srun --pty", "both"],
)
@pytest.mark.parametrize("devices", [1, 2])
def test_what_is_left_of_a_launch_starts_nothing(shell, capsys, variables, ignored, devices):
    shell(variables)
    environment = cluster_environment(HardwareConfig(devices=devices))
    assert type(environment) is LightningEnvironment
    assert not environment.creates_processes_externally, "it starts the others by itself"
    assert (environment.local_rank(), environment.node_rank(), environment.main_address) == (0, 0, "127.0.0.1")
    assert rank_zero_only.rank == 0, "or nothing would be logged"
    said = capsys.readouterr().err
    assert said.startswith(ignored) and said.count("\n") == bool(ignored)


@pytest.mark.parametrize(
    ("variables", "devices", "kind", "rank"),
    [
        (TORCHRUN, 4, TorchElasticEnvironment, 3),
        (TORCHRUN | BATCH, 4, TorchElasticEnvironment, 3),
        (STEP, 4, SLURMEnvironment, 3),
        (STEP | {"SLURM_JOB_NAME": "interactive"}, 4, SLURMEnvironment, 3),
    ],
    ids=["torchrun", "torchrun in a job", "srun", "srun in salloc"],
)
def test_a_launch_is_taken_part_in(shell, variables, devices, kind, rank):
    shell(variables)
    environment = cluster_environment(HardwareConfig(devices=devices, strategy="ddp"))
    assert type(environment) is kind
    assert (environment.global_rank(), environment.world_size()) == (rank, devices)
    assert kind is TorchElasticEnvironment or not environment.auto_requeue


@pytest.mark.parametrize(
    ("variables", "hardware", "said"),
    [
        (TORCHRUN, {}, "torchrun says WORLD_SIZE=4, the config 1 .*begin with `env -u GROUP_RANK .*-u WORLD_SIZE`"),
        (TORCHRUN, {"devices": 2}, "torchrun says WORLD_SIZE=4, the config 2"),
        (STEP, {}, "srun says SLURM_STEP_NUM_TASKS=4, the config 1 .*-u SLURM_STEP_NUM_TASKS"),
        ({k: v for k, v in STEP.items() if k != "SLURM_NTASKS_PER_NODE"}, {"devices": 4}, "srun: .*ntasks-per-node=4"),
        ({}, {"nodes": 2}, "hardware.nodes=2: nothing has started this run on several machines"),
        (BATCH, {"nodes": 2}, "hardware.nodes=2: nothing has started this run on several machines"),
    ],
)
def test_what_contradicts_a_launch_is_one_line(shell, variables, hardware, said):
    shell(variables)
    with pytest.raises(UserError, match=said) as caught:
        cluster_environment(HardwareConfig(**hardware))
    assert "\n" not in str(caught.value)


def test_a_torchrun_that_has_ended_is_not_waited_for(shell, monkeypatch):
    monkeypatch.setattr(launch, "_STORE_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as store:
        port = str(store.getsockname()[1])
        ours = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "True"}
        shell(TORCHRUN | ours)
        assert cluster_environment(HardwareConfig(devices=4)).main_port == int(port)
    with pytest.raises(UserError, match=f"torchrun does not answer at 127.0.0.1:{port}"):
        cluster_environment(HardwareConfig(devices=4))


def test_processes_that_a_run_has_started_know_it(shell, monkeypatch, capsys):
    shell({})
    parent = cluster_environment(HardwareConfig(devices=2, strategy="ddp"))
    mine = {"LOCAL_RANK": "1", "NODE_RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": str(parent.main_port)}  # Lightning's
    monkeypatch.setattr(os, "getppid", os.getpid)
    shell(mine | {"MASTER_ADDR": "127.0.0.1", "MEDSYNTH_STARTED_BY": os.environ["MEDSYNTH_STARTED_BY"]})
    child = cluster_environment(HardwareConfig(devices=2, strategy="ddp"))
    assert child.creates_processes_externally and child.local_rank() == 1
    assert child.main_port == parent.main_port
    assert not capsys.readouterr().err


def test_a_job_in_the_background_knows_nothing_of_its_shell(shell, capsys):
    shell(TORCHRUN | STEP)
    join_on_this_machine(1, port=15017)
    environment = cluster_environment(HardwareConfig(devices=2, strategy="ddp"))
    assert type(environment) is LightningEnvironment and environment.creates_processes_externally
    assert (environment.local_rank(), environment.node_rank()) == (1, 0)
    assert (environment.main_address, environment.main_port) == ("127.0.0.1", 15017)
    assert not [name for name in os.environ if name.startswith(("SLURM_", "TORCHELASTIC_"))]
    assert not capsys.readouterr().err


@pytest.mark.parametrize("name", ["50%", "a\\b", "a\nb"])
def test_a_path_that_slurm_would_read_otherwise(tmp_path, name):
    with pytest.raises(UserError, match="run_dir=.*: in the path of a log Slurm takes % and") as caught:
        _make_slurm_executor(HardwareConfig(), tmp_path / name / "submit", {"VENV": "venv"})
    assert "\n" not in str(caught.value)
