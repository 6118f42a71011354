"""The comparison as one HTML page that needs no other file."""

from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, FileSystemLoader

from jobs.report.curves import draw_curves
from jobs.report.runs import Run
from jobs.report.sheets import newest_grid
from jobs.report.table import LEGEND, Comparison, column_heading, heading, sorted_keys

if TYPE_CHECKING:
    from mlflow import MlflowClient


def render_page(comparison: Comparison, runs: list[Run], client: "MlflowClient", uri: str) -> str:
    """The page as HTML that needs no other file: tables, a panel of curves a metric, and each run's newest grid."""
    folder = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=folder, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    keys = sorted_keys(key for run in runs for key in run.history)
    keys += sorted({key for run in runs for key in run.history} - set(keys))
    return environment.get_template("compare.html").render(
        comparison=comparison,
        curves={heading(key, comparison.letters): draw_curves(key, runs) for key in keys},
        grids=[grid for run in runs if (grid := newest_grid(client, run))],
        legend=LEGEND,
        runs=runs,
        column_heading=partial(column_heading, letters=comparison.letters),
        uri=uri,
        time=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    )
