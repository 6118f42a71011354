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


def print_scores(scores: dict[str, float], protocol: Protocol) -> None:
    """The table of scores, and in a line below by what they are scores."""
    table = Table("metric", "value", "", box=None)
    for name, value in scores.items():
        table.add_row(name, f"{value:.6g}", _WHAT.get(name.split("_")[0], "") if not name.endswith("_std") else "")
    Console().print(table)
    click.echo(f"protocol {protocol.digest}: {protocol}")


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
    rows.writerow(["score", "value", *facts])
    for name, value in report["scores"].items():
        rows.writerow([name, repr(value), *("" if each is None else each for each in facts.values())])
    return table.getvalue()
