"""`medsynth sample`: pictures for prompts, or for what a run validates with."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

from medsynth.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from torch import Tensor

    from datamodules.batches import Conditions
    from lightning_modules.base import GenerativeModule


@click.command()
@click.argument("run_dir", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--prompts", type=click.Path(path_type=Path), help="CSV file with a column Prompt; one picture a row.")
@click.option("--prompt", help="One prompt, for --count pictures.")
@click.option("--labels", help="Classes, by name or number, with commas between; --count pictures of each.")
@click.option("--count", type=click.IntRange(1), default=1, show_default=True, help="Pictures of --prompt or a class.")
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
    run_dir: Path, prompts: Path | None, prompt: str | None, labels: str | None, count: int, validation: int | None,
    out: Path, seed: int, steps: int | None, guidance: float | None, batch_size: int, checkpoint: str, device: str,
) -> None:  # fmt: skip
    """Draw pictures of prompts: each row of a CSV file, one prompt several times, or those that the run validates with;
    or of classes.

    RUN is the directory of a training run. What a ControlNet is steered by comes with --validation. Pictures are PNG
    files that say in their text fields which prompt or class, seed and method made them, and that they are synthetic.
    Pictures that exist are kept, so an interrupted call can be repeated.
    """
    if sum(given is not None for given in (prompts, prompt, labels, validation)) != 1:
        raise UserError("give one of --prompts FILE, --prompt TEXT, --labels NAMES and --validation COUNT")
    from jobs.run.checks import check_steps
    from jobs.run.folder import load_run, pick_device, read_config
    from medsynth.owner import Owner

    check_steps(read_config(run_dir), "--steps", steps)
    listed = [prompt] * count if prompt is not None else _read_prompts(prompts) if prompts else []
    module, config = load_run(run_dir, checkpoint)
    _require(module, "labels" if labels else "captions", validation, f"{run_dir}: {config.method}")
    if validation:
        asked = _validation(config, validation)
    else:
        asked = _classes(run_dir, labels, count) if labels else _words(listed)
    module.to(pick_device(device))
    facts = {"method": config.method, "steps": str(steps or "default"), "guidance": str(guidance or "default")}
    texts = [facts | said | {"seed": str(seed), "row": str(i)} for i, said in enumerate(asked.texts)]
    missing = [i for i, text in enumerate(texts) if not _exists(out / f"{i:06d}.png", text)]
    click.echo(f"{len(texts) - len(missing)} of {len(texts)} pictures are there already")

    def draw(rows: list[int], seeds: list[int]) -> "Tensor":
        return module.sample(asked.rows(rows).to(module.device), seeds, steps=steps, guidance=guidance)

    with Owner(out, "--out") as owner:
        owner.claim()
        _draw(draw, missing, batch_size, seed, out, texts)
    click.echo(f"{len(texts)} pictures in {out}")


class _Asked(NamedTuple):
    """What each picture is to show, by name, and row numbers -> their `Conditions`, which are read by the batch."""

    texts: list[dict[str, str]]
    rows: "Callable[[list[int]], Conditions]"


def _require(module: "GenerativeModule", kind: str, validation: int | None, who: str) -> None:
    """Raise UserError unless the method draws for conditions of that kind, or for some where it is to validate."""
    kinds = module.supports.conditions
    if not kinds:
        raise UserError(f"{who} draws no pictures for prompts")
    if not validation and kind not in kinds:
        raise UserError(f"{who} draws for {', '.join(sorted(kinds))}, not for {kind}")


def _read_prompts(path: Path) -> list[str]:
    from datamodules.files.tables import drop_bad_rows, read_table

    table = read_table(path, ("Prompt",), "--prompts")
    drop_bad_rows([table], "fail")
    return [row["Prompt"] for row in table.rows.values()]


def _words(captions: list[str]) -> _Asked:
    from datamodules.batches import Conditions

    return _Asked([{"prompt": text} for text in captions], lambda rows: Conditions([captions[i] for i in rows]))


def _classes(run_dir: Path, labels: str, count: int) -> _Asked:
    """`count` pictures of each class, named as the run's split names them or by number."""
    import torch

    from datamodules.batches import Conditions
    from jobs.run.folder import class_names
    from jobs.run.registry import nearest

    names = class_names(run_dir)
    numbers = {name: number for number, name in enumerate(names)} | {str(i): i for i in range(len(names))}
    asked = []
    for given in (word.strip() for word in labels.split(",")):
        if given not in numbers:
            raise UserError(f"--labels: there is no class {given}{nearest(given, names)}")
        asked += [numbers[given]] * count
    return _Asked(
        [{"label": names[number]} for number in asked],
        lambda rows: Conditions(labels=torch.tensor([asked[i] for i in rows])),
    )


def _validation(config: "DictConfig", count: int) -> _Asked:
    from jobs.run.folder import build_source

    data, _ = build_source(config)
    return _Asked([_said(data.evaluation_conditions([i])) for i in range(count)], data.evaluation_conditions)


def _said(conditions: "Conditions") -> dict[str, str]:
    """One row of conditions in words; what steers it beside them is a picture."""
    if conditions.captions:
        return {"prompt": conditions.captions[0]}
    return {} if conditions.labels is None else {"label": str(conditions.labels[0].item())}


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


def _write(pixels: "Tensor", path: Path, texts: dict[str, str]) -> None:
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
