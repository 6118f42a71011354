"""`medsynth prepare`: what has to be there before a run."""

from pathlib import Path

import click


@click.group()
def main() -> None:
    """Make phantom data, or fetch pretrained weights."""


@main.group()
def phantom() -> None:
    """Draw a small synthetic data set with exactly known truth."""


@phantom.command()
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder to write, in the layout of MEDVQA-GI."
)
@click.option("--images", type=click.IntRange(1), default=400, show_default=True, help="Pictures to draw.")
@click.option("--seed", type=int, default=0, show_default=True, help="The same seed gives the same bytes.")
@click.option(
    "--size", type=click.IntRange(32, 1024), default=256, show_default=True, help="Side of the pictures, pixels."
)
def colonoscopy(out: Path, images: int, seed: int, size: int) -> None:
    """Draw colonoscopy phantoms with prompts: mucosa, lumen, folds, polyps, instrument, text, box."""
    from rich.progress import Progress

    from datamodules.phantoms import write_colonoscopy

    with Progress(transient=True) as progress:
        task = progress.add_task("drawing", total=images)
        drawn = write_colonoscopy(out, images, seed, size, lambda done: progress.update(task, completed=done))
    click.echo(
        f"{images} pictures and their prompts in {out}" if drawn else f"{out} holds these {images} pictures already"
    )


@main.command()
@click.argument("config", nargs=-1, required=True, metavar="CONFIG... [KEY=VALUE]...")
def weights(config: tuple[str, ...]) -> None:
    """Bring the pretrained weights that CONFIG names into the local cache.

    Compute nodes often have no internet: run this where there is some, with the same home folder.
    """
    from jobs.config import load_arguments
    from jobs.runs import build_module
    from lightning_modules.weights import Weights
    from metrics.extractors import INCEPTION_URL

    resolved = load_arguments(config)
    needed = build_module(resolved).required_weights()
    evaluation = resolved.evaluation
    if evaluation.images and evaluation.extractor == "inception" and evaluation.weights is None:
        needed.append(Weights("evaluation.weights", INCEPTION_URL))
    for source in needed:
        click.echo(f"{source.key}: {source.source}")
        click.echo(f"  {source.fetch()}")
    if not needed:
        click.echo("this config needs no pretrained weights")


if __name__ == "__main__":
    from jobs.cli import run

    run("prepare")
