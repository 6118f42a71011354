"""`slurm/sweep.sh`: the runs of a sweep, one for each point of its grid.

A sweep is a YAML file with `config`, the preset that all runs share, and `grid`, the values of each key that varies.
"""

from itertools import product
from pathlib import Path

import click
from omegaconf import OmegaConf

from jobs.run.config import load_arguments
from medsynth.errors import UserError


@click.command()
@click.argument("sweep", type=Path)
@click.argument("arguments", nargs=-1, metavar="[FILE.yaml]... [KEY=VALUE]...")
def main(sweep: Path, arguments: tuple[str, ...]) -> None:
    """Print the preset of SWEEP, then the settings of each run, a line a run, with tabs between them.

    Each run is checked with ARGUMENTS, which hold for all of them, before the first line is printed.
    """
    if given := [argument for argument in arguments if argument.startswith("run_dir=")]:
        raise UserError(f"{given[0]}: each run of a sweep has its own, runs/{sweep.stem}/…; leave it out")
    config, runs = read_sweep(sweep)
    for settings in runs:
        load_arguments([config, *settings, *arguments])
    click.echo(config)
    for settings in runs:
        click.echo("\t".join(settings))


def read_sweep(path: Path) -> tuple[str, list[list[str]]]:
    """The preset of the sweep `path` and the settings ("key=value") of each run, its run_dir among them.

    Raises:
        UserError: there is no such file, or it is no sweep.
    """
    try:
        sweep = OmegaConf.to_container(OmegaConf.load(path))
        assert isinstance(sweep, dict)
        config, grid = sweep["config"], sweep["grid"]
        points = list(product(*([(key, value) for value in values] for key, values in grid.items())))
    except FileNotFoundError:
        raise UserError(f"there is no sweep {path}") from None
    except Exception:  # no YAML, another shape: all mean the same to the user
        raise UserError(f"{path} is no sweep: it has `config: FILE` and `grid: {{KEY: [VALUE, …]}}`") from None
    return config, [[*_settings(point), f"run_dir=runs/{path.stem}/{_name(point)}"] for point in points]


def _settings(point: tuple[tuple[str, object], ...]) -> list[str]:
    return [f"{key}={value}" for key, value in point]


def _name(point: tuple[tuple[str, object], ...]) -> str:
    """rank-4: the last word of each key, and its value."""
    return "_".join(f"{key.rpartition('.')[2]}-{value}".replace("/", "-") for key, value in point)


if __name__ == "__main__":
    from jobs.cli import run_command

    run_command(main, "jobs.sweep")
