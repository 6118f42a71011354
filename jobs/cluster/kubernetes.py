"""Kubernetes manifests of training runs, all from the one template kubernetes.yaml.jinja."""

import math
import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from omegaconf import DictConfig

from jobs.run.config import load_for_nodes, to_yaml
from medsynth import __version__
from medsynth.errors import UserError
from medsynth.exit_codes import NO_PROGRESS, PREEMPTED, USER_ERROR

REPOSITORY = Path(__file__).parents[2]
IMAGE = f"medsynth:{__version__}"

# Of a pod, for each GPU; the smallest usual nodes of 8 have 96 CPUs and 680 GB.
_CPUS, _MEMORY_GIB, _SHM_GIB = 10, 64, 8
# A checkpoint of several GB may go to a slow volume.
GRACE = "preemption.grace_seconds=540"
"""What lies under the settings of a run in pods."""
# Presets that were shrunk to a CPU are no training at full size.
_SMALL = re.compile("_cpu(_|$)")


def presets() -> list[Path]:
    """The training presets of configs/, each with a manifest."""
    return [path for path in sorted((REPOSITORY / "configs").glob("*.yaml")) if not _SMALL.search(path.stem)]


def manifest_path(preset: Path) -> Path:
    """Where the manifest of a preset is kept."""
    return REPOSITORY / "k8s" / f"{preset.stem}-train.yaml"


def load_for_pods(arguments: Sequence[str], nodes: int | None = None, gpus: int | None = None) -> DictConfig:
    """`load_for_nodes` of a run on `nodes` pods of `gpus` processes, which have a longer time to save."""
    return load_for_nodes([GRACE, *arguments], nodes, gpus)


def render(
    config: DictConfig,
    *,
    name: str | None = None,
    image: str = IMAGE,
    text: str | None = None,
    runs: Sequence[DictConfig] = (),
) -> str:
    """The manifest of a run: `hardware.nodes` pods of `hardware.devices` processes, as YAML of several objects.

    name: of the Job and all that is its own; by default that of the run directory, and "-train". text, runs: of a job
    of stages, the file of all of them and their configs.

    Raises:
        UserError: `name` cannot name a Kubernetes object.
    """
    hardware = config.hardware
    template = Environment(
        loader=PackageLoader("jobs.cluster", "."), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).get_template("kubernetes.yaml.jinja")
    return template.render(
        name=object_name(name or f"{Path(config.run_dir).name}-train"),
        image=image,
        version=__version__,
        method=", then ".join(run.method for run in runs or [config]),
        config=text or to_yaml(config),
        nodes=hardware.nodes,
        processes=hardware.devices,
        on_gpus=hardware.accelerator != "cpu",
        cpus=_CPUS * hardware.devices,
        memory=_MEMORY_GIB * hardware.devices,
        shm=_SHM_GIB * hardware.devices,
        data_read_only=not any(
            "class_folder" in run.data for run in runs or [config]
        ),  # class pictures are drawn there
        grace=math.ceil(config.preemption.grace_seconds),
        port=29500,
        restarts=3,
        user=10001,  # of the Dockerfile
        exit_codes={"user_error": USER_ERROR, "preempted": PREEMPTED, "no_progress": NO_PROGRESS},
    )


def apply(manifest: str) -> None:
    """Create what `manifest` says in the cluster and namespace that kubectl is set to.

    Raises:
        UserError: there is no kubectl, or it refuses.
    """
    try:
        subprocess.run(["kubectl", "apply", "-f", "-"], input=manifest, encoding="utf-8", check=True)
    except FileNotFoundError:
        raise UserError("there is no kubectl here; --dry-run prints the manifest instead") from None
    except subprocess.CalledProcessError:
        raise UserError("kubectl has not taken the manifest; what it says stands above") from None


def manifests() -> Iterator[tuple[Path, str]]:
    """Path and text of every preset's manifest."""
    for preset in presets():
        yield manifest_path(preset), render(load_for_pods([str(preset)]), name=f"{preset.stem}-train")


def object_name(name: str) -> str:
    """`name` as a label of DNS, the form of the names of Services.

    Raises:
        UserError: it cannot be one.
    """
    label = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")
    # Pods add "-" and their index.
    if not label or not label[0].isalpha() or len(label) > 58:
        raise UserError(f"{name} names no Kubernetes object: it takes a letter first and at most 58 characters")
    return label
