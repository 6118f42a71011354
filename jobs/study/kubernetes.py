"""A sweep's runs as Kubernetes Jobs: the manifests of what can be trained by now.

Called where the sweep's folder is what pods have at `runs/`: in a pod with the volumes, or on a machine that mounts
them.
"""

from collections.abc import Iterator

import click

from jobs.cluster.kubernetes import load_for_pods, object_name, render
from jobs.study.plan import Run, arguments_of
from jobs.study.progress import Progress
from jobs.study.read import Study
from jobs.study.record import claim
from jobs.study.report import report
from jobs.study.tracked import tracked
from medsynth.errors import UserError


def print_manifests(progress: Progress, image: str, nodes: int | None, gpus: int | None) -> None:
    """Print a manifest for each run that is not done and whose earlier stages are; where all are done, report.

    Raises:
        UserError: a stage has no best, for its runs failed or have no score; two runs would be one Job.
    """
    study = progress.study
    claim(study)
    wanted = list(runs_to_train(progress))
    names = [name_of(study, run) for run in wanted]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{name} would be two Jobs; give the runs of {study.path} a `name` in a `list`")
    first = next(iter(progress.configs.values()))
    with tracked(study, first.tracking, to_its_end=not wanted) as tracker:
        for run, name in zip(wanted, names, strict=True):
            best = {stage: progress.best(study.stage(stage)) for stage in run.stage.needs}
            progress.config(run)  # refuses what contradicts what ran
            config = load_for_pods(arguments_of(study, run, best), nodes, gpus)
            click.echo(f"---\n{render(config, name=name, image=image).rstrip()}")
        if not wanted:
            for stage in study.stages:
                progress.finish(stage)
            report(study, progress.records(), progress.best_labels(), tracker)
    click.echo(f"{len(wanted)} runs to train: {', '.join(run.label for run in wanted) or 'none'}", err=True)


def runs_to_train(progress: Progress) -> Iterator[Run]:
    """Those that are not done, of the stages whose beginnings are known.

    Raises:
        UserError: a stage whose runs have all ended has no best.
    """
    records, open_stages = progress.records(), set()
    for stage in progress.study.stages:
        if stage.needs & open_stages:
            open_stages.add(stage.name)
            continue
        runs = progress.to_train(stage, records)
        yield from (run for run in runs if progress.meant(run))
        if runs:
            open_stages.add(stage.name)
        else:
            progress.chosen(stage)


def name_of(study: Study, run: Run) -> str:
    """The Job's: the study's and the run's."""
    return object_name(f"{study.name}-{run.label}-train")
