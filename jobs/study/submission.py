"""What travels to a cluster: one run's config, or the stages of one job."""

from collections.abc import Sequence
from typing import NamedTuple

from omegaconf import DictConfig

from jobs.cluster.kubernetes import GRACE, load_for_pods
from jobs.run.config import GPU_NODE, load_arguments, load_for_nodes, to_yaml
from jobs.run.sources import has_stages

_ON_CPUS = ["hardware.accelerator=cpu", "hardware.precision=32-true"]


class Submission(NamedTuple):
    """What travels: a config, or the stages of one job."""

    config: DictConfig
    """The run's; of stages the first's, with the folder of all of them as its run_dir."""
    text: str
    """The whole as one YAML file."""
    runs: list[DictConfig]


def load_submission(
    cluster: str, arguments: Sequence[str], nodes: int | None, gpus: int | None, on_cpus: bool = False
) -> Submission:
    """What `arguments` say, on that many machines and processes a machine.

    Raises:
        UserError: as `jobs.run.config.load_config`.
    """
    load = _load_stages if has_stages(arguments) else _load_run
    return load(cluster, arguments, nodes, gpus, on_cpus)


def _load_run(cluster: str, arguments: Sequence[str], nodes: int | None, gpus: int | None, on_cpus: bool) -> Submission:
    if cluster == "local":
        config = load_arguments([*arguments, *_hardware(nodes, gpus)])
    elif cluster == "kubernetes":
        config = load_for_pods(arguments, nodes, gpus)
    else:
        config = load_for_nodes([*arguments, *(_ON_CPUS if on_cpus else [])], nodes, gpus)
    return Submission(config, to_yaml(config), [config])


def _load_stages(
    cluster: str, arguments: Sequence[str], nodes: int | None, gpus: int | None, on_cpus: bool
) -> Submission:
    """All stages on the same machines; what their batches do not divide among is refused."""
    from jobs.study.job import read_job  # which needs torch

    first = [GRACE] if cluster == "kubernetes" else []
    settings = [*_hardware(nodes, gpus), *(_ON_CPUS if on_cpus else [])]
    job = read_job([*first, *arguments, *settings], () if cluster == "local" else [str(GPU_NODE)])
    return Submission(job.launched, job.to_yaml(), job.configs)


def _hardware(nodes: int | None, gpus: int | None) -> list[str]:
    given = {"nodes": nodes, "devices": gpus}
    return [f"hardware.{key}={value}" for key, value in given.items() if value is not None]
