"""Sends the spool to MLflow, from a thread that training never waits for."""

import logging
import shlex
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from jobs.tracking.server import failure, logged_images, mlflow_client, public_uri, sqlite_path, valid_key
from jobs.tracking.spool import LANES, Spool
from medsynth.errors import UserError

if TYPE_CHECKING:  # importing MLflow costs seconds
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

_log = logging.getLogger(__name__)

PARENT = ("key", "experiment", "run_name", "started")
"""What of a study's tracking/run.json is enough to find its run in MLflow, or to make it."""


class Sender:
    """Brings the spool to MLflow, each point once, in order.

    Records (metrics, params, tags, status) and files (pictures, artifacts) have a cursor each, so that an artifact
    store that takes no pictures never holds back metrics.
    """

    _EVENTS_A_BATCH = 200

    def __init__(self, spool: Spool, uri: str):
        self._spool, self._uri = spool, uri
        self._client: MlflowClient | None = None  # None: not attached to the run
        self._run_id: str | None = None
        self._cursor = dict.fromkeys(LANES, 0)  # bytes of the spool that the run has
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
        run = self._known_run(client, identity.get("run_id"))
        if run is None:
            run = self._new_run(client, identity)
            if identity.get("run_id"):
                message = "MLflow at %s no longer has run %s of %s: a new run is made and the whole record sent again."
                _log.warning(message, public_uri(self._uri), identity["run_id"], self._spool.run_dir)
        self._run_id = run.info.run_id
        self._spool.save("run.json", identity | {"run_id": self._run_id})
        self._cursor = self._spool.cursor() if recorded.get("run_id") == self._run_id else dict.fromkeys(LANES, 0)
        self._last_step = {metric.key: metric.step for metric in run.to_proto().data.metrics}
        self._params = dict(run.data.params)
        self._images = None
        self._client = client

    def _attached(self) -> "tuple[MlflowClient, str]":
        """The client and the run's id, which `_attach` has found."""
        assert self._client is not None and self._run_id is not None, "nothing is sent before"
        return self._client, self._run_id

    def _known_run(self, client: "MlflowClient", run_id: str | None) -> "Run | None":
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
        return None

    def _new_run(self, client: "MlflowClient", identity: Mapping[str, Any]) -> "Run":
        """The run with this directory's key: one that was made but whose id got lost is found again, not made twice."""
        experiment, tag = self._experiment(client, identity["experiment"]), "medsynth.run_key"
        if found := client.search_runs([experiment], f"tags.`{tag}` = '{identity['key']}'", max_results=1):
            return found[0]
        tags = {tag: identity["key"]}
        if parent := identity.get("parent"):
            tags["mlflow.parentRunId"] = self._new_run(client, parent).info.run_id  # whoever of them comes first
        return client.create_run(experiment, identity["started"], tags, identity["run_name"])

    def _experiment(self, client: "MlflowClient", name: str) -> str:
        """The experiment's id; makes it where there is none.

        Raises:
            UserError: it has been deleted; its name is taken nonetheless.
        """
        from mlflow.exceptions import MlflowException

        if found := client.get_experiment_by_name(name):
            if found.lifecycle_stage == "active":
                return found.experiment_id
            uri = public_uri(self._uri)
            mend = f"MLFLOW_TRACKING_URI={shlex.quote(uri)} mlflow experiments restore -x {found.experiment_id}"
            raise UserError(
                f"MLflow at {uri}: the experiment {name} has been deleted; restore it (`{mend}`), or train with "
                "another name in tracking.experiment"
            )
        # Beside an SQLite file lie its pictures too, not wherever the first process happened to run.
        database = sqlite_path(self._uri)
        location = (database.parent / "mlartifacts").as_uri() if database else None
        try:
            return client.create_experiment(name, location)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            if found := client.get_experiment_by_name(name):  # another run has just made it
                return found.experiment_id
            raise

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
            if event["kind"] in LANES[lane]:
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
        client, run_id = self._attached()
        client.log_batch(
            run_id,
            list(self._new_points(events)),
            [Param(*item) for item in new.items()],
            [RunTag(valid_key(key), value) for key, value in tags.items()],
        )
        for event in [event for event in events if event["kind"] == "status"][-1:]:
            self._set_status(event["status"], event["time"])

    def _new_points(self, events: list[dict[str, Any]]) -> "Iterator[Metric]":
        """The metrics that have come further than what MLflow has of them."""
        from mlflow.entities import Metric

        for event in events:
            for key, value in event.get("values", {}).items():
                if event["step"] > self._last_step.get(key, -1):
                    self._last_step[key] = event["step"]
                    yield Metric(key, value, event["time"], event["step"])

    def _set_status(self, status: str, when: int) -> None:
        client, run_id = self._attached()
        if status == "RUNNING":
            client.update_run(run_id, status)
        else:
            client.set_terminated(run_id, status, when)

    def _log_image(self, event: dict[str, Any]) -> None:
        client, run_id = self._attached()
        if self._images is None:
            self._images = {(image.key, image.step) for image in logged_images(client, run_id)}
        key, step, file = event["key"], event["step"], self._spool.files / event["file"]
        if (key, step) not in self._images and (picture := self._picture(file, key)):
            client.log_image(run_id, picture, key=key, step=step, timestamp=event["time"])
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
        client, run_id = self._attached()
        path = self._spool.run_dir / event["path"]
        if path.is_dir():
            client.log_artifacts(run_id, str(path), event["artifact_path"])
        elif path.exists():
            client.log_artifact(run_id, str(path), event["artifact_path"])
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


class SenderThread(threading.Thread):
    """Sends in the background, with back-off while the server is away."""

    # Seconds between two attempts: as a rule, at most while the server is away, at most while `flush` waits.
    _RULE, _AWAY, _HURRY = 2.0, 60.0, 0.5

    def __init__(self, sender: Sender, where: str):
        super().__init__(name="mlflow-sender", daemon=True)
        self._sender, self._where = sender, where
        self._turn = threading.Condition()
        self._failures = 0
        self._said: set[str] = set()  # kinds of failure, since the server last had everything
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
            kind, told = failure(error, self._where)
            if kind not in self._said:
                self._said.add(kind)
                _log.warning("%s. Training goes on; its record is kept and sent then.", told)
            return min(2.0 ** min(self._failures, 10), self._AWAY)
        if self._failures:
            self._said.clear()
            _log.warning("MLflow at %s is back and has the whole record.", self._where)
        self._failures = 0
        return self._RULE
