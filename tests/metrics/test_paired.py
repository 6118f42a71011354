"""PSNR and SSIM of generated pictures against the real ones of the same conditions, on any number of processes."""

import json
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
import torch.multiprocessing
from scipy.ndimage import gaussian_filter
from torch import Tensor

from callbacks.evaluation import Evaluation, EvaluationConfig
from datamodules.chest_xray import ChestXRay, ChestXRayConfig
from datamodules.medvqa_gi import MedVQAGI, MedVQAGIConfig
from datamodules.phantoms.chest import write_chest
from datamodules.phantoms.colonoscopy import write_colonoscopy
from datamodules.stream import derive_seed
from medsynth.errors import UserError
from metrics.images import quantise
from metrics.paired import PairedSimilarity

TOTAL = 13
SHARES = {  # number of processes: which pairs each scores, as a slice
    2: [slice(0, None, 2), slice(1, None, 2)],
    3: [slice(0, 0), slice(0, 5), slice(5, None)],
}


def pairs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    reals = torch.randint(0, 256, (TOTAL, 3, 16, 16), generator=generator, dtype=torch.uint8)
    strength = torch.arange(1, TOTAL + 1).reshape(-1, 1, 1, 1) / 6
    noise = strength * torch.randint(-20, 21, reals.shape, generator=generator)
    return (reals + noise).clamp(0, 255).round().to(torch.uint8), reals


def score(share: slice = slice(None), batch_size: int = 4) -> PairedSimilarity:
    """Batches of this share, the last filled up with padding."""
    metric, (images, reals) = PairedSimilarity(TOTAL), pairs()
    for rows in torch.arange(TOTAL)[share].split(batch_size):
        indices = torch.cat([rows, torch.full((batch_size - len(rows),), -1)])
        metric.update(images[indices.clamp(min=0)], reals[indices.clamp(min=0)], indices)
    return metric


def test_both_are_the_means_over_pictures_of_their_definitions():
    """SSIM as Wang et al. 2004 define it: Gaussian windows of 11 pixels, standard deviation 1.5; borders mirrored."""
    x, y = (pictures.double().numpy() for pictures in pairs())
    psnr = 10 * np.log10(255**2 / ((x - y) ** 2).mean(axis=(1, 2, 3)))

    def windowed(values):
        return gaussian_filter(values, (0, 0, 1.5, 1.5), radius=(0, 0, 5, 5), mode="mirror")

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mx, my = windowed(x), windowed(y)
    vx, vy, vxy = windowed(x * x) - mx**2, windowed(y * y) - my**2, windowed(x * y) - mx * my
    ssim = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    pooled = 10 * np.log10(255**2 / ((x - y) ** 2).mean())
    expected = {"psnr": psnr.mean(), "psnr_pooled": pooled, "ssim": ssim.mean()}
    expected["ssim_whole"] = ssim[..., 5:-5, 5:-5].mean()
    assert score().compute() == pytest.approx(expected, rel=1e-6)


def test_errors_are_those_of_means():
    each = []
    for i in range(TOTAL):
        one = PairedSimilarity(1)
        one.update(*(pictures[i : i + 1] for pictures in pairs()), torch.tensor([0]))
        each.append(one.compute())
    errors = score().errors()
    for name in ("psnr", "ssim", "ssim_whole"):
        assert errors[name] == pytest.approx(np.std([v[name] for v in each], ddof=1) / TOTAL**0.5, rel=1e-6)
    mse = np.array([10 ** (-v["psnr"] / 10) for v in each])
    expected = 10 / np.log(10) * mse.std(ddof=1) / TOTAL**0.5 / mse.mean()
    assert errors["psnr_pooled"] == pytest.approx(expected, rel=1e-6)


def test_both_rules_of_the_border_are_public_libraries():
    """scikit-image keeps whole windows only; piq's pictures of it are of whole windows too."""
    skimage, piq = pytest.importorskip("skimage.metrics"), pytest.importorskip("piq")
    images, reals = pairs()
    values = score().compute()
    both = list(zip(images.permute(0, 2, 3, 1).numpy(), reals.permute(0, 2, 3, 1).numpy(), strict=True))
    whole = [
        skimage.structural_similarity(
            x, y, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255
        )
        for x, y in both
    ]
    assert values["ssim_whole"] == pytest.approx(np.mean(whole), rel=1e-4)
    assert values["ssim_whole"] == pytest.approx(
        piq.ssim(images.double(), reals.double(), data_range=255, downsample=False).item(), rel=1e-4
    )
    psnr = [skimage.peak_signal_noise_ratio(y, x, data_range=255) for x, y in both]
    assert values["psnr"] == pytest.approx(np.mean(psnr), rel=1e-6)
    assert values["psnr_pooled"] == pytest.approx(
        skimage.peak_signal_noise_ratio(reals.numpy(), images.numpy(), data_range=255), rel=1e-6
    )


def test_equal_pictures_have_ssim_1_and_no_error():
    metric, (images, _) = PairedSimilarity(TOTAL), pairs()
    metric.update(images, images, torch.arange(TOTAL))
    one = pytest.approx(1, abs=1e-12)
    assert metric.compute() == {"psnr": float("inf"), "psnr_pooled": float("inf"), "ssim": one, "ssim_whole": one}


def test_pictures_smaller_than_a_window_are_refused():
    small = torch.zeros(2, 3, 10, 40, dtype=torch.uint8)
    with pytest.raises(UserError, match="windows of 11 pixels"):
        PairedSimilarity(2).update(small, small, torch.arange(2))


def test_padding_and_batches_do_not_count():
    expected = score(batch_size=TOTAL).compute()
    assert score(batch_size=5).compute() == pytest.approx(expected, rel=1e-12)
    metric = score()
    images, reals = pairs()
    metric.update(255 - images, reals, torch.full((TOTAL,), -1))
    assert metric.compute() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("share", [slice(1, None), slice(0, 0)])
def test_a_missing_pair_is_an_error(share):
    with pytest.raises(ValueError, match="never came"):
        score(share).compute()


def run_process(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    for world, shares in SHARES.items():
        if rank >= world:
            continue
        meeting = f"file://{folder}/meeting-{world}"
        torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
        scores = score(shares[rank]).compute()
        (folder / f"scores-{world}-{rank}.json").write_text(json.dumps(scores))
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory) -> Path:
    """What three processes wrote, which met once as two and once as three."""
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.set_forkserver_preload([__name__])  # the slow imports once, not in each process
    torch.multiprocessing.start_processes(run_process, (folder,), nprocs=3, start_method="forkserver")
    return folder


@pytest.mark.parametrize("world", SHARES)
def test_scores_do_not_depend_on_the_number_of_processes(world, processes):
    expected = score().compute()
    for rank in range(world):
        assert json.loads((processes / f"scores-{world}-{rank}.json").read_text()) == pytest.approx(expected, rel=1e-11)


# In an evaluation


class Dimmer(L.LightningModule):
    """Draws each picture as its control shows it, dimmed by what its seed says."""

    def sample(self, conditions, seeds, *, steps=None, guidance=None) -> Tensor:
        return conditions.control[:, 1:] * dimming(seeds)

    def validation_step(self, batch, batch_idx) -> None:
        pass


def dimming(seeds: list[int]) -> Tensor:
    return torch.tensor([0.5 + seed % 7 / 20 for seed in seeds]).reshape(-1, 1, 1, 1)


@pytest.fixture(scope="module")
def chest(tmp_path_factory) -> ChestXRay:
    folder = tmp_path_factory.mktemp("chest") / "phantom"
    write_chest(folder, images=12, seed=1, size=64)
    config = ChestXRayConfig(
        root=str(folder), resolution=32, validation_images=5, workers=0, controls=["mask", "picture"]
    )
    return ChestXRay(config, seed=3)


def validated(data, folder: Path, **settings) -> dict[str, float]:
    config = EvaluationConfig(
        images=7, batch_size=4, extractor="random", grid=0, cache=str(folder / "cache"), paired=True, **settings
    )
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, callbacks=[Evaluation(config, folder, seed=5)],
        use_distributed_sampler=False,
    )  # fmt: skip
    trainer.validate(Dimmer(), datamodule=data, verbose=False)
    return {name: value.item() for name, value in trainer.callback_metrics.items()}


def test_each_picture_is_compared_with_the_real_one_of_its_conditions(chest, tmp_path):
    """Seven pictures of five conditions in batches of four: some come twice, one batch is padded."""
    reals = quantise(chest.evaluation_conditions(7).control[:, 1:])
    assert torch.equal(chest.paired_pictures(range(7)), reals)
    assert len({real.numpy().tobytes() for real in reals}) == 5
    drawn = quantise(reals.float() / 255 * dimming([derive_seed(5, "evaluation", i) for i in range(7)]))
    metric = PairedSimilarity(7)
    metric.update(drawn, reals, torch.arange(7))
    values = validated(chest, tmp_path)
    for name, value in metric.compute().items():
        assert values[f"eval/{name}"] == pytest.approx(value, rel=1e-6)
    assert "eval/fd_random" in values


def test_prompts_without_pictures_are_refused(tmp_path):
    write_colonoscopy(tmp_path / "phantom", images=12, seed=1, size=64)
    (tmp_path / "phantom/asked.csv").write_text("Prompt\nGenerate an image with 1 polyp.\n")
    settings = {"root": str(tmp_path / "phantom"), "resolution": 32, "validation_images": 4, "workers": 0}
    paired = MedVQAGI(MedVQAGIConfig(**settings))
    assert paired.paired_pictures([0, 1, 2]).shape == (3, 3, 32, 32)
    with pytest.raises(UserError, match=r"evaluation\.paired: what evaluation asks for belongs to no real picture"):
        validated(MedVQAGI(MedVQAGIConfig(**settings, test_prompts="asked.csv")), tmp_path)
