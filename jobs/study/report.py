"""What a study has found: a table a stage on the console, in report.md and report.csv, and curves in report.png."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jobs.report.table import sorted_keys
from jobs.study.plan import Run, runs_of
from jobs.study.read import Stage, Study
from jobs.study.record import Record, State
from medsynth.files import put_whole, write_whole

if TYPE_CHECKING:
    from jobs.tracking.logger import RunTracker

NAME = "report"
_PAPER = "paper"
_MOST_TICKS = 12  # more would run into each other


@dataclass
class Row:
    """A run, or what the paper says of one that is not in the stage (`state` "paper")."""

    run: str
    values: dict[str, Any]
    state: str
    best: bool = False
    step: int | None = None
    metrics: dict[str, float | None] = field(default_factory=dict)
    paper: dict[str, Any] = field(default_factory=dict)
    """The paper's figures, by metric."""
    reason: str = ""


@dataclass
class StageTable:
    """The rows of a stage under the metrics that its runs have or `report` asks for."""

    stage: Stage
    metrics: list[str]
    rows: list[Row]

    @property
    def published(self) -> list[str]:
        """The metrics that the paper gives a figure of."""
        return [metric for metric in self.metrics if any(metric in row.paper for row in self.rows)]

    def header(self) -> list[str]:
        return ["run", *self.stage.swept, "state", "step", *self.metrics, *(f"{_PAPER} {m}" for m in self.published)]

    def cells(self, row: Row) -> list[str]:
        """As text, in the order of `header`; metrics whole."""
        values = [_said(row.values.get(key)) for key in self.stage.swept]
        numbers = [_said(row.metrics.get(metric)) for metric in self.metrics]
        papers = [_said(row.paper.get(metric)) for metric in self.published]
        return [row.run, *values, row.state, _said(row.step), *numbers, *papers]


def tables(study: Study, records: Mapping[str, Record], best: Mapping[str, str]) -> list[StageTable]:
    """A table a stage. records: of all runs, by label. best: label by stage, of those that have one."""
    return [_table(study, stage, records, best.get(stage.name)) for stage in study.stages]


def report(
    study: Study, records: Mapping[str, Record], best: Mapping[str, str], tracker: "RunTracker | None" = None
) -> None:
    """Print the tables, write them and the plot into the study's folder, and log these where there is a tracker."""
    found = tables(study, records, best)
    for table in found:
        _print(table)
    files = {"md": as_markdown(study, found), "csv": as_csv(found)}
    for suffix, text in files.items():
        write_whole(study.folder / f"{NAME}.{suffix}", text)
    places = [study.folder / f"{NAME}.{suffix}" for suffix in files]
    picture = draw(found)
    if picture is not None:
        put_whole(study.folder / f"{NAME}.png", picture)
        places.append(study.folder / f"{NAME}.png")
    click.echo(f"report: {', '.join(map(str, places))}")
    if tracker is not None:
        for place in places:
            tracker.log_artifact(place)
        tracker.set_tags({f"best.{stage}": label for stage, label in best.items()})


def as_markdown(study: Study, found: Sequence[StageTable]) -> str:
    """A heading and a table a stage; the best run is bold, and below stands why runs failed."""
    lines = [f"# {study.name}", ""]
    for table in found:
        lines += [f"## {table.stage.name}", "", _line(table.header()), _line(["---"] * len(table.header()))]
        for row in table.rows:
            cells = [_rounded(cell) for cell in table.cells(row)]
            lines.append(_line([f"**{cells[0]}**", *cells[1:]] if row.best else cells))
        lines += [f"\n{row.run} failed: {row.reason}" for row in table.rows if row.reason]
        lines.append("")
    return "\n".join(lines)


def as_csv(found: Sequence[StageTable]) -> str:
    """One table of all stages; a column a key, a metric and a figure of the paper, empty where a stage has none."""
    columns = list(dict.fromkeys(name for table in found for name in table.header()))
    out = io.StringIO()
    writer = csv.DictWriter(out, ["stage", "best", *columns], lineterminator="\n")
    writer.writeheader()
    for table in found:
        for row in table.rows:
            cells = dict(zip(table.header(), table.cells(row), strict=True))
            writer.writerow({"stage": table.stage.name, "best": "yes" if row.best else "", **cells})
    return out.getvalue()


def draw(found: Sequence[StageTable]) -> bytes | None:
    """A PNG: a row a stage, a panel a metric, over what the stage varies; None where there is nothing to draw."""
    from matplotlib.figure import Figure

    rows = [(table, metric) for table in found for metric in table.metrics if _points(table, metric)]
    stages = [table for table in found if any(table is each for each, _ in rows)]
    if not rows:
        return None
    width = max(sum(each is table for each, _ in rows) for table in stages)
    figure = Figure(figsize=(3.2 * width + 0.4, 2.6 * len(stages) + 0.3), layout="constrained")
    grid = figure.subplots(len(stages), width, squeeze=False)
    for line, table in zip(grid, stages, strict=True):
        metrics = [metric for each, metric in rows if each is table]
        for axes, metric in zip(line, metrics, strict=False):
            _panel(axes, table, metric)
        for axes in line[len(metrics) :]:
            axes.set_visible(False)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    return content.getvalue()


def _table(study: Study, stage: Stage, records: Mapping[str, Record], best: str | None) -> StageTable:
    runs = runs_of(study, stage)
    metrics = _metrics(study, stage, [records[run.label] for run in runs])
    left = list(stage.paper)
    rows = []
    for run in runs:
        record, values = records[run.label], {value.key: value.read for value in run.point.values}
        row = Row(run.label, values, str(record.state), run.label == best, record.step)
        row.metrics = {metric: record.score(metric) for metric in metrics}
        row.reason = record.reason if record.state is State.FAILED else ""
        for figures in [figures for figures in left if _is_of(figures, run)]:
            row.paper |= _figures(figures, metrics)
            left.remove(figures)
        rows.append(row)
    for figures in left:
        values = {key: figures[key] for key in stage.swept if key in figures}
        rows.append(Row(_PAPER, values, _PAPER, paper=_figures(figures, metrics)))
    return StageTable(stage, metrics, rows)


def _metrics(study: Study, stage: Stage, records: Sequence[Record]) -> list[str]:
    """What the best is chosen by, and then of what the runs have logged what `report` names, or all scores of
    pictures."""
    logged = {key for record in records for key in record.history}
    asked = list(study.report) or sorted_keys({key for key in logged if key.startswith("eval/")})
    chosen_by = [stage.choose.metric] if stage.choose else []
    return list(dict.fromkeys([*chosen_by, *(key for key in asked if key in logged)]))


def _is_of(figures: Mapping[str, Any], run: Run) -> bool:
    """Whether a row of the paper is of the same name or values."""
    if "name" in figures:
        return figures["name"] == run.point.name
    return {key: figures[key] for key in run.stage.swept if key in figures} == {v.key: v.read for v in run.point.values}


def _figures(figures: Mapping[str, Any], metrics: Sequence[str]) -> dict[str, Any]:
    said = {metric: figures.get(metric, figures.get(metric.removeprefix("eval/"))) for metric in metrics}
    return {metric: value for metric, value in said.items() if value is not None}


def _said(value: Any) -> str:
    return "" if value is None else str(value)


def _rounded(cell: str) -> str:
    """A number with a point in four digits; anything else as it is."""
    try:
        return f"{float(cell):.4g}" if "." in cell or "e" in cell.lower() else cell
    except ValueError:
        return cell


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _print(table: StageTable) -> None:
    console = Console(highlight=False)
    shown = Table(title=Text(table.stage.name), title_justify="left", title_style="bold")
    for name in table.header():
        shown.add_column(name, overflow="fold", justify="left" if name in ("run", "state") else "right")
    for row in table.rows:
        style = "bold" if row.best else None
        shown.add_row(*(Text(_rounded(cell)) for cell in table.cells(row)), style=style)
    if not console.is_terminal:
        console.width = max(80, console.measure(shown, options=console.options.update(width=10_000)).maximum)
    console.print(shown)
    for row in table.rows:
        if row.reason:
            console.print(Text(f"{row.run} failed: {row.reason}"))


def _points(table: StageTable, metric: str) -> list[tuple[Any, float, bool]]:
    """Where a run stands on the axis, its score, and whether it is the best; in the order of the axis."""
    rows = [(row, row.metrics.get(metric)) for row in table.rows if row.state != _PAPER]
    return [(_place(table, row), score, row.best) for row, score in rows if score is not None]


def _place(table: StageTable, row: Row) -> Any:
    """The number that a stage of one key varies, else the run's name."""
    if len(table.stage.swept) == 1 and all(_is_number(r.values.get(table.stage.swept[0])) for r in table.rows):
        return row.values[table.stage.swept[0]]
    return row.run.rpartition("/")[2]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _panel(axes: Any, table: StageTable, metric: str) -> None:
    points = _points(table, metric)
    numeric = all(_is_number(place) for place, *_ in points)
    points = sorted(points) if numeric else points
    axes.plot([p for p, *_ in points], [s for _, s, _ in points], marker="o", linewidth=1.3 if numeric else 0)
    best = [(place, score) for place, score, is_best in points if is_best]
    axes.plot(*zip(*best, strict=True), marker="o", markersize=10, fillstyle="none", linewidth=0) if best else None
    paper = [(_place(table, row), row.paper[metric]) for row in table.rows if _is_number(row.paper.get(metric))]
    if paper:
        paper = sorted(paper) if numeric else paper
        axes.plot(*zip(*paper, strict=True), marker="x", linestyle="--", color="#888888", label=_PAPER)
        axes.legend(fontsize=7)
    if numeric and len(points) > 2 and points[0][0] > 0 and points[-1][0] >= 8 * points[0][0]:
        axes.set_xscale("log", base=2)
    places = sorted({place for place, *_ in points}) if numeric else []
    if 0 < len(places) <= _MOST_TICKS:  # the values that were tried, and none between them
        axes.set_xticks(places, [f"{place:g}" for place in places])
        axes.minorticks_off()
    axes.set_title(f"{table.stage.name}: {metric}", fontsize=8)
    axes.set_xlabel(", ".join(table.stage.swept), fontsize=8)
    axes.tick_params(labelsize=7, axis="x", labelrotation=0 if numeric else 30)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
