"""A study on Slurm, as slurm/sweep.sh and slurm/choose.sh ask for it: tables of array jobs, and the step between two.

A table has the preset in its first line, then what each run of a stage is given, a line a run, with tabs between.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import click

from jobs.study.plan import arguments_of, runs_of
from jobs.study.progress import Progress
from jobs.study.read import Stage, Study
from jobs.study.record import Record, claim
from jobs.study.report import report
from jobs.study.tracked import tracked
from medsynth.errors import UserError
from medsynth.files import write_whole


def plan(study: Study, tables: str, skip_failed: bool) -> None:
    """Check the study, write TABLES-STAGE.tsv of each stage that is known, and print what is to be submitted.

    A line a stage, with tabs between: its name, its script, the numbers of its runs that are not done (or -), its
    table, and whether a later step is to choose (or -).
    """
    scripts = {stage.name: script_of(stage) for stage in study.stages}
    progress = Progress(study, skip_failed)
    claim(study)
    first = next(iter(progress.configs.values()))
    with tracked(study, first.tracking, to_its_end=False):
        write_tables(progress, tables)
    records = progress.records()
    for stage in study.stages:
        numbers = array_of(places_to_run(progress, stage, records))
        then = "choose" if study.staged else "-"
        click.echo("\t".join([stage.name, scripts[stage.name], numbers or "-", table_of(tables, stage), then]))


def choose(study: Study, tables: str, stage: Stage, skip_failed: bool) -> None:
    """Choose the best run of a stage, write the tables of the stages that are known by it, and report.

    Raises:
        UserError: it has none.
    """
    progress = Progress(study, skip_failed)
    first = next(iter(progress.configs.values()))
    with tracked(study, first.tracking, to_its_end=stage == study.stages[-1]) as tracker:
        try:
            progress.finish(stage)
            write_tables(progress, tables)
        finally:
            report(study, progress.records(), progress.best_labels(), tracker)


def script_of(stage: Stage) -> str:
    """The batch script that trains the stage's preset, which is the first of its config files.

    Raises:
        UserError: there is none.
    """
    if stage.files:
        script = Path("slurm") / f"{Path(stage.files[0]).stem}.sh"
        if script.is_file() and f"launch {stage.files[0]} " in script.read_text(encoding="utf-8"):
            return str(script)
    first = stage.files[0] if stage.files else "the config in the file"
    raise UserError(f"stage {stage.name}: no script of slurm/ trains {first}; name a preset of configs/ first")


def table_of(prefix: str, stage: Stage) -> str:
    """Where the table of a stage lies."""
    return f"{prefix}-{stage.name}.tsv"


def write_tables(progress: Progress, prefix: str) -> None:
    """Write the table of each stage that builds on what is known by now.

    Raises:
        UserError: a run has begun with another config than its stage now says.
    """
    study = progress.study
    for stage in study.stages:
        try:
            best = {name: progress.best(study.stage(name)) for name in stage.needs}
        except UserError:  # for the step after the stage that it builds on to say
            continue
        lines = [stage.files[0]]
        for run in runs_of(study, stage):
            progress.config(run)  # refuses what contradicts what ran
            given = arguments_of(study, run, best)
            lines.append("\t".join(given[1 : len(given) - len(study.arguments)]))
        path = Path(table_of(prefix, stage))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, "\n".join(lines) + "\n")


def places_to_run(progress: Progress, stage: Stage, records: Mapping[str, Record]) -> list[int]:
    """The numbers, from 1, of the runs of a stage that are to be trained."""
    wanted = progress.to_train(stage, records)
    return [number for number, run in enumerate(runs_of(progress.study, stage), 1) if run in wanted]


def array_of(numbers: Sequence[int]) -> str:
    """Rising numbers as sbatch's --array takes them: 1-3,6."""
    ends = [None, *(a for a, b in pairwise(numbers) if b != a + 1), *numbers[-1:]]
    begins = [*numbers[:1], *(b for a, b in pairwise(numbers) if b != a + 1)]
    return ",".join(f"{a}-{b}" if a != b else str(a) for a, b in zip(begins, ends[1:], strict=True))
