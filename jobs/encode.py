"""`medsynth encode`: a data set's latents and text, computed once."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from medsynth.errors import UserError

if TYPE_CHECKING:
    from lightning import Fabric
    from omegaconf import DictConfig
    from torch import Tensor

    from datamodules.base import ImageDataModule
    from datamodules.files.latents import CacheWriter
    from lightning_modules.families.latent_diffusion import LatentDiffusion


@click.command()
@click.argument("config", nargs=-1, required=True, metavar="CONFIG... [KEY=VALUE]...")
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder to write; train with data.latents=OUT."
)
@click.option(
    "--variants", type=click.IntRange(1), default=1, show_default=True, help="Augmented variants of each sample."
)
@click.option(
    "--batch-size", type=click.IntRange(1), default=64, show_default=True, help="Pictures a process encodes at once."
)
@click.option("--shard-rows", type=click.IntRange(1), default=1024, show_default=True, help="Samples of a file.")
def main(config: tuple[str, ...], out: Path, variants: int, batch_size: int, shard_rows: int) -> None:
    """Encode a data set once, so that training needs no encoder.

    CONFIG is what `medsynth train` will be given; hardware.devices and hardware.nodes share the work. VARIANTS passes
    over the data are encoded as training would augment them; training then goes round them. An interrupted call goes on
    where it was when it is repeated, and one with more variants adds them.
    """
    from jobs.run.config import load_arguments

    encode(load_arguments(config), out, variants, batch_size, shard_rows)


def encode(config: "DictConfig", out: Path, variants: int = 1, batch_size: int = 64, shard_rows: int = 1024) -> None:
    """Write `out` as datamodules/files/latents.py says, on all processes; shards that are there already are kept.

    Raises:
        UserError: the method has no latents; weights, data or machine are not sound; `out` holds another cache.
    """
    from datamodules.batches import undrawn
    from datamodules.cached import identity
    from datamodules.files.latents import TEXT, VALIDATION, CacheWriter, variant_part
    from jobs.run.folder import build_source
    from medsynth.owner import Owner

    module = _build(config)
    data, _ = build_source(config)
    digests = module.digests()
    shared = {"shard_rows": shard_rows, "precision": config.hardware.precision}
    if not undrawn(data.to_draw()):
        CacheWriter(out, identity(data, digests) | shared)  # refuse before other processes are started
    fabric = _launch(config.hardware)
    for note in data.notes() if fabric.is_global_zero else ():
        click.echo(note)
    _draw(fabric, module.to(fabric.device).eval(), data, config.evaluation.batch_size)
    writer = CacheWriter(out, identity(data, digests) | shared)
    rows = {variant_part(k): len(data.training_set()) for k in range(variants)}
    rows[VALIDATION] = len(data.validation_set())
    captions = [] if digests["text"] is None else data.all_captions()
    rows |= {TEXT: len(captions)} if captions else {}
    with Owner(out, "--out", fabric.is_global_zero) as owner:
        owner.claim()
        if fabric.is_global_zero:
            writer.begin()
        fabric.barrier()
        _write_shards(fabric, writer, rows, _Encoders(module, fabric.autocast, batch_size), data, captions)
        fabric.barrier()
        if fabric.is_global_zero:
            writer.finish(rows)
            click.echo(f"{', '.join(f'{length} {part}' for part, length in rows.items())} in {out}")


def _build(config: "DictConfig") -> "LatentDiffusion":
    """The module with its encoders."""
    from jobs.run.folder import build_module
    from jobs.run.pretrained import hold
    from lightning_modules.base import frozen_dtype
    from lightning_modules.families.latent_diffusion import LatentDiffusion

    module = build_module(config)
    module.frozen_dtype = frozen_dtype(config.hardware.precision)  # as training without a cache would hold them
    if not isinstance(module, LatentDiffusion):
        raise UserError(
            f"method={config.method} learns from pictures; only a latent diffusion method has latents to encode"
        )
    for weights in module.required_weights():
        weights.require()
    hold(config.run_dir, module)
    module.configure_model()
    return module


def _launch(hardware: Any) -> "Fabric":
    """This process as one of all that the config asks for; the others are started unless a launcher has."""
    import logging
    from datetime import timedelta

    import lightning as L
    import torch
    from lightning.fabric.strategies import DDPStrategy
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from jobs.run.launch import cluster_environment
    from jobs.run.strategies import check_machine

    check_machine(hardware)
    if hardware.threads:
        torch.set_num_threads(hardware.threads)
    for name in ("lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # All that the processes do together is wait, and that for as long as one of them takes.
    together = DDPStrategy(process_group_backend="gloo", timeout=timedelta(days=7))
    try:
        fabric = L.Fabric(
            accelerator=hardware.accelerator,
            devices=hardware.devices,
            num_nodes=hardware.nodes,
            strategy=together if hardware.devices * hardware.nodes > 1 else "auto",
            precision=hardware.precision,
            plugins=[cluster_environment(hardware)],
        )
    except (MisconfigurationException, RuntimeError, ValueError) as error:
        raise UserError(f"hardware: {str(error).strip().splitlines()[0]}") from None
    fabric.launch()
    return fabric


def _draw(fabric: "Fabric", module: "LatentDiffusion", data: "ImageDataModule", batch_size: int) -> None:
    """Have all processes draw the class pictures that the data set lacks, as training would."""
    from rich.progress import Progress

    from callbacks.class_pictures import draw_missing

    drawings = data.to_draw()
    if not drawings:
        return
    with Progress(transient=True, disable=not fabric.is_global_zero) as progress, fabric.autocast():
        task = progress.add_task("drawing class pictures")
        draw_missing(
            module, drawings, fabric.global_rank, fabric.world_size, batch_size,
            lambda done, total: progress.update(task, completed=done, total=total),
        )  # fmt: skip
    fabric.barrier()
    data.check()


def _write_shards(
    fabric: "Fabric",
    writer: "CacheWriter",
    rows: dict[str, int],
    encoders: "_Encoders",
    data: "ImageDataModule",
    captions: list[str],
) -> None:
    """Write this process's share of the shards, but for those that are there."""
    from rich.progress import Progress

    from datamodules.files.latents import TEXT, cut
    from datamodules.stream import PlainLoader

    shards = [shard for part, length in rows.items() for shard in cut(part, length, writer.plan["shard_rows"])]
    mine = shards[fabric.global_rank :: fabric.world_size]
    with Progress(transient=True, disable=not fabric.is_global_zero) as progress:
        missing = [s for s in progress.track(mine, description="looking at what is there") if not writer.keeps(s)]
        pictures = [shard for shard in missing if shard.part != TEXT]
        shown = _Pictures(data, pictures)
        loader = PlainLoader(shown, batch_size=None, collate_fn=_as_it_is, num_workers=data.config.workers)
        stream = iter(loader)
        task = progress.add_task("encoding", total=sum(rows.values()), completed=writer.finished_rows(shards))
        for shard in missing:
            if shard.part == TEXT:
                own = captions[shard.rows.start : shard.rows.stop]
                writer.write(shard, encoders.text(own), captions=own)
            else:
                read = _counted(islice(stream, len(shard.rows)), partial(progress.advance, task))
                writer.write(shard, encoders.pictures(read))
            progress.update(task, completed=writer.finished_rows(shards))  # the other processes' as well


def _as_it_is(item: Any) -> Any:
    return item


def _counted(items: Iterable, count: Callable[[], Any]) -> Iterator:
    for item in items:
        yield item
        count()


class _Pictures:
    """The pictures of shards, one after the other, each with a digest by which equal ones are known."""

    def __init__(self, data, shards: list):
        self.training, self.validation = data.training_set(), data.validation_set()
        self.rows = [(shard.part, index) for shard in shards for index in shard.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> tuple[bytes, Any]:
        from datamodules.files.latents import VALIDATION, variant_of

        part, index = self.rows[place]
        if part == VALIDATION:
            picture = self.validation.sample(index).picture
        else:
            picture = self.training.sample(variant_of(part), index).picture
        picture = picture.contiguous()
        return hashlib.blake2b(picture.numpy(), digest_size=16).digest(), picture


class _Encoders:
    """What a module encodes with, `batch_size` at once, as a shard's tensors on the CPU."""

    def __init__(self, module: "LatentDiffusion", autocast: Callable[[], Any], batch_size: int):
        self.module, self.autocast, self.batch_size = module, autocast, batch_size

    def pictures(self, pictures: Iterable[tuple[bytes, Any]]) -> dict[str, Any]:
        """`moments`, `row` and, where the method has them, `image_embeddings` of pictures with their digests; each
        distinct picture is encoded once."""
        import torch

        places: dict[bytes, int] = {}
        row, waiting, encoded = [], [], []  # the last: tensors by name, a batch each
        for digest, picture in pictures:
            if digest not in places:
                places[digest] = len(places)
                waiting.append(picture)
            row.append(places[digest])
            if len(waiting) == self.batch_size:
                encoded.append(self._encode(waiting))
                waiting = []
        if waiting:
            encoded.append(self._encode(waiting))
        whole = {name: torch.cat([batch[name] for batch in encoded]) for name in encoded[0]}
        return whole | {"row": torch.tensor(row)}

    def text(self, captions: list[str]) -> dict[str, Any]:
        """`embeddings` and `mask` of captions; `tokens` and `ends`, where the method reads real tokens alone."""
        import torch

        batches = [captions[i : i + self.batch_size] for i in range(0, len(captions), self.batch_size)]
        with torch.no_grad(), self.autocast():
            contexts = [self.module.embed(batch) for batch in batches]
        if (dtype := self.module.kept_tokens) is not None:
            rows = (pair for context in contexts for pair in zip(context.embeddings, context.mask, strict=True))
            texts = [embeddings[real].to(dtype).cpu() for embeddings, real in rows]
            tokens, ends = torch.cat(texts), torch.tensor([len(text) for text in texts]).cumsum(0)
            if not tokens.isfinite().all():
                raise UserError(f"the text encoder gives numbers that {dtype} cannot hold; look at its weights")
            return {"tokens": tokens, "ends": ends}
        return {
            "embeddings": torch.cat([context.embeddings.float().cpu() for context in contexts]),
            "mask": torch.cat([context.mask.cpu() for context in contexts]),
        }

    def _encode(self, pictures: "list[Tensor]") -> "dict[str, Tensor]":
        import torch

        images = torch.stack(pictures).to(self.module.device)
        with torch.no_grad(), self.autocast():
            made = {"moments": self.module.encode_moments(images), "image_embeddings": self.module.embed_images(images)}
        return {name: tensor.float().cpu() for name, tensor in made.items() if tensor is not None}


if __name__ == "__main__":
    from jobs.cli import run

    run("encode")
