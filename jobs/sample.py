"""`medsynth sample`: pictures for prompts, or for what a run validates with."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import click

from medsynth.errors import UserError


@click.command()
@click.argument("run_dir", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--prompts", type=click.Path(path_type=Path), help="CSV file with a column Prompt; one picture a row.")
@click.option("--prompt", help="One prompt, for --count pictures.")
@click.option("--count", type=click.IntRange(1), default=1, show_default=True, help="Pictures of --prompt.")
@click.option("--validation", type=click.IntRange(1), help="Pictures for prompts and controls of the validation split.")
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
    run_dir: Path, prompts: Path | None, prompt: str | None, count: int, validation: int | None, out: Path, seed: int,
    steps: int | None, guidance: float | None, batch_size: int, checkpoint: str, device: str,
) -> None:  # fmt: skip
    """Draw pictures of prompts: each row of a CSV file, one prompt several times, or those that the run validates with.

    RUN is the directory of a training run. What a ControlNet is steered by comes with --validation. Pictures are PNG
    files that say in their text fields which prompt, seed and method made them, and that they are synthetic. Pictures
    that exist are kept, so an interrupted call can be repeated.
    """
    if sum(given is not None for given in (prompts, prompt, validation)) != 1:
        raise UserError("give one of --prompts FILE, --prompt TEXT and --validation COUNT")
    from jobs.run.folder import load_run, pick_device

    listed = None if prompts is None else _read_prompts(prompts)
    module, config = load_run(run_dir, checkpoint)
    if "captions" not in module.supports.conditions:
        raise UserError(f"{run_dir}: {config.method} draws no pictures for prompts")
    module.to(pick_device(device))
    asked = _validation(config, validation) if validation else _words(listed or [prompt] * count)
    facts = {"method": config.method, "steps": str(steps or "default"), "guidance": str(guidance or "default")}
    texts = [facts | {"prompt": caption, "seed": str(seed), "row": str(i)} for i, caption in enumerate(asked.captions)]
    missing = [i for i, text in enumerate(texts) if not _exists(out / f"{i:06d}.png", text)]
    out.mkdir(parents=True, exist_ok=True)
    click.echo(f"{len(texts) - len(missing)} of {len(texts)} pictures are there already")

    def draw(rows: list[int], seeds: list[int]):
        return module.sample(asked.rows(rows).to(module.device), seeds, steps=steps, guidance=guidance)

    _draw(draw, missing, batch_size, seed, out, texts)
    click.echo(f"{len(texts)} pictures in {out}")


class _Asked(NamedTuple):
    """The caption of each picture, and row numbers -> their `Conditions`: controls are read by the batch."""

    captions: list[str]
    rows: Callable


def _read_prompts(path: Path) -> list[str]:
    from datamodules.files.tables import drop_bad_rows, read_table

    table = read_table(path, ("Prompt",), "--prompts")
    drop_bad_rows([table], "fail")
    return [row["Prompt"] for row in table.rows.values()]


def _words(captions: list[str]) -> _Asked:
    from datamodules.batches import Conditions

    return _Asked(captions, lambda rows: Conditions([captions[i] for i in rows]))


def _validation(config, count: int) -> _Asked:
    from jobs.run.folder import build_source

    data, _ = build_source(config)
    return _Asked([data.evaluation_conditions([i]).captions[0] for i in range(count)], data.evaluation_conditions)


def _draw(draw: Callable, missing: list[int], batch_size: int, seed: int, out: Path, texts: list[dict]) -> None:
    import torch
    from rich.progress import track

    from datamodules.stream import derive_seed
    from metrics.images import quantise

    chunks = [missing[i : i + batch_size] for i in range(0, len(missing), batch_size)]
    for rows in track(chunks, "sampling", transient=True):
        with torch.no_grad():
            images = draw(rows, [derive_seed(seed, "sample", i) for i in rows])
        for i, pixels in zip(rows, quantise(images).cpu(), strict=True):
            _write(pixels, out / f"{i:06d}.png", texts[i])


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
