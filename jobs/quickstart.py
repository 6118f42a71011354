"""`make quickstart`: MSDM from nothing to pictures that follow their prompts, on the CPU, in minutes."""

import csv
from pathlib import Path
from typing import TYPE_CHECKING

import click

from medsynth.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from metrics.probe import Probe

_CONFIGS = Path(__file__).parent.parent / "configs" / "quickstart"
_SIZE = 64
_STATEMENTS = (
    "with 1 polyp",
    "with no polyps",
    "containing a green/black box artefact",
    "not containing a green/black box artefact",
    "containing text",
    "not containing text",
    "containing an instrument",
    "not containing an instrument",
)
_EACH = 8
"""Pictures of each statement."""
_HELD_OUT = 500
"""Phantoms that the probe has not seen."""

_PROBE_STEPS = 500


@click.command()
@click.option(
    "--out", type=click.Path(path_type=Path), default="quickstart", show_default=True, help="Folder for all of it."
)
def main(out: Path) -> None:
    """Draw phantom data, train both stages of MSDM, score it before and after, ask a probe whether the pictures show
    what their prompts say, and tell where they are."""
    from datamodules.phantoms.colonoscopy import write_colonoscopy
    from jobs.encode import encode
    from jobs.run.config import load_config
    from jobs.train import train

    click.secho("1/5 Drawing phantom colonoscopy pictures", bold=True)
    write_colonoscopy(out / "data", images=1000, seed=0, size=_SIZE, even=True)

    click.secho("2/5 Training the autoencoder", bold=True)
    shared = [f"data.root={out}/data", f"evaluation.cache={out}/cache"]
    train(load_config([_CONFIGS / "msdm_vae.yaml"], [*shared, f"run_dir={out}/msdm_vae"]))

    click.secho("3/5 Encoding all pictures once", bold=True)
    settings = [*shared, f"run_dir={out}/msdm", f"model.vae={out}/msdm_vae/export/vae"]
    config = load_config([_CONFIGS / "msdm.yaml"], settings)
    if not (out / "latents" / "manifest.json").exists():
        encode(config, out / "latents")

    click.secho("4/5 Training the diffusion model", bold=True)
    config.data.latents = str(out / "latents")
    train(config)

    click.secho(f"5/5 Drawing {_EACH * len(_STATEMENTS)} pictures, and asking a probe what they show", bold=True)
    followed = _followed(out)
    _report(config, out, followed)


def _followed(out: Path) -> list[str]:
    """Lines that say how many of the pictures drawn show what their prompts say, as a probe sees them."""
    import torch

    from datamodules.files.images import read_rgb
    from datamodules.phantoms.colonoscopy_questions import QUESTIONS, asked

    prompts = _draw(out)
    probe, right = _trained_probe(out / "data")
    seen = probe.answers(torch.stack([read_rgb(path, _SIZE**2) for path, _ in prompts]))
    done = dict.fromkeys(_STATEMENTS, 0)
    for (_, prompt), answers in zip(prompts, seen.tolist(), strict=True):
        shown = dict(zip(QUESTIONS, answers, strict=True))
        statement = prompt.removeprefix("Generate an image ").removesuffix(".")
        done[statement] += asked(prompt).items() <= shown.items()
    total = f"{sum(done.values())} of {len(prompts)}"
    lines = [f"Prompts followed, as a probe sees it:           {total} (it is right on {right:.1%} of unseen phantoms)"]
    return lines + [f"  {count} of {_EACH}  {statement}" for statement, count in done.items()]


def _draw(out: Path) -> list[tuple[Path, str]]:
    """The pictures of `_STATEMENTS` and their prompts, drawn by `medsynth sample`."""
    from jobs import sample
    from medsynth.files import put_whole

    prompts = [f"Generate an image {statement}." for statement in _STATEMENTS for _ in range(_EACH)]
    put_whole(out / "prompts.csv", "\n".join(["Prompt", *prompts, ""]).encode())
    options = ["--prompts", out / "prompts.csv", "--out", out / "pictures", "--sheet", out / "pictures.png"]
    sample.main([str(word) for word in [out / "msdm", *options, "--batch-size", 32]], standalone_mode=False)
    with (out / "pictures" / "manifest.csv").open(encoding="utf-8", newline="") as table:
        return [(out / "pictures" / row["file"], row["prompt"]) for row in csv.DictReader(table)]


def _trained_probe(data: Path) -> "tuple[Probe, float]":
    """A probe of the phantoms in `data`, and the share of its answers that are right on phantoms of another seed."""
    import numpy as np
    import torch
    from rich.progress import Progress

    from datamodules.files.images import read_rgb
    from datamodules.phantoms.colonoscopy import render
    from datamodules.phantoms.colonoscopy_questions import answers
    from datamodules.phantoms.colonoscopy_scene import EVEN, draw_scene
    from medsynth.files import parse_json
    from metrics.probe import train_probe

    known = parse_json((data / "truth.json").read_bytes())
    images = torch.stack([read_rgb(data / "images" / f"{entry['name']}.jpg", _SIZE**2) for entry in known])
    truth = torch.tensor([list(answers(entry["truth"]).values()) for entry in known])
    with Progress() as bar:
        task = bar.add_task("Training the probe", total=_PROBE_STEPS)
        probe = train_probe(images, truth, _PROBE_STEPS, seed=0, progress=lambda step: bar.update(task, completed=step))
    scenes = [draw_scene(np.random.default_rng((1, index)), EVEN) for index in range(_HELD_OUT)]
    unseen = torch.stack([torch.from_numpy(render(scene, _SIZE)).permute(2, 0, 1) for scene in scenes])
    expected = torch.tensor([list(answers(scene.truth()).values()) for scene in scenes])
    return probe, (probe.answers(unseen) == expected).float().mean().item()


def _report(config: "DictConfig", out: Path, followed: list[str]) -> None:
    from jobs.tracking.server import mlflow_client, resolve_uri, ui_command
    from jobs.tracking.spool import read_run_id

    run_id = read_run_id(out / "msdm")
    if run_id is None:
        raise UserError(f"MLflow has not been reached; start it, and medsynth track {out / 'msdm'} sends the record")
    client = mlflow_client(resolve_uri(config.tracking.uri))
    history = client.get_metric_history(run_id, "eval/fd_random")
    before, after = min(history, key=lambda m: m.step), max(history, key=lambda m: m.step)
    click.echo()
    click.secho("Done.", bold=True)
    click.echo(f"Fréchet distance (fd_random, lower is better): {before.value:.4g} before, {after.value:.4g} after")
    click.echo("\n".join(followed))
    click.echo(f"Pictures beside their prompts:                  {out / 'pictures.png'}")
    click.echo(
        f"Compare the runs in MLflow:                     {ui_command(config.tracking.uri, config.tracking.experiment)}"
    )


if __name__ == "__main__":
    from jobs.cli import run_command

    run_command(main, "quickstart")
