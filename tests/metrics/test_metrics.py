"""Scores against torch-fidelity on the same pictures and weights, against closed forms, and against wrong use."""

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch_fidelity import calculate_metrics
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN as KID_MEAN
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from torchvision.utils import save_image

from medsynth.errors import UserError
from metrics import extractors
from metrics.extractors import FeatureExtractor, Features, InceptionExtractor, RandomConvExtractor, build_extractor
from metrics.features import FeatureStatistics
from metrics.frechet import frechet_distance
from metrics.images import quantise
from metrics.inception_score import InceptionScore
from metrics.kernel import full_kernel_distance, kernel_distance
from metrics.manifold import density_coverage, precision_recall
from metrics.suite import GenerationMetrics

OUTSIDE = {  # our name: torch-fidelity's
    "fid": "frechet_inception_distance",
    "kid": "kernel_inception_distance_mean",
    "kid_std": "kernel_inception_distance_std",
    "isc": "inception_score_mean",
    "isc_std": "inception_score_std",
    "precision": "precision",
    "recall": "recall",
    "f1": "f_score",
}


class PixelExtractor(FeatureExtractor):
    """A 3×3 mosaic of the picture as features, and their projections as logits."""

    name, identity, dim, classes = "pixels", "pixels", 27, 12

    def _features(self, images: Tensor) -> Features:
        pool = F.adaptive_avg_pool2d(images.float() / 255, 3).flatten(1)
        projection = torch.linspace(-9, 9, 27 * 12, device=pool.device, dtype=torch.float64).sin().reshape(27, 12) * 20
        # In float64: in float32 some processors sum another number of rows in another order.
        return Features(pool, (pool.double() @ projection).float())


def phantoms(count: int, seed: int, size: int = 48, brightness: float = 0.0) -> Tensor:
    """float32 (count, 3, size, size) in [0, 1]: an ellipse on tissue that darkens downwards, with fine texture."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(count, 10, 1, 1, generator=generator)
    y, x = torch.meshgrid(torch.linspace(-1, 1, size), torch.linspace(-1, 1, size), indexing="ij")
    ellipse = ((x - draw[:, 0] + 0.5) / (0.2 + 0.5 * draw[:, 1])) ** 2 + ((y - draw[:, 2] + 0.5) / 0.4) ** 2 < 1
    tissue = torch.stack([0.5 + 0.2 * draw[:, 3 + c] - 0.2 * y for c in range(3)], dim=1)
    lesion = ellipse[:, None] * (draw[:, 6:9] - 0.3) * 0.5
    texture = 0.05 * torch.rand(count, 3, size, size, generator=generator)
    return (tissue + lesion + texture + brightness).clamp(0, 1)


def score(extractor: FeatureExtractor, real: Tensor, fake: Tensor, **kwargs) -> dict[str, float]:
    suite = GenerationMetrics(extractor, len(real), len(fake), **kwargs)
    feed(suite.update_real, real)
    feed(suite.update_fake, fake)
    return suite.compute()


def feed(update, images: Tensor, batch: int = 16) -> None:
    for rows in torch.arange(len(images)).split(batch):
        update(images[rows], rows)


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A file of random Inception weights, normalised on a few phantoms so that features tell pictures apart."""

    class Untrained(FeatureExtractorInceptionV3):
        def load_state_dict(self, *args, **kwargs):
            """Keep the random weights: there is nothing to load."""

    folder = tmp_path_factory.mktemp("weights")
    torch.save({}, folder / "empty.pth")
    torch.manual_seed(0)
    network = Untrained("untrained", ["2048", "logits_unbiased"], feature_extractor_weights_path=folder / "empty.pth")
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    nn.init.normal_(network.fc.weight, std=0.03)
    network.train()(quantise(phantoms(6, seed=9)))
    torch.save(network.state_dict(), folder / "random.pth")
    return folder / "random.pth"


@pytest.fixture(scope="session")
def digest(weights):
    return hashlib.sha256(weights.read_bytes()).hexdigest()


@pytest.fixture
def published(monkeypatch, digest):
    """Makes the random weights pass for the published ones, which are too large to fetch in a test."""
    monkeypatch.setattr(extractors, "INCEPTION_URL", f"https://weights.example/inception-{digest[:8]}.pth")


# Outside truth.


def test_all_scores_equal_torch_fidelity_on_the_same_files_and_weights(weights, published, tmp_path):
    real, fake = quantise(phantoms(18, seed=1)), quantise(0.6 * phantoms(16, seed=2))
    for side, images in (("real", real), ("fake", fake)):
        (tmp_path / side).mkdir()
        for i, image in enumerate(images):
            save_image(image / 255, tmp_path / side / f"{i:02d}.png")
    outside = calculate_metrics(
        input1=str(tmp_path / "fake"),
        input2=str(tmp_path / "real"),
        isc=True,
        fid=True,
        kid=True,
        prc=True,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(weights),
        kid_subset_size=16,
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    ours = score(InceptionExtractor(str(weights)), real, fake)
    assert {name: ours[name] for name in OUTSIDE} == {
        name: pytest.approx(outside[theirs], rel=1e-4) for name, theirs in OUTSIDE.items()
    }
    assert set(ours) - set(OUTSIDE) == {"kid_full", "density", "coverage"}
    assert 0 < ours["precision"] < 1 and 0 < ours["recall"] < 1 and ours["isc"] > 1.01  # nothing is degenerate


def test_kernel_distance_equals_torch_fidelity():
    generator = torch.Generator().manual_seed(0)
    real, fake = torch.randn(150, 16, generator=generator), 1.2 * torch.randn(130, 16, generator=generator) + 0.2
    outside = kid_features_to_metric(fake, real, kid_subsets=20, kid_subset_size=90, verbose=False)
    ours = kernel_distance(real, fake, subsets=20, subset_size=90)
    assert ours == pytest.approx(tuple(outside.values()), rel=1e-4)


def test_the_full_kernel_distance_is_that_of_one_subset_of_all():
    generator = torch.Generator().manual_seed(0)
    real, fake = torch.randn(1500, 16, generator=generator), 1.2 * torch.randn(1500, 16, generator=generator) + 0.2
    outside = kid_features_to_metric(fake, real, kid_subsets=1, kid_subset_size=1500, verbose=False)
    assert full_kernel_distance(real, fake) == pytest.approx(outside[KID_MEAN], rel=1e-4)
    # Of sets of two sizes by its definition; and unbiased: the mean over draws from one distribution is 0.
    x, y = real[:40].double(), fake[:30].double()
    kernels = [((a @ b.T / 16 + 1) ** 3) for a, b in ((x, x), (y, y), (x, y))]
    within = [(k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in kernels[:2]]
    assert full_kernel_distance(x, y) == pytest.approx((sum(within) - 2 * kernels[2].mean()).item(), rel=1e-12)
    draws = [full_kernel_distance(*torch.randn(2, 20, 4, generator=generator)) for _ in range(300)]
    assert abs(np.mean(draws)) < 4 * np.std(draws) / 300**0.5 and np.std(draws) > 0.01


def test_density_and_coverage_are_prdc_s():
    prdc = pytest.importorskip("prdc")
    generator = torch.Generator().manual_seed(0)
    real, fake = torch.randn(1200, 8, generator=generator), 0.7 * torch.randn(300, 8, generator=generator) + 0.4
    outside = prdc.compute_prdc(real.double().numpy(), fake.double().numpy(), nearest_k=5)
    assert density_coverage(real, fake) == pytest.approx((outside["density"], outside["coverage"]), rel=1e-9)
    assert precision_recall(real, fake, 5)[:2] == pytest.approx((outside["precision"], outside["recall"]), rel=1e-9)


def test_density_and_coverage_where_they_are_known():
    line = torch.arange(40.0)[:, None]
    # Of a line of equal steps the fifth nearest other lies 3 steps off, at the ends up to 5; itself counts, too.
    density, coverage = density_coverage(line[5:-5], line[5:-5])
    assert coverage == 1 and 0.9 < density < 1.2
    assert density_coverage(line, line + 1000) == (0, 0)
    assert density_coverage(line, torch.full((7, 1), 20.0))[1] == 5 / 40, "those less than 3 steps off"
    # An outlier among the real pictures makes precision 1, and hardly any density.
    outlier = torch.cat([line, torch.tensor([[1e4]])])
    assert precision_recall(outlier, line + 1000)[0] == 1
    assert density_coverage(outlier, line + 1000) == (0.2, 1 / 41)


def test_precision_recall_equal_torch_fidelity_over_several_blocks():
    generator = torch.Generator().manual_seed(0)
    real, fake = torch.randn(2300, 8, generator=generator), 0.8 * torch.randn(1100, 8, generator=generator) + 0.3
    outside = prc_features_to_metric(fake, real, verbose=False)
    assert precision_recall(real, fake) == pytest.approx(tuple(outside.values()), rel=1e-6)


def test_inception_score_equals_torch_fidelity_in_any_order_of_pictures():
    logits = 3 * torch.randn(137, 20, generator=torch.Generator().manual_seed(0))
    outside = isc_features_to_metric(logits)
    metric = InceptionScore(total=137, classes=20)
    for rows in torch.randperm(137, generator=torch.Generator().manual_seed(1)).split(30):
        metric.update(logits[rows], rows)
    assert [v.item() for v in metric.compute()] == pytest.approx(list(outside.values()), rel=1e-12)


# Closed forms.


def statistics(features: Tensor, **kwargs) -> dict[str, Tensor]:
    metric = FeatureStatistics(features.shape[1], len(features), **kwargs)
    feed(metric.update, features, batch=7)
    return metric.compute()


def distance(features1: Tensor, features2: Tensor) -> float:
    one, two = statistics(features1), statistics(features2)
    return frechet_distance(one["mean"], one["covariance"], two["mean"], two["covariance"])


def test_statistics_are_the_moments_of_all_features():
    features = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) + 3
    state = statistics(features)
    torch.testing.assert_close(state["mean"], features.double().mean(dim=0))
    torch.testing.assert_close(state["covariance"], torch.cov(features.double().T))
    assert torch.equal(state["features"], features) and state["count"] == 50


def test_frechet_distance_of_gaussians_with_a_common_basis():
    a, b = torch.tensor([1.0, 4.0, 9.0]), torch.tensor([4.0, 1.0, 0.0])
    basis = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).double()).Q
    one, two = (basis @ torch.diag(v.double()) @ basis.T for v in (a, b))
    # |μ1 - μ2|² + Σ (√a - √b)²
    assert frechet_distance(torch.zeros(3), one, torch.ones(3), two) == pytest.approx(3 + 1 + 1 + 9, rel=1e-12)


def test_frechet_distance_of_gaussians_without_a_common_basis():
    one, two = torch.tensor([[2.0, 1.0], [1.0, 3.0]]), torch.tensor([[4.0, -1.0], [-1.0, 1.0]])
    product = one @ two
    # In two dimensions tr √M = √(tr M + 2 √det M).
    root = (product.trace() + 2 * product.det().sqrt()).sqrt()
    expected = (one.trace() + two.trace() - 2 * root).item()
    assert frechet_distance(torch.ones(2), one, torch.ones(2), two) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_fewer_pictures_than_features():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(12, 64, generator=generator), torch.rand(9, 64, generator=generator) ** 2
    centred = [(f - f.mean(dim=0)).double() / (len(f) - 1) ** 0.5 for f in (x, y)]
    traces = sum(f.square().sum() for f in centred)
    # With Σ = XᵀX the cross term is the nuclear norm of X1 X2ᵀ: no covariance is built.
    cross = torch.linalg.matrix_norm(centred[0] @ centred[1].T, "nuc")
    expected = (x.mean(dim=0) - y.mean(dim=0)).double().square().sum() + traces - 2 * cross
    assert distance(x, y) == pytest.approx(expected.item(), rel=1e-6)


def test_distance_to_itself_is_zero():
    features = torch.rand(40, 64, generator=torch.Generator().manual_seed(0))
    assert distance(features, features) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(torch.zeros(3), torch.zeros(3, 3), torch.ones(3), torch.zeros(3, 3)) == 3
    assert precision_recall(features, features) == (1, 1, 1)


def test_precision_and_recall_of_disjoint_and_nested_sets():
    grid = torch.cartesian_prod(torch.arange(10.0), torch.arange(10.0))
    assert precision_recall(grid, grid + 100) == (0, 0, 0)
    corner = grid[(grid < 3).all(dim=1)] + 0.1
    precision, recall, f1 = precision_recall(grid, corner)
    assert precision == 1 and 0 < recall < 0.3 and f1 == pytest.approx(2 * recall / (1 + recall))


def test_inception_score_bounds():
    indices = torch.arange(40)
    flat, sharp = InceptionScore(40, classes=4), InceptionScore(40, classes=4)
    flat.update(torch.zeros(40, 4), indices)
    # Each of the 10 parts gets each of the 4 classes once.
    classes = torch.empty(40, dtype=torch.int64)
    classes[torch.from_numpy(np.random.RandomState(2020).permutation(40))] = indices % 4
    sharp.update(1000 * F.one_hot(classes, 4).float(), indices)
    assert [v.item() for v in flat.compute()] == pytest.approx([1, 0])
    assert [v.item() for v in sharp.compute()] == pytest.approx([4, 0])


# The bank, the order of pictures, padding, the reference on disk.


def test_bank_is_a_subset_by_index_and_moments_are_of_all():
    features = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    state = statistics(features, max_bank=20)
    shuffled = FeatureStatistics(5, 60, max_bank=20)
    for rows in torch.randperm(60, generator=torch.Generator().manual_seed(1)).split(11):
        shuffled.update(features[rows], rows)
    assert torch.equal(shuffled.compute()["features"], state["features"])
    kept = [int((features == row).all(dim=1).nonzero()) for row in state["features"]]
    assert kept == sorted(set(kept)) and len(kept) == 20 and kept != list(range(20))
    torch.testing.assert_close(state["covariance"], torch.cov(features.double().T))


def test_scores_depend_neither_on_order_nor_on_padding():
    real, fake = quantise(phantoms(21, seed=1)), quantise(phantoms(18, seed=2, brightness=0.05))
    expected = score(PixelExtractor(), real, fake)
    suite = GenerationMetrics(PixelExtractor(), 21, 18)
    feed(suite.update_real, real)
    for rows in torch.arange(18).flip(0).split(5):
        suite.update_fake(torch.cat([real[:2], fake[rows]]), torch.cat([torch.tensor([-1, -1]), rows]))
    suite.update_fake(real[:3], torch.full((3,), -1))
    assert suite.compute() == pytest.approx(expected, rel=1e-12)


def test_names_say_which_features():
    images = quantise(phantoms(12, seed=1, size=8))
    plain = {"fd_random", "kd_random", "kd_random_std", "kd_full_random", "precision_random", "recall_random"}
    plain |= {"f1_random", "density_random", "coverage_random"}
    assert set(score(RandomConvExtractor(), images, images[:11])) == plain
    with_logits = {name.replace("random", "pixels") for name in plain} | {"isc_pixels", "isc_pixels_std"}
    assert set(score(PixelExtractor(), images, images[:11])) == with_logits


def test_one_subset_of_the_kernel_distance_has_no_deviation():
    images = quantise(phantoms(12, seed=1, size=8))
    assert "kd_random_std" not in score(RandomConvExtractor(), images, images.flip(0))
    x, y = torch.rand(9, 3), torch.rand(9, 3)
    mean, deviation = kernel_distance(x, y)
    assert deviation is None
    assert mean == pytest.approx(kid_features_to_metric(y, x, kid_subset_size=9, verbose=False)[KID_MEAN], rel=1e-4)
    assert kernel_distance(x, y, subset_size=8)[1] > 0 and kernel_distance(x, y[:7])[1] > 0


def test_real_state_survives_a_file(tmp_path):
    real, fake = quantise(phantoms(15, seed=1)), quantise(phantoms(18, seed=2))
    first = GenerationMetrics(PixelExtractor(), 15, 18)
    feed(first.update_real, real)
    feed(first.update_fake, fake)
    save_file(first.real_state(), tmp_path / "real.safetensors")
    second = GenerationMetrics(PixelExtractor(), 15, 18)
    second.load_real_state(load_file(tmp_path / "real.safetensors"))
    feed(second.update_fake, fake)
    assert second.compute() == first.compute()
    with pytest.raises(RuntimeError, match="complete"):
        second.update_real(real, torch.arange(15))


@pytest.mark.parametrize("other", [{"total_real": 16}, {"max_bank": 10}, {"extractor": RandomConvExtractor()}])
def test_real_state_of_something_else_is_refused(other):
    first = GenerationMetrics(PixelExtractor(), 15, 18)
    feed(first.update_real, quantise(phantoms(15, seed=1)))
    arguments = {"extractor": PixelExtractor(), "total_real": 15, "total_fake": 18} | other
    with pytest.raises(ValueError, match="not statistics of"):
        GenerationMetrics(**arguments).load_real_state(first.real_state())


@pytest.mark.parametrize("made_in, fed_in", [(True, False), (False, True)])
def test_reset_forgets_the_fakes_alone_in_and_out_of_inference_mode(made_in, fed_in):
    real, fake = quantise(phantoms(15, seed=1)), quantise(phantoms(18, seed=2))
    with torch.inference_mode(made_in):
        suite = GenerationMetrics(PixelExtractor(), 15, 18)
    with torch.inference_mode(fed_in):
        feed(suite.update_real, real)
        feed(suite.update_fake, real.repeat(2, 1, 1, 1)[:18])
        other = suite.compute()
        suite.reset_fake()
    feed(suite.update_fake, fake)
    assert suite.compute() == score(PixelExtractor(), real, fake) != other


@pytest.mark.parametrize(
    "indices, fault", [([0, 1, 2, 3, 4], "1 never came"), ([0, 1, 2, 3, 3, 4], "1 more than once")]
)
def test_missing_and_repeated_pictures_are_refused(indices, fault):
    metric = FeatureStatistics(3, total=6)
    metric.update(torch.rand(len(indices), 3), torch.tensor(indices))
    with pytest.raises(ValueError, match=fault):
        metric.compute()
    inception_score = InceptionScore(total=6, classes=3, splits=2)
    inception_score.update(torch.rand(5, 3), torch.arange(5))
    with pytest.raises(ValueError, match="5 pictures were scored"):
        inception_score.compute()


class BrokenExtractor(PixelExtractor):
    """Features of pictures that are white at one corner are NaN, or their logits infinite."""

    def __init__(self, logits: bool = False):
        super().__init__()
        self.logits = logits

    def _features(self, images: Tensor) -> Features:
        pool, logits = super()._features(images)
        white = images[:, 0, 0, 0] == 255
        broken, value = (logits, float("inf")) if self.logits else (pool, float("nan"))
        broken[white, 1] = value
        return Features(pool, logits)


@pytest.mark.parametrize(
    "marked, said", [("real", "3 of 15 real pictures have features"), ("fake", "3 of 18 generated pictures have")]
)
def test_features_that_are_not_finite_are_counted_and_refused(marked, said):
    sides = {"real": quantise(phantoms(15, seed=1)), "fake": quantise(phantoms(18, seed=2))}
    sides[marked][[0, 4, 13], 0, 0, 0] = 255
    with pytest.raises(UserError, match=said) as refused:
        score(BrokenExtractor(), **sides)
    assert "\n" not in str(refused.value)


def test_logits_that_are_not_finite_give_no_score():
    real, fake = quantise(phantoms(15, seed=1)), quantise(phantoms(18, seed=2))
    fake[3, 0, 0, 0] = 255
    with pytest.raises(UserError, match=r"isc_pixels, isc_pixels_std came out as no finite number"):
        score(BrokenExtractor(logits=True), real, fake)


def test_real_pictures_without_finite_features_are_not_kept():
    suite = GenerationMetrics(BrokenExtractor(), 15, 18)
    images = quantise(phantoms(15, seed=1))
    feed(suite.update_real, images)
    kept = suite.real_state()
    with pytest.raises(UserError, match=r"empty evaluation\.cache"):
        suite.load_real_state(kept | {"mean": kept["mean"] / 0 * 0})
    images[2, 0, 0, 0] = 255
    suite = GenerationMetrics(BrokenExtractor(), 15, 18)
    feed(suite.update_real, images)
    with pytest.raises(UserError, match="1 of 15 real pictures"):
        suite.real_state()


@pytest.mark.parametrize(
    "made",
    [
        lambda: FeatureStatistics(3, total=1),
        lambda: kernel_distance(torch.rand(1, 3), torch.rand(9, 3)),
        lambda: precision_recall(torch.rand(9, 3), torch.rand(3, 3)),
        lambda: density_coverage(torch.rand(5, 3), torch.rand(9, 3)),
        lambda: full_kernel_distance(torch.rand(9, 3), torch.rand(1, 3)),
    ],
)
def test_a_score_of_too_few_pictures_is_refused(made):
    with pytest.raises(UserError, match="at least"):
        made()


def test_moments_are_added_where_they_lie():
    metric = FeatureStatistics(4, total=6)
    places = {name: getattr(metric, name).data_ptr() for name in ("moment1", "moment2", "bank", "seen")}
    metric.update(torch.rand(2, 4), torch.tensor([0, 3]))
    assert {name: getattr(metric, name).data_ptr() for name in places} == places
    first = metric.moment2.clone()
    metric.reset()
    assert not metric.moment2.any() and first.any() and not metric.state_dict()


def test_quantise_is_what_a_file_gives_back(tmp_path):
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16).expand(3, -1, -1)
    assert torch.equal(quantise(levels.float() / 255), levels)
    assert quantise(torch.tensor([-0.5, 0.0019, 0.002, 1.7])).tolist() == [0, 0, 1, 255]
    save_image(levels / 255, tmp_path / "levels.png")
    assert torch.equal(torch.from_numpy(np.array(Image.open(tmp_path / "levels.png"))).permute(2, 0, 1), levels)


# Extractors.


def test_random_features_are_the_same_everywhere_and_leave_the_generator_alone():
    before = torch.get_rng_state()
    first, second = RandomConvExtractor(), build_extractor("random")
    assert torch.equal(torch.get_rng_state(), before)
    images = quantise(phantoms(3, seed=0))
    assert torch.equal(first(images).pool, second(images).pool) and first.identity == second.identity
    other = RandomConvExtractor(seed=1)
    assert not torch.equal(first(images).pool, other(images).pool) and first.identity != other.identity
    assert first(images).pool.shape == (3, first.dim) and first(images).logits is None and not first.has_logits


def test_random_features_order_degradations():
    extractor = RandomConvExtractor()
    real, again = phantoms(120, seed=1, size=64), phantoms(120, seed=2, size=64)
    noise = torch.randn(again.shape, generator=torch.Generator().manual_seed(3))

    def distance_of(fake: Tensor) -> float:
        pools = [extractor(quantise(images)).pool for images in (real, fake)]
        return distance(*pools)

    def blurred(width: int) -> Tensor:
        return F.avg_pool2d(again, width, stride=1, padding=width // 2, count_include_pad=False)

    degraded = {
        "blur": [blurred(3), blurred(9)],
        "noise": [again + 0.05 * noise, again + 0.2 * noise],
        "colour": [
            again * torch.tensor([1, 0.9, 0.9])[:, None, None],
            again.flip(1) * torch.tensor([1, 0.5, 0.5])[:, None, None],
        ],
        "layout": [again.roll(8, dims=2), again.flip(2)],
        "nothing real": [again.lerp(torch.rand(again.shape), 0.1), torch.rand(again.shape)],
    }
    floor = distance_of(again)
    for kind, (mild, strong) in degraded.items():
        assert 1.5 * floor < distance_of(mild) < distance_of(strong) / 1.5, kind


def test_extractors_stay_frozen_and_in_full_precision():
    extractor = RandomConvExtractor()
    images = quantise(phantoms(4, seed=0))
    expected = extractor(images).pool
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = nn.ModuleList([extractor]).train()[0](images).pool
    assert torch.equal(features, expected) and not features.requires_grad and not extractor.training
    assert not any(p.requires_grad for p in extractor.parameters())


@pytest.fixture
def tf32():
    """The operations for which training has chosen TF32."""
    operations = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    chosen = [operation.fp32_precision for operation in operations]
    for operation in operations:
        operation.fp32_precision = "tf32"
    yield operations
    for operation, precision in zip(operations, chosen, strict=True):
        operation.fp32_precision = precision


def test_extractors_use_no_tf32_where_training_does(tf32):
    class Watching(PixelExtractor):
        def _features(self, images: Tensor) -> Features:
            self.precisions = {operation.fp32_precision for operation in tf32}
            return super()._features(images)

    extractor = Watching()
    extractor(quantise(phantoms(1, seed=0)))
    assert extractor.precisions == {"ieee"} and {operation.fp32_precision for operation in tf32} == {"tf32"}


@pytest.mark.parametrize("images", [torch.rand(2, 3, 8, 8), torch.zeros(2, 1, 8, 8, dtype=torch.uint8)])
def test_only_uint8_rgb_pictures_are_scored(images):
    with pytest.raises(ValueError, match=r"uint8 \(n, 3, H, W\)"):
        RandomConvExtractor()(images)


def test_inception_is_told_by_its_checksum(weights, digest):
    before = torch.get_rng_state()
    extractor = build_extractor("inception", str(weights))
    assert torch.equal(torch.get_rng_state(), before)
    assert extractor.name == f"inception_{digest[:8]}" and digest in extractor.identity
    assert (extractor.dim, extractor.classes, extractor.has_logits) == (2048, 1008, True)


def test_inception_comes_from_the_hub_cache_once_fetched(weights, published, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match="medsynth prepare weights CONFIG") as missing:
        build_extractor("inception")
    cached = extractors.inception_path()
    assert str(cached) in str(missing.value) and "evaluation.weights=PATH" in str(missing.value)
    cached.parent.mkdir(parents=True)
    cached.symlink_to(weights)
    assert build_extractor("inception").name == "inception"


@pytest.fixture(scope="module")
def inception(weights):
    return InceptionExtractor(str(weights))


def test_folded_inception_has_the_features_of_the_published_network(weights, inception):
    outside = FeatureExtractorInceptionV3(
        "published", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights)
    )
    assert not any(isinstance(module, nn.BatchNorm2d) for module in inception.modules())
    for size in (48, 300):
        images = quantise(phantoms(2, seed=5, size=size))
        for ours, theirs in zip(inception(images), outside(images), strict=True):
            assert (ours - theirs).abs().max() <= 1.5e-5 * theirs.abs().max()


def other_networks(weights):
    state = torch.load(weights, weights_only=True)
    yield {f"module.{key}": value for key, value in state.items()}, r"lacks 472 of 472 weights, .* the first and has"
    yield {key: value for key, value in state.items() if key != "fc.bias"}, r"lacks 1 of 472 weights, fc\.bias"
    yield state | {"AuxLogits.fc.bias": torch.zeros(3)}, r"1 weights too many, AuxLogits\.fc\.bias the first"
    yield state | {"fc.weight": torch.zeros(1000, 2048)}, r"fc\.weight of shape \(1000, 2048\), not \(1008, 2048\)"
    yield state | {"fc.bias": torch.full((1008,), torch.nan)}, r"fc\.bias with numbers that are not finite"


def test_weights_of_another_network_are_named(weights, tmp_path):
    for state, said in other_networks(weights):
        torch.save(state, tmp_path / "other.pth")
        with pytest.raises(UserError, match=f"other.pth: not the weights of Inception 2015-12-05, it .*{said}") as no:
            build_extractor("inception", str(tmp_path / "other.pth"), "give --weights PATH")
        assert "\n" not in str(no.value) and "give --weights PATH" in str(no.value)
    assert "evaluation." not in str(no.value)


def broken_files(weights):
    yield "empty", b""
    yield "text", b"<html>404</html>"
    yield "truncated", weights.read_bytes()[:1_000_000]
    for name, content in (
        ("list", [1, 2]),
        ("code", hashlib.sha256),
    ):
        torch.save(content, weights.with_name("part.pth"))
        yield name, weights.with_name("part.pth").read_bytes()


def test_broken_inception_weights_are_refused(weights, tmp_path):
    for name, content in broken_files(weights):
        path = tmp_path / f"{name}.pth"
        path.write_bytes(content)
        with pytest.raises(UserError, match="broken, or not the weights") as refused:
            InceptionExtractor(str(path))
        assert str(path) in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("name, nearest", [("incepton", "inception"), ("rand", "random"), ("zzz", "")])
def test_unknown_extractor_names_the_nearest(name, nearest):
    with pytest.raises(UserError, match=f"no feature extractor '{name}': did you mean '{nearest}"):
        build_extractor(name)


def test_weights_for_the_random_extractor_are_refused():
    with pytest.raises(UserError, match="takes no weights"):
        build_extractor("random", "some.pth")


@pytest.mark.parametrize(
    "totals, fault",
    [
        ((3, 20, 10), "at least 4 real pictures, not 3"),
        ((20, 3, 10), "at least 4 generated pictures, not 3"),
        ((20, 20, 2), "at least 4 banked"),
        ((20, 9, 10), "at least 10 pictures, not 9"),
    ],
)
def test_too_few_pictures_are_refused_at_once(totals, fault):
    with pytest.raises(UserError, match=fault):
        GenerationMetrics(PixelExtractor(), *totals)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_scores_on_a_gpu_are_those_of_the_cpu(weights, tf32):
    real, fake = quantise(phantoms(40, seed=1)), quantise(phantoms(30, seed=2, brightness=0.05))
    for extractor in (RandomConvExtractor(), PixelExtractor(), InceptionExtractor(str(weights))):
        expected = score(extractor, real, fake)
        suite = GenerationMetrics(extractor, 40, 30).cuda()
        feed(suite.update_real, real)
        feed(suite.update_fake, fake)
        assert suite.compute() == pytest.approx(expected, rel=1e-4)
