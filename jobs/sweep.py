"""`medsynth sweep`: the runs of a study, stage by stage; docs/sweeps.md says what its file holds."""

from pathlib import Path

import click

from medsynth.errors import UserError


@click.command()
@click.argument("sweep", type=Path, metavar="FILE.yaml")
@click.argument("arguments", nargs=-1, metavar="[CONFIG.yaml]... [KEY=VALUE]...")
@click.option(
    "--folder", type=click.Path(path_type=Path), help="Folder of all of it; by default the file's, or runs/FILE."
)
@click.option("--only", metavar="STAGE[/RUN]", multiple=True, help="Train only this stage or run; repeatable.")
@click.option(
    "--skip-failed", is_flag=True, help="Leave runs that failed out of the choice, and do not try them again."
)
@click.option("--manifests", is_flag=True, help="Print Kubernetes manifests of the runs that can begin, and stop.")
@click.option("--image", help="Container image of --manifests.")
@click.option("--nodes", type=click.IntRange(1), help="Pods a run, of --manifests; by default 1.")
@click.option("--gpus", type=click.IntRange(1), help="GPUs a pod, of --manifests; by default up to 8.")
@click.option(
    "--tables", metavar="PREFIX", help="For slurm/sweep.sh: print what arrays to submit, tables in PREFIX-STAGE."
)
@click.option("--choose", metavar="STAGE", help="For slurm/choose.sh, with --tables: choose the stage's best run.")
@click.option("--dry-run", is_flag=True, help="Print the plan, and how far each run is, and stop.")
@click.option("--report", "report_only", is_flag=True, help="Print and write the report of what there is, and stop.")
def main(
    sweep: Path,
    arguments: tuple[str, ...],
    folder: Path | None,
    only: tuple[str, ...],
    skip_failed: bool,
    manifests: bool,
    image: str | None,
    nodes: int | None,
    gpus: int | None,
    tables: str | None,
    choose: str | None,
    dry_run: bool,
    report_only: bool,
) -> None:
    """Train the runs of a sweep, stage by stage, here and one after the other.

    CONFIG and KEY=VALUE hold for all runs. The same command again goes on: what is done is kept, what was interrupted
    is resumed. slurm/sweep.sh does the same with array jobs.
    """
    from jobs.study.read import read_study

    study = read_study(sweep, arguments, folder)
    if dry_run:
        from jobs.study.show import print_plan

        print_plan(study, skip_failed)
        return
    if tables is not None:
        from jobs.study import slurm

        if choose is None:
            slurm.plan(study, tables, skip_failed)
        else:
            slurm.choose(study, tables, study.stage(choose), skip_failed)
        return
    if manifests:
        from jobs.cluster.kubernetes import IMAGE
        from jobs.study.kubernetes import print_manifests
        from jobs.study.progress import Progress

        print_manifests(Progress(study, skip_failed, only), image or IMAGE, nodes, gpus)
        return
    if choose is not None:
        raise UserError("--choose goes with --tables")
    if any(option is not None for option in (image, nodes, gpus)):
        raise UserError("--image, --nodes and --gpus go with --manifests")
    from jobs.study.local import LocalStudy

    local = LocalStudy(study, skip_failed, only)
    if report_only:
        from jobs.study.report import report

        if not study.folder.is_dir():
            raise UserError(f"{study.folder} is not there: nothing of {sweep} has begun")
        report(study, local.records(), local.best_labels())
    else:
        local.train()


if __name__ == "__main__":
    from jobs.cli import run

    run("sweep")
