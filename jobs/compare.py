"""`medsynth compare`: the runs of an experiment beside the papers' own figures, as a table and as one HTML page."""

import base64
import io
import math
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Optional

import click

from jobs.registry import nearest
from medsynth.errors import UserError

# Which way a metric is better, in the order of the columns. A name that goes on after "_" is of the same kind: fd_random.
_BETTER: dict[str, Callable] = {
    "fid": min,
    "fd": min,
    "clef_fid": min,
    "isc": max,
    "clef_is": max,
    "kid": min,
    "kd": min,
    "precision": max,
    "recall": max,
    "f1": max,
    "psnr": max,
    "ssim": max,
    "lpips": min,
    "norberg_pearson": max,
    "norberg_r2": max,
    "loss": min,
}

_COLOURS = (
    "#0b6e99",
    "#d9730d",
    "#0f7b6c",
    "#ad1a72",
    "#6940a5",
    "#a0522d",
    "#4f5b66",
    "#b8860b",
    "#c0392b",
    "#2f4b9c",
)
_PICTURE_SIDE = 1024  # pixels of an embedded grid's longer side, at most
_CURVE_POINTS = 400  # of a curve, at most


@dataclass
class PaperFigure:
    """One entry of paper_figures.yaml, which says what the fields are."""

    methods: list[str]
    label: str
    variant: str
    paper: str
    data: str
    protocol: str
    metrics: dict[str, Any]
    extractor: Optional[str] = None
    resolution: Optional[int] = None
    parameters: Optional[float] = None
    throughput: Optional[str] = None


@dataclass
class Run:
    """What is compared of one MLflow run."""

    id: str
    name: str
    status: str
    tags: dict[str, str]
    params: dict[str, str]
    colour: str
    history: dict[str, list[tuple[int, float]]]
    """Metric key -> (step, value) by step; not finite where training was not."""
    throughput: float | None
    """Newest throughput/images_per_second."""

    @property
    def method(self) -> str:
        return self.tags.get("method", "unknown")

    @property
    def data(self) -> str:
        return self.params.get("data.name", "unknown")

    def best(self, key: str) -> tuple[int, float] | None:
        """(step, value) of the best finite value; None without one."""
        finite = [point for point in self.history.get(key, []) if math.isfinite(point[1])]
        return better(key)(finite, key=lambda point: point[1]) if finite else None


@dataclass
class Row:
    """A line of the table, as text: a run's, or a paper's (`colour` None)."""

    name: str
    method: str
    colour: str | None = None
    status: str = ""
    data: str = ""
    step: str = ""
    trained: str = ""
    values: list[str] = field(default_factory=list)
    throughput: str = ""
    notes: list[int] = field(default_factory=list)
    leads: list[bool] = field(default_factory=list)
    """For each value, whether no run of the method has a better one."""


@dataclass
class Comparison:
    """The whole table."""

    experiment: str
    keys: list[str]
    groups: list[list[Row]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    figures: list[PaperFigure] = field(default_factory=list)
    """The papers' results that have a row."""

    def heading(self, key: str) -> str:
        return f"{key.removeprefix('eval/')} {'↓' if better(key) is min else '↑'}"


@click.command()
@click.option("--experiment", metavar="NAME", default="medsynth", show_default=True, help="MLflow experiment.")
@click.option(
    "--tracking-uri",
    metavar="URI",
    show_default="$MLFLOW_TRACKING_URI, else sqlite:///mlruns.db",
    help="MLflow server (http://…) or database.",
)
@click.option(
    "--runs", metavar="RUN", multiple=True, show_default="all", help="Only this run, by name or id; repeatable."
)
@click.option(
    "--metric", metavar="KEY", show_default="the first column", help="Metric to sort by, for instance eval/fid."
)
@click.option(
    "--html",
    type=click.Path(dir_okay=False, path_type=Path),
    default="compare.html",
    show_default=True,
    help="Page with table, curves and pictures; one file that needs no other.",
)
@click.option("--no-html", is_flag=True, help="Print the table only.")
def main(
    experiment: str, tracking_uri: str | None, runs: tuple[str, ...], metric: str | None, html: Path, no_html: bool
) -> None:
    """Compare the runs of an experiment with each other and with the papers' own figures."""
    from jobs.tracking import public_uri, resolve_uri

    uri = resolve_uri(tracking_uri)
    client = _connect(uri)
    found = _load_runs(client, _find_experiment(client, experiment), experiment, runs)
    comparison = compare(experiment, found, paper_figures(), metric)
    print_table(comparison)
    if not no_html:
        html.write_text(render_page(comparison, found, client, public_uri(uri)), encoding="utf-8")
        click.echo(f"page: {html}")


def better(key: str) -> Callable | None:
    """`min` or `max`, whichever is better of a metric; None for a spread (…_std) and for names of no known kind."""
    kind = _kind(key)
    return _BETTER[kind] if kind and not key.endswith("_std") else None


def _kind(key: str) -> str | None:
    name = key.rpartition("/")[2]
    return next((kind for kind in _BETTER if name == kind or name.startswith(f"{kind}_")), None)


def paper_figures() -> list[PaperFigure]:
    """The papers' own figures, in the order of paper_figures.yaml."""
    from omegaconf import OmegaConf

    entries = OmegaConf.load(Path(__file__).with_name("paper_figures.yaml"))
    return [OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(PaperFigure), entry)) for entry in entries]


def _connect(uri: str):
    """A client of a server that answers."""
    from jobs.tracking import cause, mlflow_client, public_uri, sqlite_path

    database = sqlite_path(uri)
    if database and not database.exists():  # MLflow would make an empty one
        raise UserError(f"there is no MLflow database {database}: a run makes it, or name another with --tracking-uri")
    try:
        client = mlflow_client(uri)
        client.search_experiments(max_results=1)
    except Exception as error:
        raise UserError(
            f"MLflow at {public_uri(uri)} cannot be reached: {cause(error)}; start it, or name another with --tracking-uri"
        ) from error
    return client


def _find_experiment(client, name: str) -> str:
    if found := client.get_experiment_by_name(name):
        return found.experiment_id
    names = [experiment.name for experiment in client.search_experiments()]
    raise UserError(f"there is no experiment {name}{nearest(name, names)}")


def _load_runs(client, experiment_id: str, experiment: str, wanted: tuple[str, ...]) -> list[Run]:
    """The experiment's runs, oldest first, or those named."""
    records, token = [], None
    while token or not records:
        page = client.search_runs([experiment_id], order_by=["attributes.start_time ASC"], page_token=token)
        if not page:
            raise UserError(
                f"experiment {experiment} has no run yet: `medsynth train configs/tiny/msdm.yaml` makes one"
            )
        records += page
        token = page.token
    named = [record for record in records if not wanted or {record.info.run_id, record.info.run_name} & set(wanted)]
    known = {name for record in records for name in (record.info.run_id, record.info.run_name)}
    for name in wanted:
        if name not in known:
            raise UserError(f"--runs {name}: no such run in {experiment}{nearest(name, known)}")
    return [_load_run(client, record, _COLOURS[i % len(_COLOURS)]) for i, record in enumerate(named)]


def _load_run(client, record, colour: str) -> Run:
    metrics = record.data.metrics
    history = {
        key: sorted((point.step, _value(point.value)) for point in client.get_metric_history(record.info.run_id, key))
        for key in metrics
        if better(key)
    }
    return Run(
        id=record.info.run_id,
        name=record.info.run_name,
        status=record.info.status,
        tags=record.data.tags,
        params=record.data.params,
        colour=colour,
        history=history,
        throughput=metrics.get("throughput/images_per_second"),
    )


def _value(value: float) -> float:
    """Databases hold an infinity as the largest float."""
    return math.copysign(math.inf, value) if abs(value) >= sys.float_info.max else value


def compare(experiment: str, runs: list[Run], figures: list[PaperFigure], metric: str | None = None) -> Comparison:
    """The table: a group a method, the papers' rows first, then the runs, the best by `metric` on top.

    Raises:
        UserError: no run has `metric`.
    """
    scored = {key for run in runs for key in run.history if not key.startswith("train/")}
    order = list(_BETTER)
    keys = sorted(scored, key=lambda key: (order.index(_kind(key)), key))
    if metric and metric not in keys:
        raise UserError(f"--metric {metric}: no run has it{nearest(metric, keys)}")
    ranking = metric or next(iter(keys), None)
    comparison = Comparison(experiment, keys)
    for method in sorted({run.method for run in runs}):
        members = sorted([run for run in runs if run.method == method], key=lambda run: _rank(run, ranking))
        published = _figures_for(members, figures)
        comparison.figures += published
        comparison.groups.append(_group(comparison, members, published, ranking))
    return comparison


def _rank(run: Run, key: str | None) -> float:
    """Smaller is better; runs without the metric come last."""
    best = run.best(key) if key else None
    if best is None:
        return math.inf
    return best[1] if better(key) is min else -best[1]


def _figures_for(runs: list[Run], figures: list[PaperFigure]) -> list[PaperFigure]:
    """The papers' results with the runs' method: those on the runs' data, or where there are none, all."""
    same_method = [figure for figure in figures if runs[0].method in figure.methods]
    same_data = [figure for figure in same_method if figure.data in {run.data for run in runs}]
    return same_data or same_method


def _group(comparison: Comparison, runs: list[Run], figures: list[PaperFigure], ranking: str | None) -> list[Row]:
    keys = comparison.keys
    leading = {key: min((_rank(run, key) for run in runs), default=math.inf) for key in keys}
    rows = [_paper_row(comparison, figure) for figure in figures]
    for run in runs:
        best = run.best(ranking) if ranking else None
        trained = run.tags.get("parameters.trained")
        rows.append(
            Row(
                name=run.name,
                method=run.method,
                colour=run.colour,
                status=run.status.lower(),
                data=f"{run.data} {run.tags.get('data.fingerprint', '')[:8]}".strip(),
                step=f"{best[0]:,}" if best else "",
                trained=_millions(float(trained)) if trained else "",
                values=[_best_and_last(run, key) for key in keys],
                throughput=f"{run.throughput:.4g}" if run.throughput is not None else "",
                notes=_numbers(comparison, [reason for figure in figures for reason in mismatches(run, figure)]),
                leads=[_rank(run, key) == leading[key] < math.inf for key in keys],
            )
        )
    return rows


def _paper_row(comparison: Comparison, figure: PaperFigure) -> Row:
    names = {key.rpartition("/")[2]: key for key in comparison.keys if key.startswith("eval/")}
    others = [f"{name} {value}" for name, value in figure.metrics.items() if name not in names]
    note = f"{figure.variant}; scored: {figure.protocol}" + "".join(f"; {other}" for other in others)
    values = [str(figure.metrics.get(key.removeprefix("eval/"), "")) for key in comparison.keys]
    return Row(
        name=f"paper: {figure.label}",
        method=", ".join(figure.methods),
        data=figure.data,
        trained=_millions(figure.parameters) if figure.parameters else "",
        values=values,
        throughput=figure.throughput or "",
        notes=_numbers(comparison, [note]),
        leads=[False] * len(values),
    )


def mismatches(run: Run, figure: PaperFigure) -> list[str]:
    """Why the run's metrics do not compare with the paper's, one reason each; empty where nothing speaks against it."""
    reasons = []
    if run.data != figure.data:
        reasons.append(f"other data ({run.data}; {figure.label}: {figure.data})")
    extractor = run.tags.get("extractor")
    if figure.extractor and extractor not in (None, "none", figure.extractor):
        reasons.append(f"other extractor ({extractor}; {figure.label}: {figure.extractor})")
    resolution = run.params.get("data.resolution")
    if figure.resolution and resolution not in (None, str(figure.resolution)):
        reasons.append(f"other resolution ({resolution}; {figure.label}: {figure.resolution})")
    return [f"not comparable with the paper: {reason}" for reason in reasons]


def _numbers(comparison: Comparison, notes: Iterable[str]) -> list[int]:
    """The numbers, from 1, of these notes in the comparison; a new one is added."""
    notes = list(dict.fromkeys(notes))
    comparison.notes += [note for note in notes if note not in comparison.notes]
    return [comparison.notes.index(note) + 1 for note in notes]


def _best_and_last(run: Run, key: str) -> str:
    """`best`, or `best (last)` where they differ."""
    best, points = run.best(key), run.history.get(key, [])
    if best is None:
        return f"{points[-1][1]}" if points else ""
    last = points[-1][1]
    return f"{best[1]:.4g}" if last == best[1] else f"{best[1]:.4g} ({last:.4g})"


def _millions(count: float) -> str:
    return f"{count / 1e9:.3g} B" if count >= 1e9 else f"{count / 1e6:.3g} M"


def print_table(comparison: Comparison) -> None:
    """Print the table with its notes; as wide as it needs where the output is no terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"Experiment {comparison.experiment}", caption="best (last); ↓ lower is better, ↑ higher")
    headings = ["run", "method", "status", "data", "step", "trained"]
    for heading in headings + [comparison.heading(key) for key in comparison.keys] + ["images/s", "notes"]:
        table.add_column(heading, justify="left" if heading in headings[:4] else "right", overflow="fold")
    for group in comparison.groups:
        for row in group:
            values = [Text(value, "bold" if lead else "") for value, lead in zip(row.values, row.leads, strict=True)]
            cells = [Text(cell) for cell in (row.name, row.method, row.status, row.data, row.step, row.trained)]
            notes = Text(" ".join(f"[{number}]" for number in row.notes))
            style = None if row.colour else "italic cyan"
            table.add_row(*cells, *values, row.throughput, notes, style=style, end_section=row is group[-1])
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, console.measure(table, options=console.options.update(width=10_000)).maximum)
    console.print(table)
    for number, note in enumerate(comparison.notes, 1):
        console.print(Text(f"[{number}] {note}"))


def render_page(comparison: Comparison, runs: list[Run], client, uri: str) -> str:
    """The page as HTML that needs no other file: table, a panel of curves a metric, and each run's newest grid."""
    from jinja2 import Environment, FileSystemLoader

    folder = FileSystemLoader(Path(__file__).parent)
    template = Environment(loader=folder, autoescape=True, trim_blocks=True, lstrip_blocks=True).get_template(
        "compare.html"
    )
    others = sorted({key for run in runs for key in run.history} - set(comparison.keys))
    return template.render(
        comparison=comparison,
        curves=[
            (comparison.heading(key), draw_curves(key, runs, comparison.figures)) for key in [*comparison.keys, *others]
        ],
        grids=[grid for run in runs if (grid := _newest_grid(client, run))],
        runs=runs,
        uri=uri,
        time=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    )


def draw_curves(key: str, runs: list[Run], figures: Iterable[PaperFigure] = ()) -> str:
    """An SVG element: `key` over steps, a line a run, and a dashed line for each of the papers' values."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": key, "font.size": 9, "font.family": "sans-serif"}
    ):
        figure = Figure(figsize=(4.6, 2.6), layout="constrained")
        axes = figure.subplots()
        for run in runs:
            points = [point for point in run.history.get(key, []) if math.isfinite(point[1])]
            points = points[:: -(-len(points) // _CURVE_POINTS) or 1]
            axes.plot(*zip(*points, strict=True) if points else ([], []), color=run.colour, marker=".", linewidth=1.3)
        for value in {figure.metrics.get(key.removeprefix("eval/")) for figure in figures} - {None}:
            if isinstance(value, int | float):
                axes.axhline(value, color="#888888", linestyle="--", linewidth=1)
        _style(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return buffer.getvalue().partition("<svg")[2].join(("<svg", ""))


def _style(axes) -> None:
    axes.set_xlabel("step")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    low, high = axes.dataLim.intervaly
    if 0 < low < high / 30:
        axes.set_yscale("log")


@dataclass
class Grid:
    """A run's newest picture of samples."""

    run: Run
    step: int
    source: str
    """data: URI of a WebP."""
    width: int
    height: int
    """Of the picture as logged, pixels."""


def _newest_grid(client, run: Run) -> Grid | None:
    from PIL import Image

    from jobs.tracking import logged_images

    images = [image for image in logged_images(client, run.id) if image.key == "eval/grid"]
    if not images:
        return None
    with tempfile.TemporaryDirectory() as folder:
        with Image.open(client.download_artifacts(run.id, images[-1].path, folder)) as picture:
            width, height = picture.size
            picture.thumbnail((_PICTURE_SIDE, _PICTURE_SIDE))
            buffer = io.BytesIO()
            picture.save(buffer, "webp", quality=90)
    source = "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
    return Grid(run, images[-1].step, source, width, height)


if __name__ == "__main__":
    from jobs.cli import run

    run("compare")
