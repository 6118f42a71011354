"""MLflow: its URIs, its client, an SQLite database made whole, and what may be stored in it."""

import fcntl
import logging
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from medsynth.errors import UserError
from medsynth.files import disk_fault
from medsynth.secrets import without_secrets

if TYPE_CHECKING:  # importing MLflow costs seconds
    from mlflow import MlflowClient

DEFAULT_URI = "sqlite:///mlruns.db"
DEFAULT_EXPERIMENT = "medsynth"

_SAID = 4000  # characters of an error that are looked at: a server may answer with megabytes

# MLflow's own limits, in characters.
_KEY_LENGTH, PARAM_LENGTH, TAG_LENGTH = 250, 6000, 8000

# MLflow's default of 7 retries blocks four minutes on a dead server; the sender has its own back-off.
_MLFLOW_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


def resolve_uri(uri: str | None) -> str:
    """`uri`, else $MLFLOW_TRACKING_URI, else `DEFAULT_URI`; the path of an SQLite file made absolute."""
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI
    database = sqlite_path(uri)
    return f"sqlite:///{database}" if database else uri


def sqlite_path(uri: str) -> Path | None:
    """The absolute path of the database file of an `sqlite:///` URI; None for any other."""
    path = uri.removeprefix("sqlite:///")
    return Path(path).absolute() if path != uri else None


def public_uri(uri: str) -> str:
    """`uri` with a password or token in it replaced by ***."""
    return without_secrets(uri, environment=False)  # it is read again where nothing is hidden


def is_server(uri: str) -> bool:
    """Whether `uri` is that of a server, which has a page; else it is a database's."""
    return uri.startswith(("http://", "https://"))


def charts_link(page: str, experiment_id: str) -> str:
    """Address of the charts of an experiment's runs. MLflow's first page is about language models."""
    return f"{page}/#/experiments/{experiment_id}/runs?compareRunsMode=CHART&workflowType=machine_learning"


def ui_command(uri: str | None, experiment: str = DEFAULT_EXPERIMENT) -> str:
    """The shell command that shows an experiment's runs in MLflow; a `uri` of None means as in `TrackingConfig.uri`."""
    options = []
    if uri is not None and resolve_uri(uri) != resolve_uri(None):
        options += ["--tracking-uri", public_uri(resolve_uri(uri))]
    if experiment != DEFAULT_EXPERIMENT:
        options += ["--experiment", experiment]
    return shlex.join(["medsynth", "ui", *options])


def mlflow_client(uri: str) -> "MlflowClient":
    """An `mlflow.MlflowClient` of `uri` that fails within seconds and prints nothing; makes a missing SQLite file."""
    mlflow = import_mlflow()
    database = sqlite_path(uri)
    if database and not database.exists() and "?" not in uri:  # options are MLflow's own affair
        _make_database(database)
    return mlflow.MlflowClient(uri)


def import_mlflow() -> ModuleType:
    """MLflow, imported at first use because that costs seconds; these settings it takes from the environment only."""
    for name, value in _MLFLOW_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import mlflow

    # It shows whole statements of a database that fails; what is to be known of that, the sender says.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    return mlflow


def _make_database(path: Path) -> None:
    """Make MLflow's tables in a new SQLite file, and put that into its place whole; another run's may be there first.

    MLflow makes them in place, which takes seconds, and never gets over what a process killed meanwhile leaves.
    """
    from mlflow.db import upgrade

    path.parent.mkdir(parents=True, exist_ok=True)
    mark = f".{path.name}.new-"
    for leftover in path.parent.glob(f"{mark}*"):
        _remove_unless_held(leftover)
    with tempfile.TemporaryDirectory(prefix=mark, dir=path.parent) as folder, _held(folder):
        made = Path(folder) / path.name
        assert upgrade.callback is not None, "a command of click's has one"
        upgrade.callback(f"sqlite:///{made}")
        try:
            os.link(made, path)  # unlike a rename it never replaces
        except FileExistsError:
            return
        except OSError:  # a file system without links
            if not path.exists():
                made.rename(path)


@contextmanager
def _held(folder: str | Path) -> Iterator[bool]:
    """Lock the folder until the end, also that of the process; False where another holds it, or it takes no locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = True
    except OSError:
        held = False
    try:
        yield held
    finally:
        os.close(descriptor)


def _remove_unless_held(folder: Path) -> None:
    with suppress(OSError), _held(folder) as held:
        if held:
            shutil.rmtree(folder)


def valid_key(name: str) -> str:
    """`name` in the characters and the length that MLflow takes."""
    return re.sub(r"[^\w\-./ :]", "_", name)[:_KEY_LENGTH]


def cause(error: Exception) -> str:
    """The innermost cause, in one line without secrets: libraries show whole addresses, and all that a server said."""
    text = without_secrets(" ".join(str(error)[:_SAID].split())) or type(error).__name__
    _, link, inner = text.rpartition("(Caused by ")
    return (inner.removesuffix(")") if link else text)[:300]


def failure(error: Exception, where: str) -> tuple[str, str]:
    """What keeps MLflow at `where` from taking a record: its kind, and a line that says how it is mended."""
    said = cause(error)
    if isinstance(error, UserError):
        return "refused", str(error)
    if getattr(error, "error_code", None) in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
        login = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        return "login", f"MLflow at {where} wants a login: set {login} in the environment ({said})"
    if "CERTIFICATE_VERIFY_FAILED" in said:
        mend = "set MLFLOW_TRACKING_SERVER_CERT_PATH to the file of who signed it, or have it renewed"
        return "certificate", f"MLflow at {where} has a certificate that is not trusted: {mend} ({said})"
    if isinstance(error, OSError) and (reason := disk_fault(error)):
        return "disk", f"what MLflow at {where} has cannot be written down: {reason}"
    return "away", f"MLflow at {where} is away: {said}"


@dataclass(frozen=True)
class LoggedImage:
    """A picture as `MlflowClient.log_image` stored it."""

    key: str
    """The name it was logged under, for instance eval/grid."""
    step: int
    """Optimizer step."""
    time: int
    """Unix time, milliseconds."""
    path: str
    """Artifact path of the full picture (PNG)."""


# MLflow names the file by key, step, time and a random id, joined by "+" ("%" in older releases), "/" as "~" ("#").
_IMAGE_NAME = re.compile(r"images/(?P<key>.+?)[+%]step[+%](?P<step>\d+)[+%]timestamp[+%](?P<time>\d+)[+%][^+%]+\.png")


def logged_images(client: "MlflowClient", run_id: str) -> list[LoggedImage]:
    """Every picture logged with a step in the run, oldest step first."""
    matches = [_IMAGE_NAME.fullmatch(file.path) for file in client.list_artifacts(run_id, "images")]
    images = [
        LoggedImage(re.sub("[~#]", "/", m["key"]), int(m["step"]), int(m["time"]), m.string) for m in matches if m
    ]
    return sorted(images, key=lambda image: (image.step, image.time))
