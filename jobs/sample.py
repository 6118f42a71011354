"""`medsynth sample`: pictures for a list of prompts."""

from pathlib import Path

import click

from medsynth.errors import UserError


@click.command()
@click.argument("run_dir", metavar="RUN", type=click.Path(path_type=Path))
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    required=True,
    help="CSV file with a column Prompt; one picture a row.",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the pictures, 000000.png on.")
@click.option("--seed", type=int, default=0, show_default=True, help="Fixes the noise of every picture.")
@click.option("--steps", type=click.IntRange(1), help="Denoising steps. [default: the run's]")
@click.option("--guidance", type=float, help="Guidance u + g·(c - u); 1 is none. [default: the run's]")
@click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True, help="Pictures drawn at once.")
@click.option(
    "--checkpoint", type=click.Choice(["best", "last"]), default="best", show_default=True, help="Which weights."
)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1 …")
def main(
    run_dir: Path, prompts: Path, out: Path, seed: int, steps, guidance, batch_size: int, checkpoint, device
) -> None:
    """Draw one picture for each row of a CSV file of prompts.

    RUN is the directory of a training run. Pictures are PNG files that say in their text fields which prompt, seed and
    method made them, and that they are synthetic. Pictures that exist are kept, so an interrupted call can be repeated.
    """
    import torch
    from rich.progress import track

    from datamodules.base import Conditions, derive_seed
    from datamodules.tables import drop_bad_rows, read_table
    from jobs.runs import load_run, pick_device
    from metrics.images import quantise

    table = read_table(prompts, ("Prompt",), "--prompts")
    drop_bad_rows([table], "fail")
    captions = [row["Prompt"] for row in table.rows.values()]
    module, config = load_run(run_dir, checkpoint)
    if "captions" not in module.supports.conditions:
        raise UserError(f"{run_dir}: {config.method} draws no pictures for prompts")
    module.to(pick_device(device))
    facts = {"method": config.method, "steps": str(steps or "default"), "guidance": str(guidance or "default")}
    texts = [facts | {"prompt": caption, "seed": str(seed), "row": str(i)} for i, caption in enumerate(captions)]
    missing = [i for i, text in enumerate(texts) if not _exists(out / f"{i:06d}.png", text)]
    out.mkdir(parents=True, exist_ok=True)
    click.echo(f"{len(captions) - len(missing)} of {len(captions)} pictures are there already")

    chunks = [missing[i : i + batch_size] for i in range(0, len(missing), batch_size)]
    for rows in track(chunks, "sampling", transient=True):
        seeds = [derive_seed(seed, "sample", i) for i in rows]
        with torch.no_grad():
            images = module.sample(Conditions([captions[i] for i in rows]), seeds, steps=steps, guidance=guidance)
        for i, pixels in zip(rows, quantise(images).cpu(), strict=True):
            _write(pixels, out / f"{i:06d}.png", texts[i])
    click.echo(f"{len(captions)} pictures in {out}")


def _exists(path: Path, texts: dict[str, str]) -> bool:
    """Whether the picture is there; raises UserError where another call made it of something else."""
    from PIL import Image

    if not path.is_file():
        return False
    with Image.open(path) as image:
        for key, text in texts.items():
            if image.info.get(key) != text:
                raise UserError(
                    f"{path} was made with {key} {image.info.get(key)!r}, not {text!r}; "
                    "choose another --out, or remove it"
                )
    return True


def _write(pixels, path: Path, texts: dict[str, str]) -> None:
    from PIL import Image, PngImagePlugin

    from medsynth import __version__

    info = PngImagePlugin.PngInfo()
    for key, text in {**texts, "synthetic": "true", "Software": f"medsynth {__version__}"}.items():
        info.add_itxt(key, text)
    temporary = path.with_name(f".{path.name}")
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(temporary, format="PNG", pnginfo=info)
    temporary.replace(path)


if __name__ == "__main__":
    from jobs.cli import run

    run("sample")
