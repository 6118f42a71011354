"""`medsynth ui` on a real MLflow server."""

import signal
import socket
import subprocess
import sys
import urllib.request

import pytest
from click.testing import CliRunner

from jobs.tracking.server import charts_link, mlflow_client
from jobs.ui import _page, main
from medsynth.errors import UserError
from tests.conftest import REPOSITORY


@pytest.fixture(scope="module")
def uri(tmp_path_factory, quick_mlflow) -> str:
    """A database in a folder with a space, which an experiment was made in."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('a folder')}/mlruns.db"
    mlflow_client(uri).create_experiment("study")
    return uri


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_a_database_gets_a_server_that_ends_with_it(uri):
    port = free_port()
    arguments = ["--tracking-uri", uri, "--experiment", "study", "--port", str(port), "--no-browser"]
    command = [sys.executable, "-m", "jobs.ui", *arguments]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        link = process.stdout.readline().strip()
        experiment = mlflow_client(uri).get_experiment_by_name("study").experiment_id
        assert link == charts_link(f"http://127.0.0.1:{port}", experiment)
        with urllib.request.urlopen(link) as page:
            assert b"<title>MLflow</title>" in page.read()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 0 and "Traceback" not in said
    finally:
        process.kill()
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_what_cannot_be_shown_is_named(uri, tmp_path):
    def said(*arguments: str) -> str:
        error = CliRunner().invoke(main, [*arguments, "--no-browser"]).exception
        assert isinstance(error, UserError)
        return str(error)

    assert "there is no experiment studi; did you mean study?" in said("--tracking-uri", uri, "--experiment", "studi")
    assert "there is no MLflow database" in said("--tracking-uri", f"sqlite:///{tmp_path}/none.db")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        options = ["--tracking-uri", uri, "--experiment", "study", "--port", str(port)]
        assert f"--port {port} is taken" in said(*options)


def test_the_page_of_a_server_has_no_login_in_its_address():
    assert _page("https://me:secret@mlflow.example.org/base/", 5000) == "https://mlflow.example.org/base"
