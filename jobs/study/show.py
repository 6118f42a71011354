"""A study's plan, as text."""

import shlex

import click

from jobs.study.plan import arguments_of, runs_of
from jobs.study.progress import Progress
from jobs.study.read import Study
from medsynth.errors import UserError


def print_plan(study: Study, skip_failed: bool) -> None:
    """Print each stage, its runs, how far they are and what they are given; nothing is written.

    References stand as they are until the best they name is known.
    """
    progress = Progress(study, skip_failed)
    records, best = progress.records(), {}
    click.echo(f"{study.name}: {len(study.stages)} stages, {len(records)} runs, in {study.folder}")
    for number, stage in enumerate(study.stages, 1):
        by = f", best by {stage.choose.mode} {stage.choose.metric}" if stage.choose else ""
        after = f", after {', '.join(sorted(stage.needs))}" if stage.needs else ""
        click.echo(f"stage {number} {stage.name}: {len(stage.points)} runs{by}{after}")
        for run in runs_of(study, stage):
            click.echo(f"  {run.label}: {records[run.label].state}")
            click.echo(f"    medsynth train {shlex.join(arguments_of(study, run, best))}")
        try:
            best[stage.name] = progress.best(stage)
        except UserError:
            continue
