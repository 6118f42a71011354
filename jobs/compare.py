"""`medsynth compare`: the runs of an experiment beside the papers' own figures, as a table and as one HTML page."""

import base64
import colorsys
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

from jobs.run.registry import nearest
from medsynth.errors import UserError

# Which way a metric is better, in the order of the columns. A name that goes on after "_", as fd_random, counts too.
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

_LEGEND = (
    "Each value is the best, the last in brackets where it differs; ↓ lower is better, ↑ higher; bold leads among the "
    "method's runs. Only runs with the same data fingerprint saw the same pictures; a paper's pictures are its own."
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
    variant: str = ""
    colour: str | None = None
    status: str = ""
    data: str = ""
    step: str = ""
    trained: str = ""
    values: list[str] = field(default_factory=list)
    throughput: str = ""
    notes: list[int] = field(default_factory=list)
    leads: list[bool] = field(default_factory=list)
    """For each value, whether it is printed bold."""


@dataclass
class Group:
    """The rows of one method, the papers' first, under the metrics that its runs or papers have."""

    method: str
    keys: list[str]
    figures: list[PaperFigure]
    rows: list[Row] = field(default_factory=list)


@dataclass
class Comparison:
    """All groups, and the notes that their rows refer to by number from 1."""

    experiment: str
    groups: list[Group] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def numbers(self, notes: Iterable[str]) -> list[int]:
        """The numbers of these notes, of which new ones are added."""
        notes = list(dict.fromkeys(notes))
        self.notes += [note for note in notes if note not in self.notes]
        return [self.notes.index(note) + 1 for note in notes]


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
    from jobs.tracking.server import public_uri, resolve_uri

    uri = resolve_uri(tracking_uri)
    client = _connect(uri)
    found = _load_runs(client, _find_experiment(client, experiment), experiment, runs, training=not no_html)
    comparison = compare(experiment, found, paper_figures(), metric)
    print_table(comparison)
    if not no_html:
        html.parent.mkdir(parents=True, exist_ok=True)
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
    from jobs.tracking.server import cause, mlflow_client, public_uri, sqlite_path

    database = sqlite_path(uri)
    if database and not database.exists():  # MLflow would make an empty one
        raise UserError(f"there is no MLflow database {database}: a run makes it, or name another with --tracking-uri")
    try:
        client = mlflow_client(uri)
        client.search_experiments(max_results=1)
    except Exception as error:
        reason = f"MLflow at {public_uri(uri)} cannot be reached: {cause(error)}"
        raise UserError(f"{reason}; start it, or name another with --tracking-uri") from error
    return client


def _find_experiment(client, name: str) -> str:
    found = client.get_experiment_by_name(name)
    if found and found.lifecycle_stage == "active":
        return found.experiment_id
    names = [experiment.name for experiment in client.search_experiments()]
    raise UserError(f"there is no experiment {name}{nearest(name, names)}")


def _load_runs(client, experiment_id: str, experiment: str, wanted: tuple[str, ...], training: bool) -> list[Run]:
    """The experiment's runs, oldest first, or those named; with `training` the long curves of training metrics too."""
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
    return [_load_run(client, record, _colour(i), training) for i, record in enumerate(named)]


def _load_run(client, record, colour: str, training: bool) -> Run:
    metrics = record.data.metrics
    history = {
        key: sorted((point.step, _value(point.value)) for point in client.get_metric_history(record.info.run_id, key))
        for key in metrics
        if better(key) and (training or not key.startswith("train/"))
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


def _colour(index: int) -> str:
    """The CSS colour of a run: hues a golden section apart stay distinct for any number of runs."""
    rgb = colorsys.hls_to_rgb((0.56 + index * 0.618034) % 1, 0.4, 0.65)
    return "#" + "".join(f"{round(255 * channel):02x}" for channel in rgb)


def _value(value: float) -> float:
    """Databases hold an infinity as the largest float."""
    return math.copysign(math.inf, value) if abs(value) >= sys.float_info.max else value


def compare(experiment: str, runs: list[Run], figures: list[PaperFigure], metric: str | None = None) -> Comparison:
    """The runs by method, the best by `metric` on top, or by the first metric of the method.

    Raises:
        UserError: no run has `metric`.
    """
    known = _sorted_keys(key for run in runs for key in run.history)
    if metric and metric not in known:
        raise UserError(f"--metric {metric}: no run has it{nearest(metric, known)}")
    comparison = Comparison(experiment)
    for method in sorted({run.method for run in runs}):
        _add_group(comparison, [run for run in runs if run.method == method], figures, metric)
    return comparison


def _add_group(comparison: Comparison, runs: list[Run], figures: list[PaperFigure], metric: str | None) -> None:
    own = _sorted_keys(key for run in runs for key in run.history)
    ranking = metric if metric in own else next(iter(own), "")
    published = _published(runs, figures)
    theirs = {f"eval/{name}" for figure in published for name in figure.metrics}
    group = Group(runs[0].method, _sorted_keys({*own, *filter(better, theirs)}), published)
    group.rows = [_paper_row(comparison, group.keys, figure) for figure in published]
    for run in sorted(runs, key=lambda run: _rank(run, ranking)):
        row = _run_row(run, group.keys, ranking)
        row.leads = [_leads(run, runs, key) for key in group.keys]
        row.notes = comparison.numbers(reason for figure in published for reason in mismatches(run, figure))
        group.rows.append(row)
    comparison.groups.append(group)


def _sorted_keys(keys: Iterable[str]) -> list[str]:
    """Those that a column is made of, in the order of the columns."""
    order = list(_BETTER)
    return sorted({key for key in keys if not key.startswith("train/")}, key=lambda key: (order.index(_kind(key)), key))


def _rank(run: Run, key: str) -> float:
    """Smaller is better; infinite for a run without the metric."""
    best = run.best(key)
    if best is None:
        return math.inf
    return best[1] if better(key) is min else -best[1]


def _leads(run: Run, runs: list[Run], key: str) -> bool:
    """Whether the run is the best, or one of the best, of several that have the metric."""
    ranks = [rank for rank in (_rank(other, key) for other in runs) if rank < math.inf]
    return len(ranks) > 1 and _rank(run, key) == min(ranks)


def _published(runs: list[Run], figures: list[PaperFigure]) -> list[PaperFigure]:
    """The papers' results with the runs' method: those on the runs' data, or where there are none, all."""
    same_method = [figure for figure in figures if runs[0].method in figure.methods]
    same_data = [figure for figure in same_method if figure.data in {run.data for run in runs}]
    return same_data or same_method


def _run_row(run: Run, keys: list[str], ranking: str) -> Row:
    best = run.best(ranking)
    trained = run.tags.get("parameters.trained")
    return Row(
        name=run.name,
        colour=run.colour,
        status=run.status.lower(),
        data=f"{run.data} {run.tags.get('data.fingerprint', '')[:8]}".strip(),
        step=f"{best[0]:,}" if best else "",
        trained=_count(float(trained)) if trained else "",
        values=[_best_and_last(run, key) for key in keys],
        throughput=f"{run.throughput:.4g}" if run.throughput is not None else "",
    )


def _paper_row(comparison: Comparison, keys: list[str], figure: PaperFigure) -> Row:
    others = [f"; {name} {value}" for name, value in figure.metrics.items() if f"eval/{name}" not in keys]
    return Row(
        name=f"paper: {figure.label}",
        variant=figure.variant,
        data=figure.data,
        trained=_count(figure.parameters) if figure.parameters else "",
        values=[str(figure.metrics.get(key.removeprefix("eval/"), "")) for key in keys],
        throughput=figure.throughput or "",
        notes=comparison.numbers([f"{figure.variant}; scored: {figure.protocol}{''.join(others)}"]),
        leads=[False] * len(keys),
    )


def mismatches(run: Run, figure: PaperFigure) -> list[str]:
    """Why the run's metrics do not compare with the paper's, one reason each; empty where nothing speaks against it."""
    asked = {
        "data": (run.data, figure.data),
        "extractor": (run.tags.get("extractor"), figure.extractor),
        "resolution": (run.params.get("data.resolution"), figure.resolution),
    }
    return [
        f"not comparable with {figure.label}: its {what} is {theirs}, not {ours}"
        for what, (ours, theirs) in asked.items()
        if theirs is not None and ours not in (None, "none", str(theirs))
    ]


def _best_and_last(run: Run, key: str) -> str:
    """The best value and, where it differs, the last in brackets on a second line."""
    best, points = run.best(key), run.history.get(key, [])
    if best is None:
        return f"{points[-1][1]}" if points else ""
    last = points[-1][1]
    return f"{best[1]:.4g}" if last == best[1] else f"{best[1]:.4g}\n({last:.4g})"


def _count(count: float) -> str:
    return f"{count / 1e9:.3g} B" if count >= 1e9 else f"{count / 1e6:.3g} M"


def heading(key: str) -> str:
    """A metric as a reader sees it: without eval/, with an arrow that points to better."""
    return f"{key.removeprefix('eval/')} {'↓' if better(key) is min else '↑'}"


def column_heading(key: str) -> str:
    """The same in two lines where its name has two parts."""
    return heading(key).replace("_", "\n", 1)


def print_table(comparison: Comparison) -> None:
    """Print a table a method and the notes; as wide as they need where the output is no terminal."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    for group in comparison.groups:
        table = _rich_table(group)
        if not console.is_terminal:
            console.width = max(80, console.measure(table, options=console.options.update(width=10_000)).maximum)
        console.print(table)
    console.print(_LEGEND)
    for number, note in enumerate(comparison.notes, 1):
        console.print(Text(f"[{number}] {note}"))


def _rich_table(group: Group):
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(group.method), title_justify="left", title_style="bold")
    for name in ("run", "status", "data"):
        table.add_column(name, overflow="fold")
    for name in ("best\nstep", "trained", *(column_heading(key) for key in group.keys), "images/s"):
        table.add_column(name, justify="right", overflow="fold")
    for row in group.rows:
        values = [Text(value, "bold" if lead else "") for value, lead in zip(row.values, row.leads, strict=True)]
        name = " ".join([row.name, *(f"[{number}]" for number in row.notes)])
        cells = [Text(cell) for cell in (name, row.status, row.data, row.step, row.trained)]
        table.add_row(*cells, *values, row.throughput, style=None if row.colour else "italic cyan")
    return table


def render_page(comparison: Comparison, runs: list[Run], client, uri: str) -> str:
    """The page as HTML that needs no other file: tables, a panel of curves a metric, and each run's newest grid."""
    from jinja2 import Environment, FileSystemLoader

    folder = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=folder, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    keys = _sorted_keys(key for run in runs for key in run.history)
    keys += sorted({key for run in runs for key in run.history} - set(keys))
    figures = [figure for group in comparison.groups for figure in group.figures]
    return environment.get_template("compare.html").render(
        comparison=comparison,
        curves={heading(key): draw_curves(key, runs, figures) for key in keys},
        grids=[grid for run in runs if (grid := _newest_grid(client, run))],
        legend=_LEGEND,
        runs=runs,
        column_heading=column_heading,
        uri=uri,
        time=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    )


def draw_curves(key: str, runs: list[Run], figures: Iterable[PaperFigure] = ()) -> str:
    """An SVG element: `key` over steps, a line a run, and a dashed line for each of the papers' values."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": key, "font.size": 9}):
        figure = Figure(figsize=(4.6, 2.6), layout="constrained")
        axes = figure.subplots()
        for run in runs:
            points = [point for point in run.history.get(key, []) if math.isfinite(point[1])]
            points = points[:: -(-len(points) // _CURVE_POINTS) or 1]
            marker = "." if len(points) < 50 else None
            axes.plot([s for s, _ in points], [v for _, v in points], color=run.colour, marker=marker, linewidth=1.3)
        for value in {figure.metrics.get(key.removeprefix("eval/")) for figure in figures} - {None}:
            if isinstance(value, int | float):
                axes.axhline(value, color="#888888", linestyle="--", linewidth=1)
        _style(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return "<svg" + buffer.getvalue().partition("<svg")[2]


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
    """None where the run has no grid; where the artifact store does not give it, with a line that says so."""
    from jobs.tracking.server import cause, logged_images

    try:
        images = [image for image in logged_images(client, run.id) if image.key == "eval/grid"]
        return _read_grid(client, run, images[-1]) if images else None
    except Exception as error:
        click.echo(f"the pictures of {run.name} cannot be read: {cause(error)}", err=True)
        return None


def _read_grid(client, run: Run, image) -> Grid:
    from PIL import Image

    buffer = io.BytesIO()
    with (
        tempfile.TemporaryDirectory() as folder,
        Image.open(client.download_artifacts(run.id, image.path, folder)) as picture,
    ):
        width, height = picture.size
        picture.thumbnail((_PICTURE_SIDE, _PICTURE_SIDE))
        picture.save(buffer, "webp", quality=90)
    source = "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
    return Grid(run, image.step, source, width, height)


if __name__ == "__main__":
    from jobs.cli import run

    run("compare")
