"""The organisers' protocol, clean resizing and models of transformers, against references on the same weights."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import inception
from transformers import (
    AutoImageProcessor,
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
)

from callbacks.scoring import EvaluationConfig
from medsynth.errors import UserError
from metrics.clef import ClefScore, flat_resized, pooled
from metrics.extractors import ClefExtractor, InceptionExtractor, build_extractor
from metrics.images import quantise
from metrics.kernel import cmmd
from metrics.suite import GenerationMetrics
from tests.metrics.test_metrics import feed, phantoms, score, weights  # noqa: F401  # a fixture

# The organisers' protocol


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """A file of random weights of torchvision's InceptionV3, whose classes tell pictures apart."""
    torch.manual_seed(0)
    network = inception.inception_v3(weights=None, init_weights=False)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    nn.init.normal_(network.fc.weight, std=0.3)
    network.train()
    with torch.no_grad():
        network(flat_resized(quantise(phantoms(5, seed=9))).float() / 127.5 - 1)
    path = tmp_path_factory.mktemp("imagenet") / "inception_v3.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.mark.parametrize("size", [(8, 8), (299, 299), (310, 305), (40, 71)])
def test_the_flat_buffer_is_numpy_s(size):
    images = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    expected = np.stack([np.resize(image.permute(1, 2, 0).contiguous().numpy(), (299, 299, 3)) for image in images])
    assert np.array_equal(flat_resized(images).permute(0, 2, 3, 1).numpy(), expected)


def test_the_classifier_is_torchvision_s_with_keras_s_averages(imagenet, monkeypatch):
    monkeypatch.setattr(F, "avg_pool2d", partial(F.avg_pool2d, count_include_pad=False))
    outside = inception.inception_v3(weights=None, init_weights=False)
    outside.load_state_dict(torch.load(imagenet, weights_only=True))
    images = quantise(phantoms(2, seed=1))
    with torch.no_grad():
        expected = outside.eval()(flat_resized(images).float() / 127.5 - 1).softmax(dim=1)
    torch.testing.assert_close(ClefExtractor(str(imagenet))(images).pool, expected, rtol=1e-4, atol=1e-7)


def test_both_scores_are_the_organisers_arithmetic(imagenet):
    """Their script's steps in NumPy and SciPy, of 23 pictures: 3 of them are in no part."""
    extractor = ClefExtractor(str(imagenet))
    real, fake = quantise(phantoms(6, seed=1)), quantise(0.6 * phantoms(23, seed=2))
    p_real, p_fake = (extractor(images).pool.double().numpy() for images in (real, fake))
    means, covariances = zip(*((p.mean(axis=0), np.cov(p, rowvar=False)) for p in (p_real, p_fake)), strict=True)
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    fid = ((means[0] - means[1]) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    parts = []
    for part in p_fake[:20].reshape(10, 2, 1000):
        divergence = part * (np.log(part + 1e-16) - np.log(part.mean(axis=0, keepdims=True) + 1e-16))
        parts.append(np.exp(divergence.sum(axis=1).mean()))
    ours = score(extractor, real, fake)
    assert ours["clef_fid"] == pytest.approx(fid, rel=1e-4) and fid > 1e-3
    theirs = {"clef_is": np.mean(parts), "clef_is_std": np.std(parts), "clef_is_median": np.median(parts)}
    assert {name: ours[name] for name in theirs} == pytest.approx(theirs, rel=1e-9) and theirs["clef_is"] > 1.001
    assert {f"eval/{name}" for name in ours if not name.endswith("_std")} == set(
        EvaluationConfig(extractor="clef", weights=str(imagenet)).names()
    )


def test_what_the_organisers_score_cannot_be_taken_of():
    with pytest.raises(UserError, match="at least 10 pictures"):
        ClefScore(9)
    metric = ClefScore(20)
    metric.update(torch.rand(19, 1000), torch.arange(19))
    with pytest.raises(ValueError, match="10 parts of 2 pictures each"):
        metric.compute()


def test_weights_that_are_no_classifier_s_are_refused(tmp_path, imagenet):
    with pytest.raises(UserError, match="needs a file of InceptionV3's weights"):
        build_extractor("clef")
    with pytest.raises(UserError, match="no such file of InceptionV3's"):
        build_extractor("clef", str(tmp_path / "none.pth"))
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth: not the weights of ImageNet's InceptionV3, it lacks \d+ of"):
        build_extractor("clef", str(tmp_path / "other.pth"))


# Clean resizing


def test_clean_features_are_clean_fid_s(weights):  # noqa: F811
    resize = pytest.importorskip("cleanfid.resize").build_resizer("clean")
    extractor = InceptionExtractor(str(weights), resize="clean")
    plain = InceptionExtractor(str(weights))
    for size in (48, 400):
        images = quantise(phantoms(2, seed=5, size=size))
        resized = np.stack([resize(image.permute(1, 2, 0).numpy()) for image in images])
        with torch.no_grad():
            expected = pooled(plain.network, (torch.from_numpy(resized).permute(0, 3, 1, 2) - 128) / 128)
        pool, logits = extractor(images)
        assert (pool - expected).abs().max() <= 1e-4 * expected.abs().max()
        assert (pool - plain(images).pool).abs().max() > 1e-2 * expected.abs().max(), "another number"
        torch.testing.assert_close(logits, pool @ plain.network.fc.weight.T)
    assert extractor.name.startswith("clean_inception_") and extractor.antialias
    images = quantise(phantoms(2, seed=5, size=299))
    for ours, theirs in zip(extractor(images), plain(images), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="has a resize of its own: leave out clean"):
        build_extractor("random", resize="clean")


# Models of transformers


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> SimpleNamespace:
    """CLIP whole, its visual half, and DINOv2: random and tiny, in the hub's layout."""
    torch.manual_seed(0)
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    seen = vision | {"image_size": 32, "patch_size": 8}
    text = vision | {"vocab_size": 50, "max_position_embeddings": 8}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=seen | {"projection_dim": 12}, projection_dim=12))
    half = CLIPVisionModelWithProjection(clip.config.vision_config)
    half.vision_model.load_state_dict(clip.vision_model.state_dict())
    half.visual_projection.load_state_dict(clip.visual_projection.state_dict())
    dino = Dinov2Model(Dinov2Config(**seen))
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    made = SimpleNamespace()
    for name, model, processor in (
        ("clip", clip, CLIPImageProcessor(**size)),
        ("half", half, CLIPImageProcessor(**size)),
        ("dino", dino, BitImageProcessor(**size)),
    ):
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        setattr(made, name, folder)
    made.models = {"clip": clip.eval(), "half": half.eval(), "dino": dino.eval()}
    return made


@pytest.mark.parametrize("name", ["clip", "half", "dino"])
def test_features_are_the_model_s_own(folders, name):
    folder = getattr(folders, name)
    extractor = build_extractor("transformers", str(folder))
    images = quantise(phantoms(3, seed=1))
    pixels = AutoImageProcessor.from_pretrained(folder, use_fast=True)(list(images), return_tensors="pt")
    model = folders.models[name]
    with torch.no_grad():
        if name == "clip":
            pooled_output = model.vision_model(**pixels).pooler_output
            expected = model.visual_projection(pooled_output)
        else:
            expected = model(**pixels).image_embeds if name == "half" else model(**pixels).pooler_output
    torch.testing.assert_close(extractor(images).pool, expected)
    torch.testing.assert_close(extractor(images[1:2]).pool, expected[1:2], rtol=1e-5, atol=1e-6)
    kind = {"clip": "clip", "half": "clip", "dino": "dinov2"}[name]
    assert extractor.name.startswith(f"{kind}_") and extractor.dim == expected.shape[1]
    assert "'shortest_edge': 32" in extractor.resize and "mean [0." in extractor.input_range


def test_cmmd_is_its_authors_estimate(folders):
    extractor = build_extractor("transformers", str(folders.clip))
    real, fake = quantise(phantoms(15, seed=1)), quantise(0.6 * phantoms(12, seed=2))
    x, y = (extractor(images).pool.double() for images in (real, fake))
    x, y = x / x.norm(dim=1, keepdim=True), y / y.norm(dim=1, keepdim=True)

    def mean(a: Tensor, b: Tensor) -> float:
        squared = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T
        return torch.exp(-squared / (2 * 10**2)).mean().item()

    expected = 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))
    ours = score(extractor, real, fake)
    assert ours[f"cmmd_{extractor.name}"] == pytest.approx(expected, rel=1e-6) and expected > 1e-4
    assert cmmd(x, x) == pytest.approx(0, abs=1e-10)
    # Of two points at a distance d from each other: 1000 · 2 (1 - exp(-d² / 200)).
    one, two = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert cmmd(one, two) == pytest.approx(2000 * (1 - np.exp(-2 / 200)), rel=1e-12)
    config = EvaluationConfig(extractor="transformers", weights=str(folders.clip))
    assert set(config.names()) == {f"eval/{name}" for name in ours if not name.endswith("_std")}


def test_a_folder_that_is_no_vision_model_is_refused(folders, tmp_path):
    with pytest.raises(UserError, match="needs the folder of a vision model"):
        build_extractor("transformers")
    with pytest.raises(UserError, match="there is no such folder"):
        build_extractor("transformers", str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"is no folder of a vision model: it has no config\.json"):
        build_extractor("transformers", str(tmp_path))
    for file in folders.dino.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match="is no vision model that transformers reads") as refused:
        build_extractor("transformers", str(tmp_path))
    assert "\n" not in str(refused.value)


def test_statistics_of_another_model_are_not_taken(folders):
    first = GenerationMetrics(build_extractor("transformers", str(folders.clip)), 15, 18)
    feed(first.update_real, quantise(phantoms(15, seed=1)))
    other = GenerationMetrics(build_extractor("transformers", str(folders.dino)), 15, 18)
    with pytest.raises(ValueError, match="not statistics of"):
        other.load_real_state(first.real_state())
