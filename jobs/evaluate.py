"""`medsynth evaluate`: score a folder of pictures against a folder of real ones."""

import json
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

import click

from medsynth.errors import UserError
from medsynth.files import write_whole

if TYPE_CHECKING:
    from torch import Tensor

_WHAT = {
    "fid": "Fréchet distance, Inception of 2015-12-05; lower is better",
    "fd": "Fréchet distance of these features; lower is better",
    "kid": "kernel distance; lower is better",
    "kd": "kernel distance of these features; lower is better",
    "isc": "Inception Score; higher is better",
    "precision": "share of generated pictures that look real",
    "recall": "share of real pictures that are covered",
    "f1": "harmonic mean of precision and recall",
}


@click.command()
@click.option(
    "--real", type=click.Path(path_type=Path), required=True, help="Folder of real pictures, searched in depth."
)
@click.option("--fake", type=click.Path(path_type=Path), required=True, help="Folder of generated pictures, likewise.")
@click.option("--extractor", default="inception", show_default=True, help="inception or random (needs no weights).")
@click.option("--weights", type=str, help="Inception weights file. [default: torch-fidelity's download]")
@click.option(
    "--resolution", type=click.IntRange(1),
    help="Make pictures squares of this many pixels first, as training's references are. [default: the generated "
    "pictures' size, where they are squares of one size]",
)  # fmt: skip
@click.option(
    "--square", type=click.Choice(["crop", "pad"]), default="crop", show_default=True,
    help="How they become squares: data.square of the data set; canine_hip's is pad.",
)  # fmt: skip
@click.option(
    "--sixteen-bit", type=click.Choice(["full", "range", "window"]), default="full", show_default=True,
    help="How pictures of more than 8 bits are shown: data.sixteen_bit of the data set; chest_xray's is window.",
)  # fmt: skip
@click.option("--window", type=(float, float), metavar="CENTRE WIDTH", help="As data.window. [default: none]")
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True, help="Pictures at once.")
@click.option("--workers", type=click.IntRange(0), default=2, show_default=True, help="Processes that read pictures.")
@click.option("--out", type=click.Path(path_type=Path), help="JSON file for the scores. [default: only the table]")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1 …")
def main(
    real: Path, fake: Path, extractor: str, weights: str | None, resolution: int | None, square: str, sixteen_bit: str,
    window: tuple[float, float] | None, batch_size: int, workers: int, out: Path | None, device: str,
) -> None:  # fmt: skip
    """Score generated pictures against real ones: FID, KID, Inception Score, precision, recall, F1.

    Folders of any size: pictures stream through, of any mode and size, DICOM files too. Both sides are brought to the
    size of the generated pictures, as training does it; a line says so.
    """
    from rich.console import Console
    from rich.table import Table

    from datamodules.files.pictures import check_window
    from jobs.run.folder import pick_device
    from metrics.extractors import build_extractor
    from metrics.suite import GenerationMetrics

    check_window(window, used=True)
    _check_out(out)
    reals, fakes = (_Folder(folder, resolution, square, sixteen_bit, window) for folder in (real, fake))
    network = build_extractor(extractor, weights, "give --weights PATH or --extractor random")
    metrics = GenerationMetrics(network, len(reals), len(fakes)).to(pick_device(device))
    real_sizes, fake_sizes = _sizes(reals), _sizes(fakes)
    reals.resolution = fakes.resolution = resolution or _side_of(fake_sizes)
    for line in [*reals.notes, *fakes.notes, *_said_of_sizes(real_sizes, fake_sizes, reals.resolution, square)]:
        click.echo(line)
    _stream(reals, metrics.update_real, "real", batch_size, workers)
    _stream(fakes, metrics.update_fake, "generated", batch_size, workers)
    scores = metrics.compute()

    table = Table("metric", "value", "", box=None)
    for name, value in scores.items():
        table.add_row(name, f"{value:.6g}", _WHAT.get(name.split("_")[0], "") if not name.endswith("_std") else "")
    Console().print(table)
    report = {"scores": scores, "real_pictures": len(reals), "fake_pictures": len(fakes)}
    report |= {"extractor": network.identity, "resolution": reals.resolution, "square": square}
    report |= {"real_sizes": _described(real_sizes), "fake_sizes": _described(fake_sizes)}
    report |= {"sixteen_bit": sixteen_bit, "window": window}
    _write(report, out)


def _check_out(out: Path | None) -> None:
    """Before the work: what would fail after it."""
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


def _write(report: dict[str, Any], out: Path | None) -> None:
    if out is None:
        return
    try:
        write_whole(out, json.dumps(report, indent=2, allow_nan=False) + "\n")
    except OSError as error:
        raise UserError(
            f"--out {out} cannot be written ({error.strerror}); the scores are in the table above"
        ) from None
    click.echo(f"scores in {out}")


_Sizes = Counter[tuple[int, int]]
"""How many pictures are of each width and height."""


def _sizes(folder: "_Folder") -> _Sizes:
    """By the headers, which also show before the work what cannot be read."""
    from datamodules.files.pictures import picture_size
    from datamodules.files.raster import MOST_PIXELS

    with ThreadPoolExecutor() as pool:
        return Counter(pool.map(lambda path: picture_size(path, MOST_PIXELS), folder.paths))


def _side_of(sizes: _Sizes) -> int | None:
    """The side, where all are squares of one."""
    sides = {side for size in sizes for side in size}
    return sides.pop() if len(sides) == 1 else None


def _described(sizes: _Sizes) -> str:
    least, most = (f"{width}×{height}" for width, height in (min(sizes), max(sizes)))
    return least if len(sizes) == 1 else f"{len(sizes)} sizes from {least} to {most}"


def _said_of_sizes(real: _Sizes, fake: _Sizes, resolution: int | None, square: str) -> list[str]:
    """What the scores depend on and a reader would not guess."""
    sizes = f"real pictures {_described(real)}, generated {_described(fake)}"
    if resolution is None:
        advice = "--resolution R makes all R×R, and so comparable with training's evaluation"
        return [f"{sizes}: scored as they are; {advice}"] if len(real | fake) > 1 else []
    if set(real | fake) == {(resolution, resolution)}:
        return []
    moved = f"{sizes}: all scored at {resolution}×{resolution} (--square {square})"
    also = "" if _side_of(fake) == resolution else "; training's evaluation scores generated pictures as they are drawn"
    return [moved + also]


class _Folder:
    """Index -> uint8 (3, H, W) of a folder's pictures, in the order of their names."""

    def __init__(
        self, folder: Path, resolution: int | None, square: str = "crop", sixteen_bit: str = "full",
        window: tuple[float, float] | None = None,
    ):  # fmt: skip
        from datamodules.files.images import SUFFIXES
        from datamodules.files.walk import PictureFolder, not_read, walk
        from jobs.drawing.listed import control_folders

        if not folder.is_dir():
            raise UserError(f"there is no folder {folder}")
        names = walk(folder)
        found = PictureFolder(folder, dicom=True, files=names)
        steered = control_folders(folder, names)
        paths = (folder / name for name in found.names())
        self.paths = sorted(path for path in paths if steered.isdisjoint(path.parents))
        self.notes = [f"{folder}: {note}" for note in not_read(found.others)]
        self.resolution, self.square, self.sixteen_bit, self.window = resolution, square, sixteen_bit, window
        if not self.paths:
            raise UserError(f"{folder} holds no pictures ({', '.join(sorted(SUFFIXES))})")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> "Tensor":
        from datamodules.files.images import Geometry
        from datamodules.files.pictures import read_picture
        from datamodules.files.raster import MOST_PIXELS

        picture = read_picture(self.paths[index], MOST_PIXELS, 0, self.sixteen_bit, self.window)
        return Geometry(self.resolution, self.square).apply(picture) if self.resolution else picture


def _stream(
    folder: _Folder, update: Callable[["Tensor", "Tensor"], None], title: str, batch_size: int, workers: int
) -> None:
    import torch
    from rich.progress import Progress

    from datamodules.stream import PlainLoader

    loader = PlainLoader(folder, batch_size=batch_size, num_workers=workers, collate_fn=list)
    first = 0
    with torch.no_grad(), Progress(transient=True) as progress:
        task = progress.add_task(title, total=len(folder))
        for pictures in loader:
            _update_by_size(pictures, first, update)
            first += len(pictures)
            progress.update(task, completed=first)


def _update_by_size(pictures: "list[Tensor]", first: int, update: Callable[["Tensor", "Tensor"], None]) -> None:
    """Pictures of one size go through the extractor together."""
    import torch

    by_size: dict[tuple[int, ...], list[int]] = {}
    for i, picture in enumerate(pictures):
        by_size.setdefault(tuple(picture.shape), []).append(i)
    for rows in by_size.values():
        update(torch.stack([pictures[i] for i in rows]), torch.tensor([first + i for i in rows]))


if __name__ == "__main__":
    from jobs.cli import run

    run("evaluate")
