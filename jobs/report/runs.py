"""The runs of an MLflow experiment, as they are compared, and which way a metric is better."""

import colorsys
import hashlib
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from callbacks.protocols import PROTOCOL_TAG, at_step, parse_notes
from jobs.run.registry import nearest
from jobs.tracking.server import cause, mlflow_client, public_uri, sqlite_path
from medsynth.errors import UserError
from metrics.protocol import Protocol

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as Record

# Which way a metric is better, in the order of the columns. A name that goes on after "_", as fd_random, counts too.
BETTER: dict[str, Callable] = {
    "fid": min,
    "fd": min,
    "clef_fid": min,
    "isc": max,
    "clef_is": max,
    "kid": min,
    "kd": min,
    "cmmd": min,
    "precision": max,
    "recall": max,
    "f1": max,
    "density": max,
    "coverage": max,
    "psnr": max,
    "ssim": max,
    "lpips": min,
    "norberg_pearson": max,
    "norberg_r2": max,
    "loss": min,
}


SCORES = "eval/"
"""How the keys of scores of pictures begin."""
UNNOTED = "unnoted-"
"""How the digest begins of what is known of a protocol that no run has noted."""
_DECIDING = (
    *("evaluation.extractor", "evaluation.weights", "evaluation.images", "evaluation.reference", "data.name"),
    *("data.resolution", "data.square", "data.sixteen_bit", "data.window"),
)


STUDY_TAG = "medsynth.study"
"""Of a run in MLflow that stands for a whole study; its runs are below it."""


@dataclass
class Run:
    """What is compared of one MLflow run."""

    id: str
    name: str
    status: str
    tags: dict[str, str]
    params: dict[str, str]
    colour: str
    history: dict[str, list[tuple[int, float]]]
    """Metric key -> (step, value) by step; not finite where training was not. The key of a score of pictures ends in
    the digest of its protocol, see `with_protocol`."""
    throughput: float | None
    """Newest throughput/images_per_second."""
    protocols: dict[str, Protocol] = field(default_factory=dict)
    """By what its scores are scores, by digest; of earlier versions' runs nothing is known but what the config says."""

    @property
    def method(self) -> str:
        return self.tags.get("method", "unknown")

    @property
    def data(self) -> str:
        return self.params.get("data.name", "unknown")

    @property
    def seen(self) -> str:
        """The data set, and the figure of the pictures that it held."""
        return f"{self.data} {self.tags.get('data.pictures', self.tags.get('data.fingerprint', ''))[:8]}".strip()

    def best(self, key: str) -> tuple[int, float] | None:
        """(step, value) of the best finite value; None without one."""
        finite = [point for point in self.history.get(key, []) if math.isfinite(point[1])]
        choose = better(key)
        return choose(finite, key=lambda point: point[1]) if choose and finite else None


def better(key: str) -> Callable | None:
    """`min` or `max`, whichever is better of a metric; None for a spread (…_std) and for names of no known kind."""
    kind = kind_of(key)
    return BETTER[kind] if kind and not plain(key).endswith("_std") else None


def with_protocol(key: str, protocol: str) -> str:
    """The key of the values of a metric that are of one protocol: two of them never make one column."""
    return f"{key}@{protocol}"


def plain(key: str) -> str:
    """The metric's own key."""
    return key.partition("@")[0]


def protocol_in(key: str) -> str | None:
    """The digest of the protocol in a key, if there is one."""
    return key.partition("@")[2] or None


def kind_of(key: str) -> str | None:
    """The name in `BETTER` that a metric goes by; None where it goes by none."""
    name = plain(key).rpartition("/")[2].removeprefix("clean_")  # the same score of pictures resized otherwise
    return next((kind for kind in BETTER if name == kind or name.startswith(f"{kind}_")), None)


def connect(uri: str) -> "MlflowClient":
    """A client of a server that answers; raises UserError where none does."""
    database = sqlite_path(uri)
    if database and not database.exists():  # MLflow would make an empty one
        raise UserError(f"there is no MLflow database {database}: a run makes it, or name another with --tracking-uri")
    try:
        client = mlflow_client(uri)
        client.search_experiments(max_results=1)
    except Exception as error:
        reason = f"MLflow at {public_uri(uri)} cannot be reached: {cause(error)}"
        raise UserError(f"{reason}; start it, or name another with --tracking-uri") from error
    return client


def find_experiment(client: "MlflowClient", name: str) -> str:
    """The experiment's id; raises UserError with the nearest name."""
    found = client.get_experiment_by_name(name)
    if found and found.lifecycle_stage == "active":
        return found.experiment_id
    names = [experiment.name for experiment in client.search_experiments()]
    raise UserError(f"there is no experiment {name}{nearest(name, names)}")


def load_runs(
    client: "MlflowClient", experiment_id: str, experiment: str, wanted: tuple[str, ...], training: bool
) -> list[Run]:
    """The experiment's runs, oldest first, or those named; with `training` the long curves of training metrics too.

    Raises:
        UserError: the experiment has no run, or none that is named so.
    """
    records, token = [], None
    while token or not records:
        page = client.search_runs([experiment_id], order_by=["attributes.start_time ASC"], page_token=token)
        if not page:
            raise UserError(
                f"experiment {experiment} has no run yet: `medsynth train configs/tiny/msdm.yaml` makes one"
            )
        records += page
        token = page.token
    records = [record for record in records if STUDY_TAG not in record.data.tags]
    named = [record for record in records if not wanted or {record.info.run_id, record.info.run_name} & set(wanted)]
    known = {name for record in records for name in (record.info.run_id, record.info.run_name)}
    for name in wanted:
        if name not in known:
            raise UserError(f"--runs {name}: no such run in {experiment}{nearest(name, known)}")
    return [_load_run(client, record, _colour(i), training) for i, record in enumerate(named)]


def _load_run(client: "MlflowClient", record: "Record", colour: str, training: bool) -> Run:
    metrics = record.data.metrics
    notes = parse_notes(record.data.tags.get(PROTOCOL_TAG, "[]"))
    unnoted = _unnoted(record)
    history: dict[str, list[tuple[int, float]]] = {}
    for key in (key for key in metrics if better(key) and (training or not key.startswith("train/"))):
        for point in sorted(client.get_metric_history(record.info.run_id, key), key=lambda point: point.step):
            scored_by = at_step(notes, point.step) if key.startswith(SCORES) else None
            digest = scored_by.digest if scored_by else unnoted
            own = with_protocol(key, digest) if key.startswith(SCORES) else key
            history.setdefault(own, []).append((point.step, stored(point.value)))
    return Run(
        id=record.info.run_id,
        name=record.info.run_name,
        status=record.info.status,
        tags=record.data.tags,
        params=record.data.params,
        colour=colour,
        history=history,
        throughput=metrics.get("throughput/images_per_second"),
        protocols={note.protocol.digest: note.protocol for note in notes},
    )


def _unnoted(record: "Record") -> str:
    """What stands for the protocol of a run that has noted none: its config, as far as it decides."""
    said = {key: record.data.params.get(key) for key in _DECIDING}
    return UNNOTED + hashlib.sha256(repr(said).encode()).hexdigest()[:8]


def _colour(index: int) -> str:
    """The CSS colour of a run: hues a golden section apart stay distinct for any number of runs."""
    rgb = colorsys.hls_to_rgb((0.56 + index * 0.618034) % 1, 0.4, 0.65)
    return "#" + "".join(f"{round(255 * channel):02x}" for channel in rgb)


def stored(value: float) -> float:
    """A value as it was logged: databases hold an infinity as the largest float."""
    return math.copysign(math.inf, value) if abs(value) >= sys.float_info.max else value
