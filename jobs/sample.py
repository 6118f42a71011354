"""`medsynth sample`: pictures for prompts, classes, controls of one's own, or what a run validates with."""

import math
from pathlib import Path

import click

from jobs.drawing.request import Request
from medsynth.errors import UserError


@click.command()
@click.argument("run_dir", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--prompts", type=click.Path(path_type=Path), help="CSV file: Prompt, and if need be Negative, Filename.")
@click.option("--prompt", help="One prompt, for --count pictures, or for the controls that --prompts does not name.")
@click.option("--negative", help="A negative prompt: what guidance leads away from.")
@click.option("--labels", help="Classes, by name or number, with commas between; --count pictures of each.")
@click.option("--per-class", type=click.IntRange(1), help="Pictures of every class, in a folder for each.")
@click.option("--validation", type=click.IntRange(1), help="Pictures for prompts and controls of the validation split.")
@click.option("--controls", type=click.Path(path_type=Path), help="Folder of masks, edges, depth maps, pictures.")
@click.option("--count", type=click.IntRange(1), help="Pictures of --prompt or a class, or alone.  [default: 1]")
@click.option("--seeds", type=click.IntRange(1), default=1, show_default=True, help="Pictures of each, as NAME-s0.png.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the pictures, 000000.png on.")
@click.option("--sheet", type=click.Path(path_type=Path), help="PNG file for a contact sheet, outside of --out.")
@click.option("--seed", type=int, default=0, show_default=True, help="Fixes the noise of every picture.")
@click.option("--steps", type=click.IntRange(1), help="Denoising steps. [default: the run's]")
@click.option("--guidance", type=float, help="Guidance u + g·(c - u); 1 is none. [default: the run's]")
@click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True, help="Pictures drawn at once.")
@click.option(
    "--checkpoint", type=click.Choice(["best", "last"]), default="best", show_default=True, help="Which weights."
)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1 …")
def main(
    run_dir: Path, prompts: Path | None, prompt: str | None, negative: str | None, labels: str | None,
    per_class: int | None, validation: int | None, controls: Path | None, count: int | None, seeds: int, out: Path,
    sheet: Path | None, seed: int, steps: int | None, guidance: float | None, batch_size: int, checkpoint: str,
    device: str,
) -> None:  # fmt: skip
    """Draw pictures of prompts: each row of a CSV file, one prompt several times, or those that the run validates with;
    of classes; of nothing in particular, by --count alone; or for masks, edges, depth maps and pictures of your own,
    each named after its control.

    RUN is the directory of a training run. Pictures are PNG files that say in their text fields what made them
    (weights, step, sampler, prompt, control, seed …) and that they are synthetic; manifest.csv lists them. Pictures
    that exist are kept, so an interrupted call can be repeated; a damaged one is drawn again, one of another call
    refused.
    """
    request = Request(prompts, prompt, labels, per_class, validation, controls, negative, count, out)
    if guidance is not None and not 0 <= guidance < math.inf:
        raise UserError(f"--guidance {guidance}: give a number from 0 up")
    from jobs.drawing.asked import ask
    from jobs.drawing.facts import load_with_facts, sampling_facts
    from jobs.drawing.folder import Folder, draw
    from jobs.drawing.sheet import check_sheet, write_sheet
    from jobs.run.folder import build_module, pick_device, read_config
    from medsynth.owner import Owner

    if sheet:
        check_sheet(sheet, out)
    place, config = pick_device(device), read_config(run_dir)
    unbuilt = build_module(config)  # what it can draw is known before its weights are read
    sampled = sampling_facts(unbuilt, steps, guidance)
    asked = ask(request, run_dir, config, unbuilt, guidance)
    module, _, facts = load_with_facts(run_dir, checkpoint)
    folder = Folder(out, asked, facts | sampled, seed, seeds)
    total = len(folder.pictures)
    with Owner(out, "--out") as owner:
        missing = folder.missing()
        click.echo(f"{total - len(missing)} of {total} pictures are there already")
        owner.claim()
        with folder.listing():
            draw(module.to(place), folder, missing, batch_size, steps=steps, guidance=guidance)
    click.echo(f"{total} pictures in {out}")
    if sheet:
        click.echo(f"{write_sheet(sheet, folder.pictures, asked)} of them in {sheet}")


if __name__ == "__main__":
    from jobs.cli import run

    run("sample")
