"""How far a run of a study is, and what it has scored, by its folder's own record.

The record is what MLflow is sent, and is never behind it. What MLflow has beside it is asked where it answers.

RUN/sweep.json   what the study keeps of a run: whose it is, the seconds it has taken, how it failed
"""

import json
import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from callbacks.durable import read_manifest
from jobs.report.runs import connect, stored
from jobs.run.folder import CONFIG_FILE, find_checkpoint
from jobs.study.plan import Run
from jobs.study.read import Study
from jobs.tracking.server import resolve_uri
from jobs.tracking.spool import read_events, read_run_id
from medsynth.errors import UserError
from medsynth.files import read_object, write_whole

if TYPE_CHECKING:
    from mlflow import MlflowClient

FILE = "sweep.json"


class State(StrEnum):
    """How far a run is."""

    WAITING = "waiting"
    BEGUN = "begun"
    FAILED = "failed"
    DONE = "done"


@dataclass
class Record:
    """What a run folder says of its run."""

    state: State
    reason: str = ""
    """Why it failed, in one line."""
    step: int | None = None
    """Of a done run, the optimizer step whose weights it has exported."""
    history: dict[str, dict[int, float]] = field(default_factory=dict)
    """Metric -> step -> value; of a step that was repeated, the first."""
    monitored: tuple[str, float] | None = None
    """What chose the exported weights, and its value."""
    seconds: float | None = None
    """That it has taken, over all its starts here."""

    def score(self, metric: str) -> float | None:
        """The value of the exported weights; None where it was not logged after their step, or is not finite."""
        if self.step is None:
            return None
        value = self.history.get(metric, {}).get(self.step)
        if value is None and self.monitored is not None and self.monitored[0] == metric:
            value = self.monitored[1]
        return value if value is not None and math.isfinite(value) else None


def read_record(run: Run, client: "MlflowClient | None" = None) -> Record:
    """A run's record; client: MLflow, where it answers (see `mlflow_of`)."""
    kept, status, reason, history = _kept(run.run_dir), None, "", {}
    for event in read_events(run.run_dir):
        if event["kind"] == "status":
            status, reason = event["status"], "" if event["status"] == "RUNNING" else reason
        elif event["kind"] == "tag" and event["key"] == "failure":
            reason = event["value"]
        elif event["kind"] == "metrics":
            for key, value in event["values"].items():
                history.setdefault(key, {}).setdefault(event["step"], value)
    record = Record(State.WAITING, history=history, seconds=kept.get("seconds"))
    if not (run.run_dir / CONFIG_FILE).is_file() and "failed" not in kept:
        return record
    record.state = State.DONE if status == "FINISHED" else State.BEGUN
    if status == "FAILED" or ("failed" in kept and status != "FINISHED"):
        record.state, record.reason = State.FAILED, reason or kept.get("failed", "")
    if record.state is State.DONE:
        _add_checkpoint(record, run.run_dir)
        _add_mlflow(record, run.run_dir, client)
    return record


def is_finished(run_dir: Path) -> bool:
    """Whether a run has come to its end and exported its weights."""
    statuses = [event["status"] for event in read_events(run_dir) if event["kind"] == "status"]
    return statuses[-1:] == ["FINISHED"]


def mlflow_of(uri: str | None) -> "MlflowClient | None":
    """MLflow, where it answers; None where it does not, or is a database that is not there yet."""
    try:
        return connect(resolve_uri(uri))
    except UserError:
        return None


def note(run: Run, study: Study, **facts: Any) -> None:
    """Keep `facts` of a run beside those that are kept; None forgets one."""
    run.run_dir.mkdir(parents=True, exist_ok=True)
    known = _kept(run.run_dir) | {"sweep": study.name, "run": run.label} | facts
    known = {key: value for key, value in known.items() if value is not None}
    write_whole(run.run_dir / FILE, json.dumps(known, indent=1) + "\n")


def refuse_another_study(study: Study, runs: Iterable[Run]) -> None:
    """Raise UserError where the study's folder, or that of a run, belongs to another study."""
    if (study.folder / CONFIG_FILE).is_file():
        raise UserError(f"{study.folder} is the folder of a run; choose another folder for {study.path}")
    for place in (study.folder, *(run.run_dir for run in runs)):
        owner = _kept(place).get("sweep", study.name)
        if owner != study.name:
            raise UserError(f"{place} belongs to the sweep {owner}; choose another folder for {study.path}")
    for run in runs:
        label = _kept(run.run_dir).get("run", run.label)
        if label != run.label:
            raise UserError(f"{run.run_dir} is the run {label} of this sweep, not {run.label}; choose another folder")


def claim(study: Study) -> None:
    """Write down whose folder the study's is."""
    study.folder.mkdir(parents=True, exist_ok=True)
    write_whole(study.folder / FILE, json.dumps({"sweep": study.name}) + "\n")


def _kept(folder: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        return read_object(folder / FILE)
    return {}


def _add_checkpoint(record: Record, run_dir: Path) -> None:
    with suppress(UserError):  # where somebody has removed the checkpoints, there is an export without a known step
        manifest = read_manifest(find_checkpoint(run_dir, "best"))
        record.step = manifest["global_step"]
        if "metric" in manifest:
            record.monitored = (manifest["metric"]["name"], manifest["metric"]["value"])


def _add_mlflow(record: Record, run_dir: Path, client: "MlflowClient | None") -> None:
    """What MLflow has of the run's metrics goes before the record."""
    run_id = read_run_id(run_dir)
    if client is None or run_id is None:
        return
    with suppress(Exception):  # it has gone away, or no longer has the run: the record is whole without it
        for key in client.get_run(run_id).data.metrics:
            points = {point.step: stored(point.value) for point in client.get_metric_history(run_id, key)}
            record.history[key] = record.history.get(key, {}) | points
