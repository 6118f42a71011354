"""MLflow logging that never stops or slows training.

Every event is first appended to a spool in the run directory; one daemon thread sends the spool to MLflow and records
how far it has come. A server that is away costs training nothing: what could not be sent waits for the server, for the
next start of the same run directory, or for `send_pending`.

    <run_dir>/tracking/events.jsonl   the spool: one event a line, append-only
    <run_dir>/tracking/files/         pictures that events still to be sent refer to
    <run_dir>/tracking/run.json       which MLflow run this directory is
    <run_dir>/tracking/sent.json      how far the spool has been sent to that run
"""

import errno
import fcntl
import importlib.metadata
import json
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
import threading
import time
import uuid
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Optional
from urllib.parse import urlsplit

import numpy as np
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from medsynth import __version__
from medsynth.errors import UserError
from medsynth.files import write_whole

_log = logging.getLogger(__name__)

DEFAULT_URI = "sqlite:///mlruns.db"

# MLflow's own limits, in characters.
_KEY_LENGTH, _PARAM_LENGTH, _TAG_LENGTH = 250, 6000, 8000

# MLflow's default of 7 retries blocks four minutes on a dead server; the sender has its own back-off.
_MLFLOW_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}

_FINAL_STATUS = {"success": "FINISHED", "failed": "FAILED", "interrupted": "KILLED", "killed": "KILLED"}
_BY_GRAVITY = ("FINISHED", "FAILED", "KILLED")


@dataclass
class TrackingConfig:
    """Where a run is logged."""

    uri: Optional[str] = None
    """MLflow tracking URI: http(s)://… or a database; null takes $MLFLOW_TRACKING_URI, else sqlite:///mlruns.db."""
    experiment: str = "medsynth"
    """MLflow experiment; made where it does not exist."""
    run_name: Optional[str] = None
    """The run's name in MLflow; null takes the name the job gives, else that of the run directory."""
    timeout_seconds: float = 30.0
    """How long the end of a run waits for an unreachable server, seconds."""


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
    """`uri` with a password in it replaced by ***."""
    password = urlsplit(uri).password
    return uri.replace(f":{password}@", ":***@", 1) if password else uri


def ui_command(uri: str | None) -> str:
    """The shell command that opens the MLflow UI on `uri`; None means as in `TrackingConfig.uri`."""
    uri = public_uri(resolve_uri(uri))
    opener = "python -m webbrowser" if uri.startswith(("http://", "https://")) else "mlflow ui --backend-store-uri"
    return f"{opener} {shlex.quote(uri)}"


def mlflow_client(uri: str):
    """An `mlflow.MlflowClient` of `uri` that fails within seconds and prints nothing; makes a missing SQLite file."""
    mlflow = _import_mlflow()
    database = sqlite_path(uri)
    if database and not database.exists() and "?" not in uri:  # options are MLflow's own affair
        _make_database(database)
    return mlflow.MlflowClient(uri)


def _import_mlflow():
    """MLflow, imported at first use because that costs seconds; these settings it takes from the environment only."""
    for name, value in _MLFLOW_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import mlflow

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


def logged_images(client, run_id: str) -> list[LoggedImage]:
    """Every picture logged with a step in the run, oldest step first."""
    matches = [_IMAGE_NAME.fullmatch(file.path) for file in client.list_artifacts(run_id, "images")]
    images = [
        LoggedImage(re.sub("[~#]", "/", m["key"]), int(m["step"]), int(m["time"]), m.string) for m in matches if m
    ]
    return sorted(images, key=lambda image: (image.step, image.time))


def read_run_id(run_dir: str | Path) -> str | None:
    """The id of the MLflow run of a run directory; None where MLflow has not been reached, or nothing logged."""
    with suppress(FileNotFoundError):
        return json.loads((Path(run_dir) / "tracking" / "run.json").read_text())["run_id"]
    return None


def run_facts() -> dict[str, str]:
    """Tags of the code and hardware in use: git commit, versions, CPU, RAM, GPUs, platform. No user names, no paths."""
    packages = ("torch", "lightning", "diffusers", "transformers", "mlflow")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        **_git_facts(),
        "version.python": platform.python_version(),
        "version.medsynth": __version__,
        **{f"version.{package}": _version(package) for package in packages},
        "hardware.cpu": _cpu_model(),
        "hardware.cpu_count": str(os.cpu_count()),
        "hardware.ram_gib": f"{memory:.0f}",
        "hardware.gpus": ", ".join(f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus)) or "none",
        "host.platform": platform.platform(),
    }


def _git_facts() -> dict[str, str]:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # fails for a copy installed inside another checkout
        return {"git.commit": git("rev-parse", "HEAD"), "git.dirty": str(bool(git("status", "--porcelain"))).lower()}
    except (OSError, subprocess.SubprocessError):
        return {"git.commit": "unknown", "git.dirty": "unknown"}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _cpu_model() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


_LANES = {"records": ("metrics", "param", "tag", "status"), "files": ("image", "artifact")}


class _Spool:
    """The files of `<run_dir>/tracking`."""

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir
        self.folder = run_dir / "tracking"
        self.files = self.folder / "files"
        self.events = self.folder / "events.jsonl"
        self.files.mkdir(parents=True, exist_ok=True)
        # Unbuffered: a line is one write, and a forked worker holds no copy of it.
        self._file = self.events.open("a+b", buffering=0)
        if self.size():
            self._file.seek(-1, os.SEEK_END)
            if self._file.read(1) != b"\n":
                self._file.write(b"\n")  # ends a line that a crash cut short; `read` marks it as damaged
        if max(self.cursor().values()) > self.size():
            (self.folder / "sent.json").unlink()  # events got lost with the disk: where the next ones go, none was sent

    def size(self) -> int:
        """Bytes of events; 0 where somebody removed them."""
        return self.events.stat().st_size if self.events.exists() else 0

    def append(self, kind: str, **content: Any) -> None:
        line = json.dumps({"kind": kind, "time": _milliseconds(), **content}).encode() + b"\n"
        if self._file.write(line) != len(line):
            self._file.write(b"\n")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def read(self, offset: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
        """The whole lines from byte `offset` on: event, {"kind": ""} for a damaged line, and the byte it ends at."""
        with self.events.open("rb") as file:
            file.seek(offset)
            for line in file:
                offset += len(line)
                if line.endswith(b"\n"):
                    yield _event(line), offset

    def keep(self, picture: str | Path | Image.Image) -> str:
        """Copy a picture into `files`; its name there."""
        name = f"{uuid.uuid4().hex}.png"
        if isinstance(picture, Image.Image):
            picture.save(self.files / name)
        else:
            shutil.copyfile(picture, self.files / name)
        return name

    def load(self, name: str) -> dict[str, Any]:
        """The JSON object of file `name`; empty where there is none."""
        try:
            return json.loads((self.folder / name).read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return {}

    def save(self, name: str, content: Mapping[str, Any]) -> None:
        """Write JSON file `name` so that a reader sees the old or the new content, never a part."""
        write_whole(self.folder / name, json.dumps(content, indent=1))

    def cursor(self) -> dict[str, int]:
        """How far the spool has been sent, in bytes, by lane."""
        recorded = self.load("sent.json")
        return {lane: recorded.get(lane, 0) for lane in _LANES}

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps all other senders of this directory waiting."""
        with (self.folder / "lock").open("w") as file:
            with suppress(OSError):  # a file system without locks: one sender at a time is then up to the user
                fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _milliseconds() -> int:
    return time.time_ns() // 1_000_000


def _event(line: bytes) -> dict[str, Any]:
    try:
        return json.loads(line)
    except ValueError:
        return {"kind": ""}


class _Sender:
    """Brings the spool to MLflow, each point once, in order.

    Records (metrics, params, tags, status) and files (pictures, artifacts) have a cursor each, so that an artifact
    store that takes no pictures never holds back metrics.
    """

    _EVENTS_A_BATCH = 200

    def __init__(self, spool: _Spool, uri: str):
        self._spool, self._uri = spool, uri
        self._client = None  # None: not attached to the run
        self._run_id: str | None = None
        self._cursor = dict.fromkeys(_LANES, 0)  # bytes of the spool that the run has
        # What MLflow has: newest step of each metric, params, key and step of each picture (None until needed).
        self._last_step: dict[str, int] = {}
        self._params: dict[str, str] = {}
        self._images: set[tuple[str, int]] | None = None
        self._complaints: set[str] = set()
        self.sent = 0  # events

    def drained(self) -> bool:
        """Whether everything in the spool has been sent."""
        return min(self._cursor.values()) >= self._spool.size()

    def send(self) -> None:
        """Send all that waits. Raises what MLflow raises; what was sent until then is recorded."""
        if self.drained():
            return
        with self._spool.lock():
            try:
                self._attach()
                self._send_records()
                while self._send_file():
                    self._send_records()
            except Exception:
                self._client = None  # what arrived is uncertain: the next attempt asks the server first
                raise

    def _attach(self) -> None:
        """Find or make the run and ask how far it has come, unless this sender was the last to send and knows."""
        identity, recorded = self._spool.load("run.json"), self._spool.load("sent.json")
        if self._client and recorded == {"run_id": self._run_id, **self._cursor}:
            return
        client = mlflow_client(self._uri)
        run = self._known_run(client, identity.get("run_id")) or self._new_run(client, identity)
        self._run_id = run.info.run_id
        self._spool.save("run.json", identity | {"run_id": self._run_id})
        self._cursor = self._spool.cursor() if recorded.get("run_id") == self._run_id else dict.fromkeys(_LANES, 0)
        self._last_step = {metric.key: metric.step for metric in run.to_proto().data.metrics}
        self._params = dict(run.data.params)
        self._images = None
        self._client = client

    def _known_run(self, client, run_id: str | None):
        """The run of this id; None where there is none, or it has been deleted."""
        from mlflow.exceptions import MlflowException

        if run_id is None:
            return None
        try:
            run = client.get_run(run_id)
            if run.info.lifecycle_stage == "active":
                return run
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
        message = "MLflow at %s no longer has run %s of %s: a new run is made and the whole record sent again."
        _log.warning(message, public_uri(self._uri), run_id, self._spool.run_dir)
        return None

    def _new_run(self, client, identity: Mapping[str, Any]):
        """The run with this directory's key: one that was made but whose id got lost is found again, not made twice."""
        experiment, tag = self._experiment(client, identity["experiment"]), "medsynth.run_key"
        if found := client.search_runs([experiment], f"tags.`{tag}` = '{identity['key']}'", max_results=1):
            return found[0]
        tags = {tag: identity["key"]}
        return client.create_run(experiment, identity["started"], tags, identity["run_name"])

    def _experiment(self, client, name: str) -> str:
        """The experiment's id; makes it where there is none."""
        from mlflow.exceptions import MlflowException

        if found := client.get_experiment_by_name(name):
            return found.experiment_id
        # Beside an SQLite file lie its pictures too, not wherever the first process happened to run.
        database = sqlite_path(self._uri)
        location = (database.parent / "mlartifacts").as_uri() if database else None
        try:
            return client.create_experiment(name, location)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            return client.get_experiment_by_name(name).experiment_id  # another run has just made it

    def _send_records(self) -> None:
        while batch := self._next("records", self._EVENTS_A_BATCH):
            events, end = batch
            run_id = self._run_id
            if self._refusal(self._log, events):
                for part in [part for event in events for part in _parts(event)]:
                    self._complain(self._refusal(self._log, [part]))
            self._record("records", end, len(events), run_id)

    def _send_file(self) -> bool:
        """Send the next picture or artifact; False where there is none."""
        batch = self._next("files", 1)
        if not batch:
            return False
        events, end = batch
        run_id = self._run_id
        for event in events:
            send = self._log_image if event["kind"] == "image" else self._log_artifact
            self._complain(self._refusal(send, event))
        self._record("files", end, len(events), run_id)
        return True

    def _next(self, lane: str, limit: int) -> tuple[list[dict[str, Any]], int] | None:
        """Up to `limit` events of the lane beyond its cursor, and where they end; None at the end of the spool."""
        events, end = [], None
        for event, position in self._spool.read(self._cursor[lane]):
            end = position
            if event["kind"] in _LANES[lane]:
                events.append(event)
            if len(events) == limit:
                break
        return (events, end) if end is not None else None

    def _record(self, lane: str, end: int, count: int, run_id: str | None) -> None:
        if run_id != self._run_id:
            return  # the run went away in between: `_attach` has put the cursors back for the new one
        self._cursor[lane] = end
        self.sent += count
        self._spool.save("sent.json", {"run_id": run_id, **self._cursor})

    def _refusal(self, request: Callable[[Any], None], argument: Any) -> str | None:
        """Make a request; why MLflow refuses it for good, else None. Where the run is gone, attach to a new one."""
        from mlflow.exceptions import MlflowException

        try:
            request(argument)
            return None
        except MlflowException as error:
            if error.error_code not in ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST"):
                raise
            run_id, self._client = self._run_id, None
            self._attach()
            return error.message if run_id == self._run_id else None

    def _log(self, events: list[dict[str, Any]]) -> None:
        """Log records in one batch."""
        from mlflow.entities import Param, RunTag

        params = [event for event in events if event["kind"] == "param"]
        new = {event["key"]: event["value"] for event in reversed(params) if event["key"] not in self._params}
        self._params |= new
        changed = {f"resumed.{e['key']}": e["value"] for e in params if self._params[e["key"]] != e["value"]}
        tags = {event["key"]: event["value"] for event in events if event["kind"] == "tag"} | changed
        self._client.log_batch(
            self._run_id,
            list(self._new_points(events)),
            [Param(*item) for item in new.items()],
            [RunTag(_key(key), value) for key, value in tags.items()],
        )
        for event in [event for event in events if event["kind"] == "status"][-1:]:
            self._set_status(event["status"], event["time"])

    def _new_points(self, events: list[dict[str, Any]]):
        """The metrics that have come further than what MLflow has of them."""
        from mlflow.entities import Metric

        for event in events:
            for key, value in event.get("values", {}).items():
                if event["step"] > self._last_step.get(key, -1):
                    self._last_step[key] = event["step"]
                    yield Metric(key, value, event["time"], event["step"])

    def _set_status(self, status: str, when: int) -> None:
        if status == "RUNNING":
            self._client.update_run(self._run_id, status)
        else:
            self._client.set_terminated(self._run_id, status, when)

    def _log_image(self, event: dict[str, Any]) -> None:
        if self._images is None:
            self._images = {(image.key, image.step) for image in logged_images(self._client, self._run_id)}
        key, step, file = event["key"], event["step"], self._spool.files / event["file"]
        if (key, step) not in self._images and (picture := self._picture(file, key)):
            self._client.log_image(self._run_id, picture, key=key, step=step, timestamp=event["time"])
            self._images.add((key, step))
        file.unlink(missing_ok=True)

    def _picture(self, file: Path, key: str) -> Image.Image | None:
        try:
            with Image.open(file) as picture:
                return picture.copy()
        except OSError:  # PIL's word for a damaged picture is an OSError too
            self._complain(f"pictures {key} that are damaged or, once sent, no longer kept")
            return None

    def _log_artifact(self, event: dict[str, Any]) -> None:
        path = self._spool.run_dir / event["path"]
        if path.is_dir():
            self._client.log_artifacts(self._run_id, path, event["artifact_path"])
        elif path.exists():
            self._client.log_artifact(self._run_id, path, event["artifact_path"])
        else:
            self._complain(f"{path} does not exist any more")

    def _complain(self, reason: str | None) -> None:
        """Say once what was not logged."""
        if reason and reason not in self._complaints:
            self._complaints.add(reason)
            _log.warning("Not logged to MLflow: %s", reason)


def _parts(event: dict[str, Any]) -> list[dict[str, Any]]:
    """The event as events of one entity each."""
    return [event | {"values": {key: value}} for key, value in event.get("values", {}).items()] or [event]


class _SenderThread(threading.Thread):
    """Sends in the background, with back-off while the server is away."""

    # Seconds between two attempts: as a rule, at most while the server is away, at most while `flush` waits.
    _RULE, _AWAY, _HURRY = 2.0, 60.0, 0.5

    def __init__(self, sender: _Sender, where: str):
        super().__init__(name="mlflow-sender", daemon=True)
        self._sender, self._where = sender, where
        self._turn = threading.Condition()
        self._failures = 0
        self._waited_for = False

    def run(self) -> None:
        delay = 0.0
        while True:
            with self._turn:
                self._turn.wait(delay)
            delay = self._attempt()
            with self._turn:
                delay = min(delay, self._HURRY) if self._waited_for else delay
                self._turn.notify_all()

    def flush(self, seconds: float) -> bool:
        """Wait up to `seconds` until everything is sent; whether it is."""
        with self._turn:
            self._waited_for = True
            self._turn.notify_all()
            drained = self._turn.wait_for(self._sender.drained, seconds)
            self._waited_for = False
        return drained

    def _attempt(self) -> float:
        """Send; the seconds to wait before the next attempt."""
        try:
            self._sender.send()
        except Exception as error:  # whatever it is, training must not see it
            self._failures += 1
            if self._failures == 1:
                message = "MLflow at %s is away: %s. Training goes on; its record is kept and sent later."
                _log.warning(message, self._where, cause(error))
            return min(2.0 ** min(self._failures, 10), self._AWAY)
        if self._failures:
            _log.warning("MLflow at %s is back and has the whole record.", self._where)
        self._failures = 0
        return self._RULE


def cause(error: Exception) -> str:
    """The innermost cause, in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return re.sub(r".*\(Caused by (.*)\)+$", r"\1", text)[:300]


class RunTracker(Logger):
    """Lightning logger of one MLflow run for one run directory. Only rank 0 does anything.

    A restart in the same directory goes on with the same run. The steps of a metric only ever rise: of a step that is
    repeated, as by a run resumed from an earlier checkpoint, the first value stands, and so does the first picture.
    """

    def __init__(self, run_dir: str | Path, config: TrackingConfig, run_name: str | None = None):
        """Nothing is read, written or sent before the first event. `run_name` counts where `config` gives none."""
        super().__init__()
        self.run_dir, self.config = Path(run_dir).absolute(), config
        self.uri = resolve_uri(config.uri)
        self._run_name = config.run_name or run_name or self.run_dir.name
        self._newest_step = 0
        self._final: str | None = None
        self._outlasts = False
        self._patience = config.timeout_seconds  # seconds that all calls of `finalize` may still wait
        self._disk_fails = False

    @property
    def name(self) -> str:
        """The experiment."""
        return self.config.experiment

    @property
    def version(self) -> str:
        """The name of the run directory, the same on every rank."""
        return self.run_dir.name

    @property
    def save_dir(self) -> str:
        """The run directory."""
        return str(self.run_dir)

    @property
    def run_id(self) -> str | None:
        """The id of the MLflow run; None as long as MLflow has not been reached."""
        return read_run_id(self.run_dir)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log scalars, NaN and infinities too, at an optimizer step; None means the newest step so far."""
        self._newest_step = max(self._newest_step, step or 0)
        step = self._newest_step if step is None else int(step)
        self._append("metrics", step=step, values={_key(name): float(value) for name, value in metrics.items()})

    @rank_zero_only
    def log_hyperparams(self, params: Mapping[str, Any] | Namespace, *_: Any, **__: Any) -> None:
        """Log params: nested mappings flattened with dots, values as text of at most 6,000 characters.

        A param never changes in MLflow: one that has another value already becomes the tag `resumed.<key>`.
        """
        for key, value in _flat(vars(params) if isinstance(params, Namespace) else params):
            self._append("param", key=key, value=str(value)[:_PARAM_LENGTH])

    @rank_zero_only
    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Set tags, values as text of at most 8,000 characters. A tag can be set again."""
        for key, value in tags.items():
            self._append("tag", key=_key(key), value=str(value)[:_TAG_LENGTH])

    @rank_zero_only
    def log_image(self, key: str, image: str | Path | Image.Image | Tensor | np.ndarray, step: int) -> None:
        """Log a picture for MLflow's image grid with its step slider; it is copied at once.

        `image`: path of a PNG, PIL image, uint8 tensor (C, H, W) or uint8 array (H, W, C) with C 1 or 3.
        """
        picture = to_pil_image(image) if isinstance(image, Tensor | np.ndarray) else image
        self._append("image", picture, key=re.sub(r"[^a-zA-Z0-9_\-./ ]", "_", key), step=int(step))

    @rank_zero_only
    def log_artifact(self, path: str | Path, artifact_path: str | None = None) -> None:
        """Log a file or folder into folder `artifact_path` of the run. It is read when it is sent: leave it there."""
        absolute = Path(path).absolute()
        inside = absolute.is_relative_to(self.run_dir)  # such a path outlives a move of the run directory
        place = absolute.relative_to(self.run_dir) if inside else absolute
        self._append("artifact", path=str(place), artifact_path=artifact_path)

    @contextmanager
    def unfinished(self) -> Iterator[None]:
        """Inside, a "success" is not the run's: Lightning reports its own, and the run may still export."""
        self._outlasts = True
        try:
            yield
        finally:
            self._outlasts = False

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Log how the run ended and wait up to `timeout_seconds`, over all calls, until MLflow has everything.

        "success" is FINISHED, "failed" FAILED, "interrupted" and "killed" KILLED. Within one process the gravest call
        stands, so that Lightning's own "success" or "failed" does not hide an interruption. Events may still follow.
        """
        if self._outlasts and status == "success":
            return
        self._final = max(self._final or "FINISHED", _FINAL_STATUS.get(status, "FAILED"), key=_BY_GRAVITY.index)
        self._append("status", status=self._final)
        began = time.monotonic()
        drained = self._thread.flush(self._patience)
        self._patience = max(0.0, self._patience - (time.monotonic() - began))
        if not drained:
            message = "Not all of this run has reached MLflow at %s. It is kept: `medsynth track %s` sends it."
            _log.warning(message, public_uri(self.uri), self.run_dir)

    @cached_property
    def _spool(self) -> _Spool:
        """The spool, opened for the first event, which makes the run go on where its directory had come to."""
        spool = _Spool(self.run_dir)
        made = {"key": uuid.uuid4().hex, "run_id": None, "started": _milliseconds()}
        now = {"tracking_uri": public_uri(self.uri), "experiment": self.name, "run_name": self._run_name}
        spool.save("run.json", made | spool.load("run.json") | now)
        spool.append("status", status="RUNNING")
        _import_mlflow()  # here, not in the thread: a worker forked during an import would inherit its lock, and hang
        self._thread = _SenderThread(_Sender(spool, self.uri), public_uri(self.uri))
        self._thread.start()
        return spool

    def _append(self, kind: str, picture: str | Path | Image.Image | None = None, **content: Any) -> None:
        """Append an event to the spool; a full or failing disk costs the event and one warning, not the training."""
        try:
            spool = self._spool
            if picture is not None:
                content["file"] = spool.keep(picture)
            spool.append(kind, **content)
        except OSError as error:
            if not self._disk_fails:
                _log.warning("Events of this run get lost: %s", error)
            self._disk_fails = True


def _key(name: str) -> str:
    """`name` in the characters and the length that MLflow takes."""
    return re.sub(r"[^\w\-./ :]", "_", name)[:_KEY_LENGTH]


def _flat(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in params.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield _key(f"{prefix}{name}"), value


def send_pending(run_dir: str | Path, uri: str | None = None) -> int:
    """Send what a run could not send while it ran; the number of events sent.

    `uri`: the tracking URI; None takes the one the run had.

    Raises:
        UserError: the folder holds no record of a run, or MLflow cannot be reached.
    """
    folder = Path(run_dir).absolute()
    if not (folder / "tracking" / "run.json").is_file():
        raise UserError(f"{run_dir} holds no record of a run (tracking/run.json): name the run directory of a training")
    spool = _Spool(folder)
    known = spool.load("run.json")["tracking_uri"]
    uri = resolve_uri(uri or (None if ":***@" in known else known))  # a password is not stored: the environment has it
    sender = _Sender(spool, uri)
    try:
        sender.send()
    except Exception as error:
        raise UserError(
            f"MLflow at {public_uri(uri)} cannot take the record of {run_dir}: {cause(error)}. "
            "The record is kept; start the server and try again"
        ) from error
    return sender.sent
