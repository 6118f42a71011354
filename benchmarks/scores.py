"""What scores cost beside torchmetrics, on one thread: statistics, Inception's features, the Fréchet distance.

    python -m benchmarks.scores                                    # the sizes of an FID
    python -m benchmarks.scores --features 256 --images 2 --rounds 3   # in seconds

Both take turns in one process, in another order each round. Inception has random weights: nothing is downloaded, and
its time does not depend on them.
"""

import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from statistics import quantiles
from typing import Any, NamedTuple

import click


class Peers(NamedTuple):
    """Two ways to one result; `difference` compares their results, relative to the larger where it is a number."""

    name: str
    ours: Callable[[], Any]
    theirs: Callable[[], Any]
    difference: Callable[[Any, Any], float]


@click.command()
@click.option("--features", type=click.IntRange(8), default=2048, show_default=True, help="Features of a picture.")
@click.option("--pictures", type=click.IntRange(2), help="Of full rank. [default: 2.5 times the features]")
@click.option("--few", type=click.IntRange(2), help="Of deficient rank. [default: a quarter of the features]")
@click.option("--images", type=click.IntRange(0), default=16, show_default=True, help="For Inception; 0 leaves it out.")
@click.option("--side", type=click.IntRange(1), default=256, show_default=True, help="Of these, pixels.")
@click.option("--batch", type=click.IntRange(1), default=32, show_default=True, help="Features of an update.")
@click.option("--rounds", type=click.IntRange(2), default=7, show_default=True, help="Of each.")
@click.option(
    "--clock", type=click.Choice(["wall", "cpu"]), default="wall", show_default=True, help="cpu: of one thread."
)
@click.option("--json", "file", type=click.Path(path_type=Path), help="Where the rows are put.")
def main(
    features: int, pictures: int | None, few: int | None, images: int, side: int, batch: int, rounds: int, clock: str,
    file: Path | None,
) -> None:  # fmt: skip
    """Measure the parts of a score beside torchmetrics."""
    os.environ["OMP_NUM_THREADS"] = "1"  # for scipy's LAPACK, which has threads of its own; before it is imported
    import torch

    torch.set_num_threads(1)
    with torch.no_grad():
        peers = [
            _frechet("Fréchet distance, full rank", pictures or 5 * features // 2, features),
            _frechet("Fréchet distance, deficient", few or max(features // 4, 2), features),
            _update(batch, features),
        ]
        peers += [_inception(images, side)] if images else []
        rows = [measured(pair, rounds, time.process_time if clock == "cpu" else time.perf_counter) for pair in peers]
    _print(rows)
    if file:
        file.write_text(
            json.dumps({"machine": _machine(), "clock": clock, "rows": rows}, indent=1) + "\n", encoding="utf-8"
        )


def measured(pair: Peers, rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Seconds of both and their ratio, each [lower quartile, median, upper quartile] over the rounds."""
    difference = pair.difference(pair.ours(), pair.theirs())
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for i in range(rounds):
        for side in sorted(seconds, reverse=bool(i % 2)):
            work = getattr(pair, side)
            started = clock()
            work()
            seconds[side].append(clock() - started)
    ratios = [theirs / ours for ours, theirs in zip(seconds["ours"], seconds["theirs"], strict=True)]
    spreads = {side: quantiles(values, n=4, method="inclusive") for side, values in seconds.items()}
    spread = quantiles(ratios, n=4, method="inclusive")
    return {"name": pair.name, **spreads, "ratio": spread, "difference": difference, "rounds": seconds}


def _frechet(name: str, pictures: int, features: int) -> Peers:
    import torch
    from torchmetrics.image.fid import _compute_fid

    from metrics.frechet import frechet_distance

    moments = []
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        # Rectified and pooled, as Inception's are: positive, of spreads over two decades, and correlated.
        mixed = torch.randn(features, features, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        x = torch.randn(pictures, features, generator=generator, dtype=torch.float64)
        x = (x @ mixed / features**0.5 * torch.logspace(0, -2, features, dtype=torch.float64)).relu()
        moments += [x.mean(dim=0), torch.cov(x.T)]
    return Peers(
        f"{name}: {pictures} × {features}",
        lambda: frechet_distance(*moments),
        lambda: _compute_fid(*moments).item(),
        lambda ours, theirs: abs(ours - theirs) / theirs,
    )


def _update(batch: int, features: int) -> Peers:
    import torch
    from torchmetrics.image.fid import FrechetInceptionDistance

    from metrics.features import FeatureStatistics

    pool, indices = torch.rand(batch, features), torch.arange(batch)

    class Given(torch.nn.Module):
        """Features that are there already, so that only their moments are timed."""

        num_features = features

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return pool

    ours = FeatureStatistics(features, batch)
    theirs = FrechetInceptionDistance(Given(), input_img_size=(3, 8, 8))
    images = torch.zeros(batch, 3, 8, 8, dtype=torch.uint8)

    def largest_difference(_ours: None, _theirs: None) -> float:
        difference = (ours.moment2 - theirs.real_features_cov_sum).abs().max() / ours.moment2.max()
        return difference.item()

    return Peers(
        f"statistics, an update: {batch} × {features}",
        lambda: ours.update(pool, indices),
        lambda: theirs.update(images, real=True),
        largest_difference,
    )


def _inception(images: int, side: int) -> Peers:
    import torch
    from torchmetrics.image.fid import NoTrainInceptionV3

    from metrics.extractors import InceptionExtractor

    # Coarse, so that they differ by more than grain, on which the weights are normalised.
    coarse = torch.rand(max(images, 6), 3, 7, 7, generator=torch.Generator().manual_seed(0))
    pictures = (torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1) * 255).byte()
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "random.pth"
        torch.save(_random_weights(weights, pictures[:6]), weights)
        pictures = pictures[:images]
        ours = InceptionExtractor(str(weights))
        theirs = NoTrainInceptionV3("random", ["2048"], str(weights), antialias=False)
    return Peers(
        f"Inception's features: {images} pictures of {side}²",
        lambda: ours(pictures).pool,
        lambda: theirs(pictures),
        lambda ours, theirs: ((ours - theirs).abs().max() / theirs.abs().max()).item(),
    )


def _random_weights(empty: Path, pictures: Any) -> dict[str, Any]:
    """Of the published network's shapes, normalised on some pictures."""
    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Untrained(FeatureExtractorInceptionV3):
        def load_state_dict(self, *args: Any, **kwargs: Any) -> None:
            """Keep the random weights: there is nothing to load."""

    torch.save({}, empty)
    torch.manual_seed(0)
    network = Untrained("untrained", ["2048"], feature_extractor_weights_path=str(empty))
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    network.train()(pictures)
    return network.state_dict()


def _machine() -> dict[str, Any]:
    import scipy
    import torch
    import torchmetrics

    return {
        "date": datetime.now(UTC).date().isoformat(),
        "device": platform.machine(),
        "python": platform.python_version(),
        **{package.__name__: package.__version__ for package in (torch, torchmetrics, scipy)},
    }


def _print(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "ours, s", "torchmetrics, s", "torchmetrics / ours", "difference", box=None)
    table.columns[0].no_wrap = True
    for row in rows:
        cells = [f"{row[key][1]:.3g} ({row[key][0]:.3g}–{row[key][2]:.3g})" for key in ("ours", "theirs", "ratio")]
        table.add_row(row["name"], *cells, f"{row['difference']:.1e}")
    Console().print(table)


if __name__ == "__main__":
    main()
