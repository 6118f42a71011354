"""`make quickstart`: MSDM from nothing to pictures, on the CPU, in minutes."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from medsynth.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

_CONFIGS = Path(__file__).parent.parent / "configs" / "quickstart"


@click.command()
@click.option(
    "--out", type=click.Path(path_type=Path), default="quickstart", show_default=True, help="Folder for all of it."
)
def main(out: Path) -> None:
    """Draw phantom data, train both stages of MSDM, score it before and after, and say where the pictures are."""
    from datamodules.phantoms.colonoscopy import write_colonoscopy
    from jobs.encode import encode
    from jobs.run.config import load_config
    from jobs.train import train

    click.secho("1/4 Drawing phantom colonoscopy pictures", bold=True)
    write_colonoscopy(out / "data", images=1000, seed=0, size=64)

    click.secho("2/4 Training the autoencoder", bold=True)
    shared = [f"data.root={out}/data", f"evaluation.cache={out}/cache"]
    train(load_config([_CONFIGS / "msdm_vae.yaml"], [*shared, f"run_dir={out}/msdm_vae"]))

    click.secho("3/4 Encoding all pictures once", bold=True)
    settings = [*shared, f"run_dir={out}/msdm", f"model.vae={out}/msdm_vae/export/vae"]
    config = load_config([_CONFIGS / "msdm.yaml"], settings)
    if not (out / "latents" / "manifest.json").exists():
        encode(config, out / "latents")

    click.secho("4/4 Training the diffusion model", bold=True)
    config.data.latents = str(out / "latents")
    train(config)
    _report(config, out)


def _report(config: "DictConfig", out: Path) -> None:
    from jobs.tracking.server import mlflow_client, resolve_uri, ui_command
    from jobs.tracking.spool import read_run_id

    run_id = read_run_id(out / "msdm")
    if run_id is None:
        raise UserError(f"MLflow has not been reached; start it, and medsynth track {out / 'msdm'} sends the record")
    client = mlflow_client(resolve_uri(config.tracking.uri))
    history = client.get_metric_history(run_id, "eval/fd_random")
    before, after = min(history, key=lambda m: m.step), max(history, key=lambda m: m.step)
    grid = sorted((out / "msdm" / "grids").glob("*.png"))[-1]
    click.echo()
    click.secho("Done.", bold=True)
    click.echo(f"Fréchet distance (fd_random, lower is better): {before.value:.4g} before, {after.value:.4g} after")
    click.echo(f"Pictures beside their prompts:                  {grid}")
    click.echo(
        f"Compare the runs in MLflow:                     {ui_command(config.tracking.uri, config.tracking.experiment)}"
    )


if __name__ == "__main__":
    from jobs.cli import run_command

    run_command(main, "quickstart")
