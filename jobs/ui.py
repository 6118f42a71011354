"""`medsynth ui`: MLflow in the browser, at the charts of an experiment's runs."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import webbrowser
from contextlib import suppress
from urllib.parse import urlsplit, urlunsplit

import click

from jobs.report import options
from jobs.tracking.server import charts_link, is_server, resolve_uri
from medsynth.errors import UserError

_START_SECONDS = 120
"""A busy machine takes long to import MLflow; beyond this something is wrong."""


@click.command()
@options.experiment
@options.tracking_uri
@click.option(
    "--port", type=click.IntRange(1, 65535), default=5000, show_default=True, help="Where a database is shown."
)
@click.option("--no-browser", is_flag=True, help="Only print the address, for instance behind an SSH tunnel.")
def main(experiment: str, tracking_uri: str | None, port: int, no_browser: bool) -> None:
    """Show the runs of an experiment as charts in MLflow.

    A server's page is opened; a database gets a server on this machine, which ends with Ctrl-C.
    """
    from jobs.report.runs import connect, find_experiment

    uri = resolve_uri(tracking_uri)
    link = charts_link(_page(uri, port), find_experiment(connect(uri), experiment))
    if is_server(uri):
        _show(link, no_browser)
        return
    _require_free(port)
    server = _serve(uri, port)
    try:
        _wait_until_it_answers(server, port)
        _show(link, no_browser)
        click.echo("Ctrl-C ends it")
        server.wait()
    except KeyboardInterrupt:
        pass
    finally:
        server.terminate()
        server.wait()


def _page(uri: str, port: int) -> str:
    """The address of MLflow's page, without a login that the URI may hold: a browser asks for its own."""
    if not is_server(uri):
        return f"http://127.0.0.1:{port}"
    parts = urlsplit(uri)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path.rstrip("/"), "", ""))


def _show(link: str, no_browser: bool) -> None:
    click.echo(link)
    if not no_browser:
        webbrowser.open(link)


def _require_free(port: int) -> None:
    try:
        with socket.create_server(("127.0.0.1", port)):
            pass
    except OSError:
        raise UserError(
            f"--port {port} is taken on this machine; give another, or open http://127.0.0.1:{port}"
        ) from None


def _serve(uri: str, port: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    settings = {
        "MLFLOW_BACKEND_STORE_URI": uri,  # not an argument, which everyone on the machine can read
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # for language models; spares seconds of the start
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, env=os.environ | settings, **quiet)


def _wait_until_it_answers(server: subprocess.Popen, port: int) -> None:
    from rich.console import Console

    end = time.monotonic() + _START_SECONDS
    with Console(stderr=True).status("MLflow starts"):
        while time.monotonic() < end and server.poll() is None:
            with suppress(urllib.error.URLError, OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                return
            time.sleep(0.2)
    raise UserError(f"MLflow's server did not start; `mlflow server --port {port}` says why")


if __name__ == "__main__":
    from jobs.cli import run

    run("ui")
