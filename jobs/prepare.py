"""`medsynth prepare`: what has to be there before a run."""

from collections.abc import Callable
from pathlib import Path

import click


@click.group()
def main() -> None:
    """Make phantom data or depth maps, bring data into another layout, or fetch pretrained weights."""


@main.group()
def phantom() -> None:
    """Draw a small synthetic data set with exactly known truth."""


_IMAGES = click.option("--images", type=click.IntRange(1), default=400, show_default=True, help="Pictures to draw.")
_SEED = click.option("--seed", type=int, default=0, show_default=True, help="The same seed gives the same bytes.")
_SIZE = click.option(
    "--size", type=click.IntRange(32, 1024), default=256, show_default=True, help="Side of the pictures, pixels."
)
_LAYOUT = click.Choice(["metadata", "folders", "pairs", "webdataset"])


@phantom.command()
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder to write, in the layout of MEDVQA-GI."
)
@_IMAGES
@_SEED
@_SIZE
def colonoscopy(out: Path, images: int, seed: int, size: int) -> None:
    """Draw colonoscopy phantoms with prompts: mucosa, lumen, folds, polyps, instrument, text, box."""
    from datamodules.phantoms.colonoscopy import write_colonoscopy

    _draw(out, images, lambda progress: write_colonoscopy(out, images, seed, size, progress))


@phantom.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@_IMAGES
@_SEED
@_SIZE
@click.option(
    "--layout", type=_LAYOUT, default="metadata", show_default=True, help="How the pictures and captions lie."
)
def hip(out: Path, images: int, seed: int, size: int, layout: str) -> None:
    """Draw canine pelves, ventrodorsal view, with exact femoral heads, acetabular rims and Norberg angles."""
    from datamodules.phantoms.hip import write_hips

    _draw(out, images, lambda progress: write_hips(out, images, seed, size, layout, progress))


@phantom.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@_IMAGES
@_SEED
@_SIZE
@click.option("--dicom", is_flag=True, help="Write a third of the pictures as 16-bit PNG and a third as DICOM.")
def chest(out: Path, images: int, seed: int, size: int, dicom: bool) -> None:
    """Draw chest X-rays with lung nodules, their exact masks, and captions."""
    from datamodules.phantoms.chest import write_chest

    _draw(out, images, lambda progress: write_chest(out, images, seed, size, progress, dicom))


@phantom.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write, one folder a class.")
@_IMAGES
@_SEED
@_SIZE
def cytology(out: Path, images: int, seed: int, size: int) -> None:
    """Draw stained cells of four classes, the same number of each, with their nuclei and cytoplasm known."""
    from datamodules.phantoms.cytology import write_cytology

    _draw(out, images, lambda progress: write_cytology(out, images, seed, size, progress))


def _draw(out: Path, images: int, write: Callable[[Callable[[int], None]], bool]) -> None:
    from rich.progress import Progress

    with Progress(transient=True) as progress:
        task = progress.add_task("drawing", total=images)
        drawn = write(lambda done: progress.update(task, completed=done))
    click.echo(
        f"{images} pictures and their prompts in {out}" if drawn else f"{out} holds these {images} pictures already"
    )


@main.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--to", "layout", type=_LAYOUT, required=True, help="Layout to write.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option("--shard-size", type=click.IntRange(1), default=1000, show_default=True, help="Samples a shard.")
@click.option(
    "--from", "source_layout", type=click.Choice(["auto", *_LAYOUT.choices]), default="auto", show_default=True,
    help="Layout of SOURCE; auto looks which it is.",
)  # fmt: skip
def convert(source: Path, layout: str, out: Path, shard_size: int, source_layout: str) -> None:
    """Bring pictures with captions into another layout; the pictures' bytes stay what they are.

    metadata: pictures and metadata.csv. folders: one folder a class. pairs: x.png beside x.txt. webdataset: tar shards,
    one or more a class.
    """
    from rich.progress import Progress

    from datamodules.files.layout_writers import convert

    notes: list[str] = []
    with Progress(transient=True) as progress:
        task = progress.add_task("converting", total=None)
        images = convert(
            source, out, layout, shard_size, source_layout,
            lambda done, total: progress.update(task, completed=done, total=total), notes.append,
        )  # fmt: skip
    for note in notes:
        click.echo(note)
    click.echo(f"{images} pictures in {out}, in the layout {layout}")


@main.command()
@click.argument("data", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--per-class", type=click.IntRange(1), required=True, help="Pictures of each class, originals included.")
@click.option("--probability", type=click.FloatRange(0, 1), default=0.5, show_default=True, help="Of each change.")
@click.option("--rotation", type=click.FloatRange(0, 180), default=10, show_default=True, help="Degrees, at most.")
@click.option("--zoom", type=click.FloatRange(1, 10), default=1.5, show_default=True, help="Factor, at most.")
@_SEED
def augment(
    data: Path, out: Path, per_class: int, probability: float, rotation: float, zoom: float, seed: int
) -> None:  # fmt: skip
    """Write the class folders DATA to OUT with turned, flipped and zoomed copies, so many pictures of each class.

    Originals stay what they are; training varies pictures itself, so this is for tools that do not.
    """
    from rich.progress import Progress

    from datamodules.files.augmented import GROUP, Recipe, augment

    recipe = Recipe(per_class, probability, rotation, zoom, seed)
    with Progress(transient=True) as progress:
        task = progress.add_task("varying", total=None)
        copies = augment(data, out, recipe, lambda done, total: progress.update(task, completed=done, total=total))
    click.echo(f"{copies} copies beside the originals in {out}: {per_class} pictures of each class")
    click.echo(f"train with data.group='{GROUP}': no picture then validates of which a copy trains")


@main.command()
@click.argument("config", nargs=-1, required=True, metavar="CONFIG... [KEY=VALUE]...")
def depth(config: tuple[str, ...]) -> None:
    """Estimate the depth of CONFIG's pictures with data.depth_model, for `data.controls: [depth]`."""
    from rich.progress import Progress

    from jobs.run.config import instantiate, load_arguments
    from jobs.run.registry import data_class
    from medsynth.errors import UserError

    settings = instantiate(load_arguments(config), "data")
    from lightning_modules.parts.weights import Weights  # after the config, whose mistakes need no torch

    if getattr(settings, "depth_model", None) is None:
        raise UserError("data.depth_model names no model; give the hub id or folder of a depth-estimation model")
    model = Weights("data.depth_model", settings.depth_model).fetch()
    data = data_class(settings.name)(settings)
    with Progress(transient=True) as progress:
        task = progress.add_task("estimating depth", total=None)
        made = data.write_depth(model, lambda done, total: progress.update(task, completed=done, total=total))
    click.echo(f"{made} depth maps written to {Path(settings.root) / settings.depth}")


@main.command()
@click.argument("config", nargs=-1, required=True, metavar="CONFIG... [KEY=VALUE]...")
def weights(config: tuple[str, ...]) -> None:
    """Bring the pretrained weights that CONFIG names into the local cache.

    Compute nodes often have no internet: run this where there is some, with the same home folder. Of a hub's repository
    only what is read comes: of weights that it has twice, the full precision before half, safetensors before pickles,
    with all shards that their index names.
    """
    from jobs.run.config import load_arguments

    resolved = load_arguments(config)
    from jobs.run.folder import build_module  # after the config, whose mistakes need no torch
    from lightning_modules.parts.weights import Weights
    from metrics.extractors import INCEPTION_URL

    needed = build_module(resolved).required_weights()
    evaluation = resolved.evaluation
    if evaluation.images and evaluation.extractor == "inception" and evaluation.weights is None:
        needed.append(Weights("evaluation.weights", INCEPTION_URL))
    for source in needed:
        click.echo(f"{source.key}: {source.source}")
        click.echo(f"  {source.fetch()}")
        for name, path in source.contents().items():
            click.echo(f"    {name}, {path.stat().st_size / 1e6:,.1f} MB")
    if not needed:
        click.echo("this config needs no pretrained weights")


if __name__ == "__main__":
    from jobs.cli import run

    run("prepare")
