"""Draw runs' loss and metric curves from MLflow: `python docs/plot_results.py RUN_DIR... --out FILE.png`."""

from pathlib import Path

import click
from matplotlib.figure import Figure

from jobs.tracking.server import mlflow_client, resolve_uri
from jobs.tracking.spool import read_run_id

_PANELS = {
    "training loss": ["train/loss"],
    "validation loss": ["val/loss"],
    "Fréchet distance, random features": ["eval/fd_random"],
    "precision and recall, random features": ["eval/precision_random", "eval/recall_random"],
    "PSNR of reconstructions, dB": ["val/psnr"],
}


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="PNG file to write.")
@click.option("--tracking-uri", help="MLflow. [default: sqlite:///mlruns.db]")
def main(runs: tuple[Path, ...], out: Path, tracking_uri: str | None) -> None:
    """One row of panels a run; panels without values are left out."""
    client = mlflow_client(resolve_uri(tracking_uri))
    curves = [{name: c for name, keys in _PANELS.items() if (c := _curves(client, run, keys))} for run in runs]
    figure = Figure(figsize=(3.4 * max(map(len, curves)), 2.7 * len(runs)), layout="constrained")
    grid = figure.subplots(len(runs), max(map(len, curves)), squeeze=False)
    for row, run, panels in zip(grid, runs, curves, strict=True):
        for axes, (name, lines) in zip(row, panels.items(), strict=False):
            _draw(axes, f"{run.name}: {name}", lines)
        for axes in row[len(panels) :]:
            axes.set_visible(False)
    figure.savefig(out, dpi=110)


def _curves(client, run: Path, keys: list[str]) -> dict[str, list[tuple[int, float]]]:
    found = {key: client.get_metric_history(read_run_id(run), key) for key in keys}
    return {key: [(p.step, p.value) for p in points] for key, points in found.items() if points}


def _draw(axes, title: str, lines: dict[str, list[tuple[int, float]]]) -> None:
    for key, points in lines.items():
        marker = "." if len(points) < 30 else None
        axes.plot(*zip(*points, strict=True), marker=marker, linewidth=1.2, label=key.split("/")[1].split("_")[0])
    values = [value for points in lines.values() for _, value in points]
    if min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")
    axes.set_title(title, fontsize=8)
    axes.set_xlabel("optimizer step", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if len(lines) > 1:
        axes.legend(fontsize=7)


if __name__ == "__main__":
    main()
