"""What becomes of scores: the table, and a file that says by what they are scores."""

import csv
import io
import json
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from jobs.scoring.claims import Claims
from medsynth.errors import UserError
from medsynth.files import write_whole
from metrics.protocol import Protocol

_WHAT = {
    "fid": "Fréchet distance, Inception of 2015-12-05; lower is better",
    "fd": "Fréchet distance of these features; lower is better",
    "kid": "kernel distance; lower is better",
    "kd": "kernel distance of these features; lower is better",
    "isc": "Inception Score; higher is better",
    "precision": "share of generated pictures that look real",
    "recall": "share of real pictures that are covered",
    "f1": "harmonic mean of precision and recall",
    "psnr": "dB, against the real picture of the same conditions; higher is better",
    "ssim": "likewise; higher is better",
}


def print_scores(claims: Claims, protocol: Protocol) -> None:
    """The table of scores, of the groups, and below what belongs to them and by what they are scores."""
    table = Table("metric", "value", "95 %" if claims.intervals else "", "", box=None)
    for name, value in claims.scores.items():
        found = claims.intervals.get(name)
        reach = f"{found.low:.4g} … {found.high:.4g}" if found else ""
        what = _WHAT.get(name.split("_")[0], "") if not name.endswith("_std") else ""
        table.add_row(name, f"{value:.6g}", reach, what)
    Console().print(table)
    if claims.groups:
        _print_groups(claims.groups)
    for note in claims.notes:
        click.echo(note)
    click.echo(f"protocol {protocol.digest}: {protocol}")


def _print_groups(groups: dict[str, dict[str, float]]) -> None:
    shown = list(dict.fromkeys(name for scores in groups.values() for name in scores))
    table = Table("score", *groups, box=None)
    for name in shown:
        table.add_row(name, *(f"{scores[name]:.5g}" if name in scores else "" for scores in groups.values()))
    console = Console()
    if not console.is_terminal:
        console.width = max(80, console.measure(table, options=console.options.update(width=10_000)).maximum)
    console.print(table)


def check_out(out: Path | None) -> None:
    """Before the work: raises UserError where the report could not be written after it."""
    if out is None:
        return
    if out.is_dir():
        raise UserError(f"--out {out} is a folder: name a file in it, {out / 'scores.json'}")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}; make it, or choose another file")
    try:
        with TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise UserError(f"--out {out}: nothing can be written there ({error.strerror}); choose another file") from None


def write_report(report: dict[str, Any], out: Path | None) -> None:
    """Write the report, where it is wanted: as a table of one row a score where `out` ends in .csv, else as JSON.

    Raises:
        UserError: it cannot be written.
    """
    if out is None:
        return
    as_csv = out.suffix.lower() == ".csv"
    text = _as_csv(report) if as_csv else json.dumps(report, indent=2, allow_nan=False) + "\n"
    try:
        write_whole(out, text)
    except OSError as error:
        raise UserError(
            f"--out {out} cannot be written ({error.strerror}); the scores are in the table above"
        ) from None
    click.echo(f"scores in {out}")


def _as_csv(report: dict[str, Any]) -> str:
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    protocol = {key: value for key, value in report["protocol"].items() if key != "versions"}
    versions = {f"version.{name}": value for name, value in report["protocol"]["versions"].items()}
    facts = {f"protocol.{key}": value for key, value in protocol.items()} | versions
    rows.writerow(["group", "score", "value", "low", "high", *facts])
    told = ["" if each is None else each for each in facts.values()]
    for group, scores in {"": report["scores"], **report["groups"]}.items():
        for name, value in scores.items():
            low, high, *_ = ("", "") if group else report["intervals"].get(name, ("", ""))
            rows.writerow([group, name, repr(value), low, high, *told])
    return table.getvalue()
