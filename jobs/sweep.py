"""`slurm/sweep.sh`: the runs of a sweep, one for each point of its grid.

A sweep is a YAML file with `config`, the preset that all runs share, and `grid`, the values of each key that varies.
"""

import json
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import click
from omegaconf import OmegaConf

from jobs.run.checks import check_monitor
from jobs.run.config import load_arguments
from jobs.run.sources import read_file
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
        check_monitor(load_arguments([config, *settings, *arguments]))
    click.echo(config)
    for settings in runs:
        click.echo("\t".join(settings))


def read_sweep(path: Path) -> tuple[str, list[list[str]]]:
    """The preset of the sweep `path` and the settings ("key=value") of each run, its run_dir among them.

    Raises:
        UserError: there is no such file, or it is no sweep.
    """
    if not path.is_file():
        raise UserError(f"there is no sweep {path}")
    try:
        written, read = (OmegaConf.to_container(source) for source in (read_file(path), OmegaConf.load(path)))
        assert isinstance(written, dict) and isinstance(read, dict)
        config, grid = read["config"], read["grid"]
        choices = [[Choice(key, *both) for both in zip(written["grid"][key], grid[key], strict=True)] for key in grid]
        points = list(product(*choices))
    except Exception:  # another shape: all mean the same to the user
        raise UserError(f"{path} is no sweep: it has `config: FILE` and `grid: {{KEY: [VALUE, …]}}`") from None
    runs = {f"run_dir=runs/{path.stem}/{_name(point)}": [choice.setting() for choice in point] for point in points}
    if len(runs) < len(points):
        raise UserError(f"{path}: two of its runs would have one run_dir; give each value once")
    return config, [[*settings, run_dir] for run_dir, settings in runs.items()]


class Choice(NamedTuple):
    """One value of one key: as it is written in the sweep, where text is text, and as YAML reads it."""

    key: str
    written: Any
    read: Any

    def setting(self) -> str:
        """KEY=VALUE of a command line."""
        text = self.written if isinstance(self.written, str) else json.dumps(self.written, ensure_ascii=False)
        return f"{self.key}={text}"


def _name(point: tuple[Choice, ...]) -> str:
    """rank-4: the last word of each key, and its value."""
    return "_".join(f"{choice.key.rpartition('.')[2]}-{choice.read}".replace("/", "-") for choice in point)


if __name__ == "__main__":
    from jobs.cli import run_command

    run_command(main, "jobs.sweep")
