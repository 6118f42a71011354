"""Pictures a second and model FLOP utilisation of each method, beside a plain loop over the same networks.

    python -m benchmarks.train_step                                       # tiny networks on this machine
    python -m benchmarks.train_step --sweep --json docs/performance.json  # the whole table of a GPU, 256 and 512 pixels

Both loops take turns in one process, a fresh one for each row; the weights, batches and device are the same. A row that
fails says why and the others go on. With --json what is done is kept: the same command again measures what is missing.
"""

import json
import multiprocessing
import platform
import traceback
from collections.abc import Iterator
from dataclasses import asdict, replace
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import click

from benchmarks.cell import METHODS, SHAPES, Cell

Row = dict[str, Any]

_GPU = {"shape": None, "resolution": "256,512", "precision": "bf16-mixed", "batch": 8}
_CPU = {"shape": "tiny", "resolution": "32", "precision": "32-true", "batch": 4}
_LARGEST = 1024
_CLOCK = "cpu: processor time of one thread, on a machine that has other work too."
_KEY = (
    "method",
    "shape",
    "resolution",
    "precision",
    "device",
    "cached",
    "compile",
    "checkpointing",
    "clock",
    "largest",
)


@click.command()
@click.option("--methods", default=",".join(METHODS), show_default=True, help="Some of them, with commas.")
@click.option(
    "--shape", type=click.Choice(list(SHAPES)), help="Networks. [default: the published ones on a GPU, else tiny]"
)
@click.option("--resolution", help="Sides of the pictures, pixels, with commas. [default: 256,512 on a GPU, else 32]")
@click.option("--batch", type=int, help="Pictures a step; where a sweep begins. [default: 8 on a GPU, else 4]")
@click.option("--precision", type=click.Choice(["32-true", "bf16-mixed"]), help="[default: bf16-mixed on a GPU]")
@click.option("--compile", "compiled", is_flag=True, help="torch.compile ours.")
@click.option("--checkpointing", is_flag=True, help="Compute activations again in the backward pass, in both.")
@click.option("--sweep", is_flag=True, help="With and without these two, each with the largest batch that fits.")
@click.option("--rounds", type=click.IntRange(2), default=7, show_default=True, help="Blocks of each loop.")
@click.option("--steps", type=click.IntRange(1), default=10, show_default=True, help="Steps of a block.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--clock", type=click.Choice(["wall", "cpu"]), default="wall", show_default=True, help=_CLOCK)
@click.option("--minutes", default=10.0, show_default=True, help="Longest that a row may take.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Where the rows are kept.")
def main(
    methods,
    shape,
    resolution,
    batch,
    precision,
    compiled,
    checkpointing,
    sweep,
    rounds,
    steps,
    device,
    clock,
    minutes,
    file,
):
    """Measure the training step of methods, with cached latents and without, against plain loops."""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    default = _GPU if device == "cuda" else _CPU
    common = {
        "precision": precision or default["precision"],
        "batch": batch or default["batch"],
        "device": device,
        "clock": clock,
    }
    if clock == "cpu" and (device == "cuda" or torch.get_num_threads() > 1):
        raise click.BadParameter("cpu is for one thread without a GPU; set OMP_NUM_THREADS=1", param_hint="--clock")
    sides = [int(side) for side in (resolution or default["resolution"]).split(",")]
    names = methods.split(",")
    if unknown := sorted(set(names) - set(METHODS)):
        raise click.BadParameter(f"{unknown[0]} is not one of {', '.join(METHODS)}", param_hint="--methods")
    options = list(product((False, True), repeat=2)) if sweep else [(compiled, checkpointing)]
    cells = [
        Cell(
            method,
            shape or default["shape"] or METHODS[method],
            resolution=side,
            cached=cached,
            compile=c,
            checkpointing=again,
            **common,
        )
        for method, side, (c, again), cached in product(names, sides, options, (False, True))
    ]
    rows = _read(file)
    for _ in _measured(cells, rows, sweep, rounds, steps, minutes):
        _add_gain_of_cache(rows)
        if file:
            file.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    keys = {_key(row) for row in (_row(cell, sweep) for cell in cells)}
    _print([row for row in rows if _key(row) in keys])


def _measured(
    cells: list[Cell], rows: list[Row], largest: bool, rounds: int, steps: int, minutes: float
) -> Iterator[Row]:
    """Measure the cells that `rows` has not, in a process each, and put them there."""
    from rich.console import Console

    console = Console(stderr=True)
    done = {_key(row) for row in rows if row["status"] == "ok"}
    for i, cell in enumerate(cells):
        empty = _row(cell, largest)
        if _key(empty) in done:
            continue
        console.print(f"{i + 1}/{len(cells)} {_label(empty)}", highlight=False)
        batch = batch_of_eager(empty, rows) if largest else cell.batch
        sized = replace(cell, batch=batch or cell.batch)
        row = empty | in_own_process(sized, largest=batch is None, rounds=rounds, steps=steps, minutes=minutes)
        rows[:] = [other for other in rows if _key(other) != _key(row)] + [row]
        yield row


def batch_of_eager(row: Row, rows: list[Row]) -> int | None:
    """The largest batch of a compiled row, which is that of the row without: each new batch would compile anew."""
    same = (other for other in rows if _key(other) == _key(row | {"compile": False}) and other["status"] == "ok")
    return next((other["batch"] for other in same), None) if row["compile"] else None


def in_own_process(cell: Cell, largest: bool, rounds: int, steps: int, minutes: float) -> Row:
    """What `measured_row` gives, or why there is nothing: "status" says "ok" or the reason.

    largest: find the largest batch first. minutes: time limit.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.peers"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, cell, largest, rounds, steps))
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(60 * minutes) else {"status": f"took more than {minutes:g} minutes"}
    except EOFError:
        process.join()
        return {"status": f"the process ended with exit code {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def _child(sender, cell: Cell, largest: bool, rounds: int, steps: int) -> None:
    try:
        if largest:
            cell = largest_batch(cell)
        sender.send(measured_row(cell, rounds, steps))
    except Exception as error:  # whatever it is, it is this row's end and not the table's
        traceback.print_exc()
        sender.send({"batch": cell.batch, "status": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"})


def largest_batch(cell: Cell) -> Cell:
    """The cell with the greatest batch that both loops can train on, found by doubling the cell's own.

    Raises what the first batch raises.
    """
    from benchmarks.peers import free, measure

    fitting = None
    while cell.batch <= _LARGEST:
        try:
            measure(replace(cell, compile=False), rounds=1, steps=1)
        except Exception:
            if fitting is None:
                raise
            break
        finally:
            free()
        fitting, cell = cell, replace(cell, batch=2 * cell.batch)
    free()
    return fitting or cell


def measured_row(cell: Cell, rounds: int, steps: int) -> Row:
    """Measure one cell.

    Spreads are [lower quartile, median, upper quartile] over the rounds; ratio is the plain loop's time over ours, each
    round by itself; extra_us is how many microseconds longer a step of ours takes.
    """
    from benchmarks.flops import peak
    from benchmarks.peers import measure

    measured = measure(cell, rounds, steps)
    most, source = peak(cell)
    pairs = list(zip(measured.ours, measured.plain, strict=True))

    def utilisation(seconds: list[float]) -> float:
        return measured.flops * cell.batch / median(seconds) / most

    return {
        "batch": cell.batch,
        "status": "ok",
        "machine": _machine(cell.device),
        "ours": _spread([cell.batch / seconds for seconds in measured.ours]),
        "plain": _spread([cell.batch / seconds for seconds in measured.plain]),
        "ratio": _spread([plain / ours for ours, plain in pairs]),
        "extra_us": _spread([1e6 * (ours - plain) for ours, plain in pairs]),
        "flops_per_picture": measured.flops,
        "peak_flops": most,
        "peak_source": source,
        "ours_mfu": utilisation(measured.ours),
        "plain_mfu": utilisation(measured.plain),
        "ours_bytes": measured.ours_bytes,
        "plain_bytes": measured.plain_bytes,
        "rounds": {"ours_seconds": measured.ours, "plain_seconds": measured.plain, "steps": steps},
    }


def _spread(values: list[float]) -> list[float]:
    return quantiles(values, n=4, method="inclusive")


def _row(cell: Cell, largest: bool) -> Row:
    """What the row is measured for; two rows are the same if all but the batch, where it is the largest, is."""
    return asdict(cell) | {"largest": largest}


def _key(row: Row) -> tuple:
    return (*(row[name] for name in _KEY), None if row["largest"] else row["batch"])


def _add_gain_of_cache(rows: list[Row]) -> None:
    """Ours cached over ours uncached, in pictures a second, to the cached rows of which both are there."""
    uncached = {_key(row): row for row in rows if not row["cached"] and row["status"] == "ok"}
    for row in rows:
        other = uncached.get(_key(row | {"cached": False}))
        if row["cached"] and row["status"] == "ok" and other:
            row["over_uncached"] = row["ours"][1] / other["ours"][1]


def _read(file: Path | None) -> list[Row]:
    return json.loads(file.read_text(encoding="utf-8")) if file and file.is_file() else []


def _machine(device: str) -> dict[str, Any]:
    import diffusers
    import lightning
    import torch

    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "device": gpu or platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{package.__name__: package.__version__ for package in (torch, lightning, diffusers)},
    }


def _label(row: Row) -> str:
    options = [name for name in ("cached", "compile", "checkpointing") if row[name]]
    options += ["processor time"] if row["clock"] == "cpu" else []
    batch = "largest batch" if row["largest"] else f"batch {row['batch']}"
    return ", ".join([row["method"], f"{row['resolution']} px", batch, *options])


def _print(rows: list[Row]) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    headings = ("ours, pictures/s", "plain, pictures/s", "ours / plain", "cached / uncached", "MFU ours, plain")
    title = "median (quartiles) over the rounds"
    table = Table(Column("what", no_wrap=True), *headings, "GiB ours, plain", "extra µs a step", title=title)
    failed = []
    for row in rows:
        label = _label(row | {"largest": False})
        if row["status"] != "ok":
            failed.append(f"{label}: {row['status']}")
            continue
        gain = f"{row['over_uncached']:.2f}" if "over_uncached" in row else ""
        utilisation = f"{row['ours_mfu']:.1%}, {row['plain_mfu']:.1%}"
        memory = (
            "" if row["ours_bytes"] is None else f"{row['ours_bytes'] / 2**30:.1f}, {row['plain_bytes'] / 2**30:.1f}"
        )
        figures = [_shown(row[name], digits) for name, digits in (("ours", 1), ("plain", 1), ("ratio", 3))]
        table.add_row(label, *figures, gain, utilisation, memory, _shown(row["extra_us"], 0))
    Console(width=200).print(table, *failed, sep="\n", highlight=False)


def _shown(spread: list[float], digits: int) -> str:
    low, middle, high = (f"{value:.{digits}f}" for value in spread)
    return f"{middle} ({low} to {high})"


if __name__ == "__main__":
    main()
