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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="every disturbance by every launcher, in tests/cluster")


@pytest.fixture(scope="session")
def whole_matrix(pytestconfig) -> bool:
    """Whether each launcher is to meet every disturbance; tests/cluster/__init__.py says which it meets otherwise."""
    return pytestconfig.getoption("--all", default=False)


@pytest.fixture(scope="session")
def slurm(tmp_path_factory, once) -> Iterator[Slurm]:
    """A cluster of this process of pytest's own: nobody else loses the nodes that it sets DOWN."""
    if os.geteuid() != 0:
        pytest.skip("a Slurm of one's own needs root")
    if not shutil.which("slurmctld") and not shutil.which("apt-get"):
        pytest.skip("no Slurm here, and no apt-get to install it with")
    once("slurm-packages", lambda _: subprocess.run([SCRIPT, "install"], check=True, timeout=600))
    folder = tmp_path_factory.mktemp("slurm")
    try:
        worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
        numbers = os.environ | {"FIRST_JOB": str(1000 * worker + 1)}
        subprocess.run([SCRIPT, "start", folder], env=numbers, check=True, timeout=120)
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
def undisturbed(slurm, folders, once) -> Path:
    """The run directory of a run that nothing has disturbed."""

    def run(place: Path) -> None:
        folder = folders("undisturbed")
        job = submit(slurm, folder)
        fields = slurm.end(job, seconds=600)
        assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "0"), log(folder, job)
        (folder / RUN).rename(place / "run")

    return once("undisturbed-run", run) / "run"
