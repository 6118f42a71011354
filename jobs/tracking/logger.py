"""MLflow logging that never stops or slows training.

Every event is first appended to a spool in the run directory; one daemon thread sends the spool to MLflow and records
how far it has come. A server that is away costs training nothing: what could not be sent waits for the server, for the
next start of the same run directory, or for `send_pending`.
"""

import logging
import re
import time
import uuid
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Optional

import numpy as np
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from jobs.tracking.sender import PARENT, Sender, SenderThread
from jobs.tracking.server import (
    DEFAULT_EXPERIMENT,
    PARAM_LENGTH,
    TAG_LENGTH,
    cause,
    failure,
    import_mlflow,
    public_uri,
    resolve_uri,
    sqlite_path,
    valid_key,
)
from jobs.tracking.spool import Spool, milliseconds, read_identity, read_run_id
from medsynth.errors import UserError
from medsynth.ranges import number

_log = logging.getLogger(__name__)

_FINAL_STATUS = {"success": "FINISHED", "failed": "FAILED", "interrupted": "KILLED", "killed": "KILLED"}
_BY_GRAVITY = ("FINISHED", "FAILED", "KILLED")


@dataclass
class TrackingConfig:
    """Where a run is logged."""

    uri: Optional[str] = None
    """MLflow tracking URI: http(s)://… or a database; null takes $MLFLOW_TRACKING_URI, else sqlite:///mlruns.db."""
    experiment: str = DEFAULT_EXPERIMENT
    """MLflow experiment; made where it does not exist."""
    run_name: Optional[str] = None
    """The run's name in MLflow; null takes the name the job gives, else that of the run directory."""
    parent: Optional[str] = None
    """Folder of the study that this run is a part of; MLflow shows the run below the study's."""
    timeout_seconds: float = number(30.0, least=0)
    """How long the end of a run waits for an unreachable server, seconds."""


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
        self._append("metrics", step=step, values={valid_key(name): float(value) for name, value in metrics.items()})

    @rank_zero_only
    def log_hyperparams(self, params: Mapping[str, Any] | Namespace, *_: Any, **__: Any) -> None:
        """Log params: nested mappings flattened with dots, values as text of at most 6,000 characters.

        A param never changes in MLflow: one that has another value already becomes the tag `resumed.<key>`.
        """
        for key, value in _flat(vars(params) if isinstance(params, Namespace) else params):
            self._append("param", key=key, value=str(value)[:PARAM_LENGTH])

    @rank_zero_only
    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Set tags, values as text of at most 8,000 characters. A tag can be set again."""
        for key, value in tags.items():
            self._append("tag", key=valid_key(key), value=str(value)[:TAG_LENGTH])

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
        if "_spool" not in vars(self):  # no disk has taken the first event
            return
        began = time.monotonic()
        drained = self._thread.flush(self._patience)
        self._patience = max(0.0, self._patience - (time.monotonic() - began))
        if not drained:
            message = "Not all of this run has reached MLflow at %s. It is kept: `medsynth track %s` sends it."
            _log.warning(message, public_uri(self.uri), self.run_dir)

    @cached_property
    def _spool(self) -> Spool:
        """The spool, opened for the first event, which makes the run go on where its directory had come to."""
        spool = Spool(self.run_dir)
        made = {"key": uuid.uuid4().hex, "run_id": None, "started": milliseconds()}
        now = {"tracking_uri": public_uri(self.uri), "experiment": self.name, "run_name": self._run_name}
        parent = read_identity(self.config.parent) if self.config.parent else {}
        now |= {"parent": {key: parent[key] for key in PARENT if key in parent}} if parent else {}
        spool.save("run.json", made | spool.load("run.json") | now)
        spool.append("status", status="RUNNING")
        import_mlflow()  # here, not in the thread: a worker forked during an import would inherit its lock, and hang
        self._thread = SenderThread(Sender(spool, self.uri), public_uri(self.uri))
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


def _flat(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in params.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield valid_key(f"{prefix}{name}"), value


def send_pending(run_dir: str | Path, uri: str | None = None) -> int:
    """Send what a run could not send while it ran; the number of events sent.

    `uri`: the tracking URI; None takes the one the run had.

    Raises:
        UserError: the folder holds no record of a run, or MLflow cannot be reached.
    """
    folder = Path(run_dir).absolute()
    if not (folder / "tracking" / "run.json").is_file():
        raise UserError(f"{run_dir} holds no record of a run (tracking/run.json): name the run directory of a training")
    spool = Spool(folder)
    known = spool.load("run.json")["tracking_uri"]
    uri = resolve_uri(uri or (None if "***" in known else known))  # a password is not stored: the environment has it
    sender, file = Sender(spool, uri), sqlite_path(uri)
    mend = "start the server and try again" if file is None else f"see to {file} and try again"
    try:
        sender.send()
    except Exception as error:
        kind, told = failure(error, public_uri(uri))
        if kind != "away":
            raise UserError(f"{told}. The record of {run_dir} is kept, and sent when you try again then") from None
        raise UserError(
            f"MLflow at {public_uri(uri)} cannot take the record of {run_dir}: {cause(error)}. "
            f"The record is kept; {mend}"
        ) from error
    return sender.sent
