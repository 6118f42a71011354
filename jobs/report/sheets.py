"""A run's newest sheet of samples, small enough to lie inside a page."""

import base64
import io
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click
from PIL import Image

from jobs.report.runs import Run
from jobs.tracking.server import LoggedImage, cause, logged_images

if TYPE_CHECKING:
    from mlflow import MlflowClient

_PICTURE_SIDE = 1024  # pixels of an embedded grid's longer side, at most


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


def newest_grid(client: "MlflowClient", run: Run) -> Grid | None:
    """None where the run has no grid; where the artifact store does not give it, with a line that says so."""
    try:
        images = [image for image in logged_images(client, run.id) if image.key == "eval/grid"]
        return _read_grid(client, run, images[-1]) if images else None
    except Exception as error:
        click.echo(f"the pictures of {run.name} cannot be read: {cause(error)}", err=True)
        return None


def _read_grid(client: "MlflowClient", run: Run, image: LoggedImage) -> Grid:
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
