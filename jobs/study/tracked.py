"""A study in MLflow: one run above those of its runs."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from omegaconf import OmegaConf

from jobs.report.runs import STUDY_TAG
from jobs.study.read import Study
from jobs.tracking.logger import RunTracker, send_pending
from medsynth.errors import UserError


@contextmanager
def tracked(study: Study, tracking: Any, to_its_end: bool = True) -> Iterator[RunTracker]:
    """The study's own MLflow run, with how the block ended as its status; its folder is the run directory.

    tracking: the tracking section of one of its runs. to_its_end: False where the study goes on elsewhere after a block
    that came to its end.
    """
    settings: Any = OmegaConf.to_object(tracking)
    tracker = RunTracker(study.folder, replace(settings, parent=None, run_name=study.name))
    stages = {f"stages.{stage.name}": f"{len(stage.points)} runs" for stage in study.stages}
    tracker.set_tags({STUDY_TAG: study.name, **stages})
    tracker.log_artifact(study.path)
    try:
        yield tracker
    except (SystemExit, KeyboardInterrupt):
        tracker.finalize("interrupted")
        raise
    except UserError as error:
        tracker.set_tags({"failure": str(error)})
        tracker.finalize("failed")
        raise
    except BaseException:
        tracker.finalize("failed")
        raise
    if to_its_end:
        tracker.finalize("success")
    else:
        with suppress(UserError):  # MLflow is away: who comes next sends it
            send_pending(study.folder, settings.uri)
