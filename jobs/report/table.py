"""The runs of each method beside the papers' own figures, as a table in text."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, cast

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jobs.report.runs import BETTER, SCORES, Run, better, kind_of, plain, protocol_in, with_protocol
from jobs.run.registry import nearest
from medsynth.errors import UserError

LEGEND = (
    "Each value is the best, the last in brackets where it differs; ↓ lower is better, ↑ higher; bold leads among the "
    "method's runs on the same data: those with the same figure behind their data saw the same pictures. Scores of one "
    "column are of one protocol, by its letter; a paper's stand by themselves."
)
PAPER = "paper"
"""What stands in the place of a protocol's digest over papers' figures."""


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
    letters: dict[str, str] = field(default_factory=dict)
    """The letter of each protocol, by digest."""
    protocols: list[str] = field(default_factory=list)
    """What each letter stands for, a line each."""

    def numbers(self, notes: Iterable[str]) -> list[int]:
        """The numbers of these notes, of which new ones are added."""
        notes = list(dict.fromkeys(notes))
        self.notes += [note for note in notes if note not in self.notes]
        return [self.notes.index(note) + 1 for note in notes]


def paper_figures() -> list[PaperFigure]:
    """The papers' own figures, in the order of paper_figures.yaml."""
    entries = OmegaConf.load(Path(__file__).with_name("paper_figures.yaml"))
    checked = [OmegaConf.merge(OmegaConf.structured(PaperFigure), entry) for entry in entries]
    return [cast(PaperFigure, OmegaConf.to_object(entry)) for entry in checked]


def compare(experiment: str, runs: list[Run], figures: list[PaperFigure], metric: str | None = None) -> Comparison:
    """The runs by method, the best by `metric` on top, or by the first metric of the method.

    Raises:
        UserError: no run has `metric`.
    """
    known = sorted_keys(key for run in runs for key in run.history)
    if metric and metric not in {*known, *map(plain, known)}:
        raise UserError(f"--metric {metric}: no run has it{nearest(metric, map(plain, known))}")
    comparison = Comparison(experiment, letters=_letters(known))
    comparison.protocols = _described(comparison.letters, runs)
    for method in sorted({run.method for run in runs}):
        _add_group(comparison, [run for run in runs if run.method == method], figures, metric)
    return comparison


def _letters(keys: Iterable[str]) -> dict[str, str]:
    """A letter for each protocol, in the order in which they come; of more than 26, two."""
    digests = list(dict.fromkeys(digest for key in keys if (digest := protocol_in(key))))
    return {
        digest: chr(65 + i) if i < 26 else f"{chr(64 + i // 26)}{chr(65 + i % 26)}" for i, digest in enumerate(digests)
    }


def _described(letters: dict[str, str], runs: list[Run]) -> list[str]:
    known = {digest: protocol for run in runs for digest, protocol in run.protocols.items()}
    unknown = "not noted: these runs are of an earlier version, and alike by what their configs say"
    return [f"protocol {letter}: {known.get(digest, unknown)}" for digest, letter in letters.items()]


def _add_group(comparison: Comparison, runs: list[Run], figures: list[PaperFigure], metric: str | None) -> None:
    own = sorted_keys(key for run in runs for key in run.history)
    ranking = next((key for key in own if metric in (key, plain(key))), next(iter(own), ""))
    published = _published(runs, figures)
    theirs = {with_protocol(f"{SCORES}{name}", PAPER) for figure in published for name in figure.metrics}
    group = Group(runs[0].method, sorted_keys({*own, *filter(better, theirs)}), published)
    group.rows = [_paper_row(comparison, group.keys, figure) for figure in published]
    for run in sorted(runs, key=lambda run: _rank(run, ranking)):
        row = _run_row(run, group.keys, ranking)
        row.leads = [_leads(run, runs, key) for key in group.keys]
        row.notes = comparison.numbers(reason for figure in published for reason in mismatches(run, figure))
        group.rows.append(row)
    comparison.groups.append(group)


def sorted_keys(keys: Iterable[str]) -> list[str]:
    """Those that a column is made of, in the order of the columns."""
    order = list(BETTER)
    columns = {(order.index(kind), key) for key in keys if not key.startswith("train/") and (kind := kind_of(key))}
    return [key for _, key in sorted(columns)]


def _rank(run: Run, key: str) -> float:
    """Smaller is better; infinite for a run without the metric."""
    best = run.best(key)
    if best is None:
        return math.inf
    return best[1] if better(key) is min else -best[1]


def _leads(run: Run, runs: list[Run], key: str) -> bool:
    """Whether the run is the best, or one of the best, of several on its data that have the metric."""
    ranks = [rank for rank in (_rank(other, key) for other in runs if other.seen == run.seen) if rank < math.inf]
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
        data=run.seen,
        step=f"{best[0]:,}" if best else "",
        trained=_count(float(trained)) if trained else "",
        values=[_best_and_last(run, key) for key in keys],
        throughput=f"{run.throughput:.4g}" if run.throughput is not None else "",
    )


def _paper_row(comparison: Comparison, keys: list[str], figure: PaperFigure) -> Row:
    own = {plain(key).removeprefix(SCORES) for key in keys if protocol_in(key) == PAPER}
    others = [f"; {name} {value}" for name, value in figure.metrics.items() if name not in own]
    return Row(
        name=f"paper: {figure.label}",
        variant=figure.variant,
        data=figure.data,
        trained=_count(figure.parameters) if figure.parameters else "",
        values=[_published_value(figure, key) for key in keys],
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


def _published_value(figure: PaperFigure, key: str) -> str:
    return str(figure.metrics.get(plain(key).removeprefix(SCORES), "")) if protocol_in(key) == PAPER else ""


def _best_and_last(run: Run, key: str) -> str:
    """The best value and, where it differs, the last in brackets on a second line."""
    best, points = run.best(key), run.history.get(key, [])
    if best is None:
        return f"{points[-1][1]}" if points else ""
    last = points[-1][1]
    return f"{best[1]:.4g}" if last == best[1] else f"{best[1]:.4g}\n({last:.4g})"


def _count(count: float) -> str:
    return f"{count / 1e9:.3g} B" if count >= 1e9 else f"{count / 1e6:.3g} M"


def heading(key: str, letters: Mapping[str, str] | None = None) -> str:
    """A metric as a reader sees it: without eval/, with an arrow that points to better and its protocol's letter."""
    protocol = protocol_in(key)
    letter = "" if protocol is None else f" {(letters or {}).get(protocol, protocol)}"
    return f"{plain(key).removeprefix(SCORES)} {'↓' if better(key) is min else '↑'}{letter}"


def column_heading(key: str, letters: Mapping[str, str] | None = None) -> str:
    """The same in two lines where its name has two parts."""
    return heading(key, letters).replace("_", "\n", 1)


def print_table(comparison: Comparison) -> None:
    """Print a table a method and the notes; as wide as they need where the output is no terminal."""
    console = Console(highlight=False)
    for group in comparison.groups:
        table = _rich_table(group, comparison.letters)
        if not console.is_terminal:
            console.width = max(80, console.measure(table, options=console.options.update(width=10_000)).maximum)
        console.print(table)
    console.print(LEGEND)
    for line in comparison.protocols:
        console.print(Text(line))
    for number, note in enumerate(comparison.notes, 1):
        console.print(Text(f"[{number}] {note}"))


def _rich_table(group: Group, letters: Mapping[str, str]) -> Table:
    table = Table(title=Text(group.method), title_justify="left", title_style="bold")
    for name in ("run", "status", "data"):
        table.add_column(name, overflow="fold")
    for name in ("best\nstep", "trained", *(column_heading(key, letters) for key in group.keys), "images/s"):
        table.add_column(name, justify="right", overflow="fold")
    for row in group.rows:
        values = [Text(value, "bold" if lead else "") for value, lead in zip(row.values, row.leads, strict=True)]
        name = " ".join([row.name, *(f"[{number}]" for number in row.notes)])
        cells = [Text(cell) for cell in (name, row.status, row.data, row.step, row.trained)]
        table.add_row(*cells, *values, row.throughput, style=None if row.colour else "italic cyan")
    return table
