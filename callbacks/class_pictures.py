"""Class pictures of a prior-preservation loss, drawn once by the model as it is before training."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
from rich.console import Console
from rich.progress import Progress

from callbacks.lightning_types import data_of, generative, loggers_of
from callbacks.samples import as_png
from datamodules.batches import DRAWN_FILE, Conditions, Drawing, undrawn
from lightning_modules.base import GenerativeModule
from medsynth.errors import UserError
from medsynth.files import naming_unwritten, put_whole, read_object
from metrics.images import quantise


class ClassPictures(L.Callback):
    """Lets all processes draw what the data set lacks.

    That is at `setup`, before a checkpoint is restored: in a resumed run too the weights are those that `build` made.
    """

    def __init__(self, batch_size: int):
        """batch_size: pictures a process draws at once."""
        self.batch_size = batch_size

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        data = data_of(trainer)
        drawings = data.to_draw() if stage == "fit" else []
        if not drawings:
            return
        missing = len(undrawn(drawings))
        console = Console(quiet=not trainer.is_global_zero)
        if missing:
            console.print(f"drawing {missing} class pictures into {drawings[0].path.parents[1]}", highlight=False)
        pl_module.to(trainer.strategy.root_device)
        bar = Progress(console=console, transient=True, disable=not missing)
        with bar, trainer.precision_plugin.forward_context():
            task = bar.add_task("class pictures")
            draw_missing(
                generative(pl_module), drawings, trainer.global_rank, trainer.world_size, self.batch_size,
                lambda done, total: bar.update(task, completed=done, total=total),
            )  # fmt: skip
        trainer.strategy.barrier("class pictures")
        data.check()
        for logger in loggers_of(trainer):  # it was told of the data before they were drawn
            logger.set_tags({"data.fingerprint": data.fingerprint()})


def draw_missing(
    module: GenerativeModule,
    drawings: list[Drawing],
    rank: int = 0,
    world_size: int = 1,
    batch_size: int = 8,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Draw this process's share of the drawings, those that are not there yet; wait for the others before reading.

    A picture is a function of its caption, its seed and the untrained weights, whoever draws it. Each is written beside
    its place and renamed, so that an interrupted drawing goes on where it was.

    Args:
        module: built, untrained, on its device.
        drawings: the same list in every process.
        on_progress: told (done, total) of all processes after each batch.

    Raises:
        UserError: the pictures there were drawn with other weights, prompts or sampling; a folder cannot be written.
    """
    _claim(drawings, module.drawing_facts())
    share = undrawn(drawings[rank::world_size])
    training = module.training
    module.eval()
    for first in range(0, len(share), batch_size):
        batch = share[first : first + batch_size]
        conditions = Conditions(captions=[drawing.caption for drawing in batch])
        images = quantise(module.sample(conditions, [drawing.seed for drawing in batch]))
        for drawing, pixels in zip(batch, images.permute(0, 2, 3, 1).cpu().numpy(), strict=True):
            _write(drawing.path, as_png(pixels))
        if on_progress:
            on_progress(len(drawings) - len(undrawn(drawings)), len(drawings))
    module.train(training)


def _claim(drawings: list[Drawing], facts: dict[str, Any]) -> None:
    """Write into each folder what its pictures are drawn with, or refuse one that says otherwise."""
    captions: dict[Path, set[str]] = {}
    for drawing in drawings:
        captions.setdefault(drawing.path.parent, set()).add(drawing.caption)
    for folder, said in captions.items():
        wanted = json.loads(json.dumps({"prompts": sorted(said), **facts}))
        found = _read(folder / DRAWN_FILE)
        if found is None:
            text = json.dumps(wanted, indent=2) + "\n"
            _write(folder / DRAWN_FILE, text.encode())
        elif differing := sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key)):
            key = differing[0]
            raise UserError(
                f"data.class_folder: {folder} holds pictures drawn otherwise: {key} was {found.get(key)} and is "
                f"{wanted.get(key)}; set another data.class_folder, or remove that folder to draw it anew"
            )


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        return read_object(path)
    except (OSError, ValueError):
        raise UserError(f"{path} is damaged: remove its folder, and the pictures are drawn anew") from None


def _write(path: Path, content: bytes) -> None:
    with naming_unwritten(f"data.class_folder: {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        put_whole(path, content)
