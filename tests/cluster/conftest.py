"""Fixtures of the tests on a real Slurm."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobs.tracking.server import mlflow_client
from tests.cluster.cluster import RUN, Slurm, clone, log, submit, write_site
from tests.conftest import REPOSITORY

SCRIPT = REPOSITORY / "tests/cluster/slurm.sh"


@pytest.fixture(scope="session")
def slurm(tmp_path_factory) -> Iterator[Slurm]:
    if os.geteuid() != 0:
        pytest.skip("a Slurm of one's own needs root")
    if not shutil.which("slurmctld") and not shutil.which("apt-get"):
        pytest.skip("no Slurm here, and no apt-get to install it with")
    subprocess.run([SCRIPT, "install"], check=True, timeout=600)
    folder = tmp_path_factory.mktemp("slurm")
    try:
        subprocess.run([SCRIPT, "start", folder], check=True, timeout=120)
        environment = {"SLURM_CONF": f"{folder}/slurm.conf", "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}
        yield Slurm(folder, os.environ | environment)
    finally:
        subprocess.run([SCRIPT, "stop", folder], check=True, timeout=120)


@pytest.fixture(scope="session")
def folders(tmp_path_factory, phantom) -> Callable[[str], Path]:
    """Makes copies of what of the repository a run needs, with a fresh MLflow, which takes seconds to be made."""
    database = tmp_path_factory.mktemp("mlflow") / "mlruns.db"
    mlflow_client(f"sqlite:///{database}").search_experiments()

    def make(name: str) -> Path:
        folder = clone(tmp_path_factory.mktemp(name))
        shutil.copy(database, folder)
        (folder / "phantom").symlink_to(phantom)
        write_site(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def undisturbed(slurm, folders) -> Path:
    """The run directory of a run that nothing has disturbed."""
    folder = folders("undisturbed")
    job = submit(slurm, folder)
    fields = slurm.end(job, seconds=600)
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "0"), log(folder, job)
    return folder / RUN
