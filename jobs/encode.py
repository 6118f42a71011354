"""`medsynth encode`: a data set's latents, computed once."""

import json
from pathlib import Path

import click


@click.command()
@click.argument("config", nargs=-1, required=True, metavar="CONFIG... [KEY=VALUE]...")
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder to write; train with data.latents=OUT."
)
@click.option(
    "--variants", type=click.IntRange(1), default=1, show_default=True, help="Augmented variants of each sample."
)
@click.option("--batch-size", type=click.IntRange(1), default=64, show_default=True, help="Pictures encoded at once.")
def main(config: tuple[str, ...], out: Path, variants: int, batch_size: int) -> None:
    """Encode a data set once, so that training needs no encoder.

    CONFIG is what `medsynth train` will be given. VARIANTS passes over the data are encoded as training would augment
    them; training then goes round them.
    """
    from jobs.config import load_arguments

    encode(load_arguments(config), out, variants, batch_size)


def encode(config, out: Path, variants: int = 1, batch_size: int = 64) -> None:
    """Write `out` as datamodules/cached.py reads it; an existing cache is replaced when the new one is whole."""
    import torch
    from safetensors.torch import save_file

    from datamodules.cached import LATENTS_FILE, MANIFEST_FILE, manifest
    from jobs.runs import build_module, build_source, pick_device
    from lightning_modules.latent_diffusion import LatentDiffusion
    from medsynth.errors import UserError

    module = build_module(config)
    if not isinstance(module, LatentDiffusion):
        raise UserError(
            f"method={config.method} learns from pictures; only a latent diffusion method has latents to encode"
        )
    data, _ = build_source(config)
    module.configure_model()
    module.to(pick_device("auto")).eval()

    training = data.training_set()
    passes = [_Pictures(training, variant) for variant in range(variants)]
    moments = [_encode_all(module, pictures, batch_size, f"variant {i}") for i, pictures in enumerate(passes)]
    validation = _encode_all(module, data.validation_set(), batch_size, "validation")

    out.mkdir(parents=True, exist_ok=True)
    (out / MANIFEST_FILE).unlink(missing_ok=True)  # the manifest says that the latents are whole
    tensors = {"training": torch.stack(moments), "validation": validation}
    save_file({name: moments.contiguous() for name, moments in tensors.items()}, out / LATENTS_FILE)
    described = manifest(data, module.encoder_digest(), variants)
    (out / MANIFEST_FILE).write_text(json.dumps(described, indent=2) + "\n")
    click.echo(f"{variants} × {len(training)} training and {len(validation)} validation latents in {out}")


class _Pictures:
    """Index -> the training sample as one pass augments it."""

    def __init__(self, training, pass_: int):
        self.training, self.pass_ = training, pass_

    def __len__(self) -> int:
        return len(self.training)

    def __getitem__(self, index: int):
        return self.training.sample(self.pass_, index)[0]


def _encode_all(module, dataset, batch_size: int, title: str):
    """float32 (n, 2C, h, w) moments of every picture, on the CPU."""
    import torch
    from rich.progress import track
    from torch.utils.data import DataLoader

    loader = DataLoader(dataset, batch_size, num_workers=2, collate_fn=_stack)
    with torch.no_grad():
        batches = [
            module.encode_moments(b.to(module.device)).float().cpu() for b in track(loader, title, transient=True)
        ]
    return torch.cat(batches)


def _stack(samples):
    import torch

    return torch.stack([s if torch.is_tensor(s) else s.images[0] for s in samples])


if __name__ == "__main__":
    from jobs.cli import run

    run("encode")
