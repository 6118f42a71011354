"""Which run of a stage is its best."""

import math
from collections.abc import Mapping, Sequence

from jobs.study.plan import Run
from jobs.study.read import Choose, Stage
from jobs.study.record import Record, State
from medsynth.errors import UserError


def best_of(scores: Sequence[float | None], mode: str) -> int | None:
    """The place of the best finite score, of equal ones the first; None where there is none.

    mode: "min" or "max".
    """
    sign = 1 if mode == "min" else -1
    finite = [(sign * score, place) for place, score in enumerate(scores) if score is not None and math.isfinite(score)]
    return min(finite)[1] if finite else None


def choose(stage: Stage, runs: Sequence[Run], records: Mapping[str, Record], skip_failed: bool) -> Run | None:
    """The best run of a stage; None while a run has not ended, and of a stage whose best nobody asks for.

    skip_failed: leave failed runs out, in the place of refusing.

    Raises:
        UserError: runs failed, or none has a score.
    """
    states = {run.label: records[run.label].state for run in runs}
    failed = [run for run in runs if states[run.label] is State.FAILED]
    if any(state in (State.WAITING, State.BEGUN) for state in states.values()):
        return None
    if failed and not skip_failed:
        raise UserError(_failures(stage, runs, failed, records))
    done = [run for run in runs if states[run.label] is State.DONE]
    if not done:
        raise UserError(f"stage {stage.name}: no run has finished; {_first_reason(failed, records)}")
    if stage.choose is None:
        return done[0] if len(stage.points) == 1 else None
    place = best_of([records[run.label].score(stage.choose.metric) for run in done], stage.choose.mode)
    if place is None:
        raise UserError(_no_score(stage, stage.choose, done, records))
    return done[place]


def _failures(stage: Stage, runs: Sequence[Run], failed: Sequence[Run], records: Mapping[str, Record]) -> str:
    names = ", ".join(run.label for run in failed)
    return (
        f"stage {stage.name}: {len(failed)} of {len(runs)} runs failed ({names}; {_first_reason(failed, records)}); "
        "mend that and start again, or leave them out with --skip-failed"
    )


def _first_reason(failed: Sequence[Run], records: Mapping[str, Record]) -> str:
    return "; ".join(f"{run.label}: {records[run.label].reason or 'its log says why'}" for run in failed[:1])


def _no_score(stage: Stage, choose: Choose, done: Sequence[Run], records: Mapping[str, Record]) -> str:
    logged = sorted({key for run in done for key in records[run.label].history if not key.startswith("throughput/")})
    if choose.metric in logged:
        why = "is not finite after the step whose weights are exported, or was not logged there"
        return f"stage {stage.name}: {choose.metric} {why}; set checkpoint.monitor={choose.metric}"
    return f"stage {stage.name}: no run has logged {choose.metric}; they have {', '.join(logged)}"
