"""`medsynth track`: send to MLflow what a run could not send."""

from pathlib import Path

import click


@click.command()
@click.argument("run_dir", metavar="RUN", type=click.Path(path_type=Path))
def main(run_dir: Path) -> None:
    """Send what is left in a run directory's spool, for instance after the tracking server was away."""
    from jobs.tracking.logger import send_pending

    click.echo(f"{send_pending(run_dir)} events sent")


if __name__ == "__main__":
    from jobs.cli import run

    run("track")
