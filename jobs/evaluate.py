"""`medsynth evaluate`: score a folder of pictures against a folder of real ones."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from medsynth.errors import UserError

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
    "--resolution", type=click.IntRange(1), help="Bring both sides to this many pixels first. [default: as they are]"
)
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
    real: Path, fake: Path, extractor: str, weights: str | None, resolution: int | None, sixteen_bit: str,
    window: tuple[float, float] | None, batch_size: int, workers: int, out: Path | None, device: str,
) -> None:  # fmt: skip
    """Score generated pictures against real ones: FID, KID, Inception Score, precision, recall, F1.

    Folders of any size: pictures stream through, of any mode and size, DICOM files too.
    """
    from rich.console import Console
    from rich.table import Table

    from datamodules.files.pictures import check_window
    from jobs.run.folder import pick_device
    from metrics.extractors import build_extractor
    from metrics.suite import GenerationMetrics

    check_window(window, used=True)
    sides = {"real": real, "fake": fake}
    sides = {side: _Folder(folder, resolution, sixteen_bit, window) for side, folder in sides.items()}
    for note in [note for side in sides.values() for note in side.notes]:
        click.echo(note)
    network = build_extractor(extractor, weights)
    metrics = GenerationMetrics(network, len(sides["real"]), len(sides["fake"])).to(pick_device(device))
    _stream(sides["real"], metrics.update_real, "real", batch_size, workers)
    _stream(sides["fake"], metrics.update_fake, "generated", batch_size, workers)
    scores = metrics.compute()

    table = Table("metric", "value", "", box=None)
    for name, value in scores.items():
        table.add_row(name, f"{value:.6g}", _WHAT.get(name.split("_")[0], "") if not name.endswith("_std") else "")
    Console().print(table)
    if out:
        counts = {"real_pictures": len(sides["real"]), "fake_pictures": len(sides["fake"])}
        report = {"scores": scores, **counts, "extractor": network.identity, "resolution": resolution}
        report |= {"sixteen_bit": sixteen_bit, "window": window}
        out.write_text(json.dumps(report, indent=2) + "\n")
        click.echo(f"scores in {out}")


class _Folder:
    """Index -> uint8 (3, H, W) of a folder's pictures, in the order of their names."""

    def __init__(
        self, folder: Path, resolution: int | None, sixteen_bit: str = "full", window: tuple[float, float] | None = None
    ):
        from datamodules.files.images import SUFFIXES
        from datamodules.files.walk import PictureFolder, not_read

        if not folder.is_dir():
            raise UserError(f"there is no folder {folder}")
        found = PictureFolder(folder, dicom=True)
        self.paths = sorted(folder / name for name in found.names())
        self.notes = [f"{folder}: {note}" for note in not_read(found.others)]
        self.resolution, self.sixteen_bit, self.window = resolution, sixteen_bit, window
        if not self.paths:
            raise UserError(f"{folder} holds no pictures ({', '.join(sorted(SUFFIXES))})")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> "Tensor | str":
        """A string says why the picture cannot be read."""
        from datamodules.files.images import crop_square
        from datamodules.files.pictures import read_picture
        from datamodules.files.raster import MOST_PIXELS

        try:
            picture = read_picture(self.paths[index], MOST_PIXELS, 0, self.sixteen_bit, self.window)
        except UserError as error:
            return str(error)  # an exception would cross the worker's border with its traceback
        return crop_square(picture, self.resolution) if self.resolution else picture


def _stream(
    folder: _Folder, update: Callable[["Tensor", "Tensor"], None], title: str, batch_size: int, workers: int
) -> None:
    import torch
    from rich.progress import Progress
    from torch.utils.data import DataLoader

    # pyrefly: ignore[bad-argument-type]  # torch takes whatever has a length and items, its annotation a Dataset
    loader = DataLoader(folder, batch_size, num_workers=workers, collate_fn=list)
    first = 0
    with torch.no_grad(), Progress(transient=True) as progress:
        task = progress.add_task(title, total=len(folder))
        for pictures in loader:
            for picture in pictures:
                if isinstance(picture, str):
                    raise UserError(picture)
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
