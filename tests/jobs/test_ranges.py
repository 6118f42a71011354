"""What stands with the fields of a config: every number has a range, and what lies outside is one line."""

import math
from collections.abc import Iterator
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from callbacks.evaluation import EvaluationConfig
from jobs.run.checks import check_monitor
from jobs.run.config import RunConfig, load_config
from jobs.run.keys import Place, places
from jobs.run.registry import DATA, METHODS
from medsynth.errors import UserError
from medsynth.ranges import Range, choice, number, numbers
from metrics.extractors import build_extractor
from metrics.paired import PAIRED
from metrics.suite import GenerationMetrics
from tests.conftest import REPOSITORY

TINY = {path.stem: path for path in sorted((REPOSITORY / "configs/tiny").glob("*.yaml"))}
TINY["cytology"] = REPOSITORY / "configs/hypernetwork.yaml"  # the data set that no tiny preset has
QUICK = settings(max_examples=60, deadline=None, derandomize=True)


def is_numeric(annotation: Any) -> bool:
    parts = get_args(annotation) or (annotation,)
    return any(part in (int, float) or (get_args(part) and is_numeric(part)) for part in parts)


@pytest.fixture(scope="module")
def presets() -> dict[str, list[Place]]:
    """Every key of each preset; together they hold the configs of all methods and data sets."""
    loaded = {name: load_config([path]) for name, path in TINY.items()}
    assert {config.method for config in loaded.values()} == METHODS.keys()
    assert {config.data.name for config in loaded.values()} == DATA.keys()
    return {name: list(places(config)) for name, config in loaded.items()}


def test_every_number_of_every_config_has_a_range(presets):
    found = {place.name: place for places_ in presets.values() for place in places_ if is_numeric(place.field.type)}
    assert len(found) > 100
    assert not [name for name, place in found.items() if place.range is None]
    for name, place in found.items():
        assert place.range.optional == (type(None) in get_args(place.field.type)), name


def outside(place: Place) -> Iterator[str | float | list[float]]:
    """Values of the field's type that it may not have, right beyond its bounds where it has any."""
    if place.range.words:
        yield from ("none", place.range.words[0].upper() + "s")
        return
    allowed, whole = place.range, "int" in str(place.field.type)
    step = (lambda x, up: x + (1 if up else -1)) if whole else (lambda x, up: math.nextafter(x, math.inf * (up or -1)))
    bad = [] if whole else [math.nan, math.inf, -math.inf]
    low = allowed.above if allowed.least is None else step(allowed.least, False)
    high = allowed.below if allowed.most is None else step(allowed.most, True)
    bad += [bound for bound in (low, high) if bound is not None]
    bad += [bound - 1000 for bound in (low,) if bound is not None]
    if allowed.counts is None:
        yield from bad
        return
    inside = allowed.least if allowed.least is not None else 1
    least, most = allowed.counts
    for value in bad:
        yield [inside] * (max(least, 1) - 1) + [value]
    if least:
        yield [inside] * (least - 1)
    if most is not None:
        yield [inside] * (most + 1)


@QUICK
@given(st.data())
def test_a_value_outside_of_its_range_is_one_line_that_names_key_value_and_range(presets, data):
    preset = data.draw(st.sampled_from(sorted(presets)))
    place = data.draw(st.sampled_from([place for place in presets[preset] if place.range is not None]))
    value = data.draw(st.sampled_from(list(outside(place))))
    if isinstance(value, list) and place.field.type == dict[str, float]:
        value = {"mask": value[-1]}
    said = str(value).replace("'", "")
    with pytest.raises(UserError) as caught:
        load_config([TINY[preset]], [f"{place.name}={said}"])
    assert str(caught.value).startswith(f"{place.name}=")
    assert str(place.range).removesuffix(" or null") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("field", "text", "good", "bad"),
    [
        (number(1.0, above=0), "> 0", [1e-300, 5], [0.0, -1.0, math.nan, math.inf]),
        (number(None, least=1), "≥ 1 or null", [None, 1, 10**30], [0, -5]),
        (number(0.5, least=0, below=1), "[0, 1)", [0.0, 0.999], [1.0, -0.1]),
        (number(0.5), "finite", [-1e300], [math.inf, None]),
        (numbers([1.0, 2.0], count=2, above=0, most=9), "2 numbers in (0, 9]", [[9.0, 1.0]], [[1.0], [1.0, 0.0], []]),
        (numbers([8], least=1), "1 or more numbers ≥ 1", [[1], [3, 4]], [[], [0]]),
        (numbers({"a": 1.0}, count=(0, None), least=0), "numbers ≥ 0", [{}, {"b": 0.0}], [{"b": -1.0}]),
        (choice(None, ("l1", "l2")), "l1, l2 or null", [None, "l1"], ["l", "L1", ""]),
    ],
)
def test_a_range_in_words_and_in_deed(field, text, good, bad):
    allowed: Range = field.metadata["range"]
    assert str(allowed) == text
    assert [allowed.fault(value) for value in good] == [None] * len(good)
    assert all(allowed.fault(value) for value in bad)


# What a preset is given beside its own, and what the refusal says.
TOGETHER = [
    ("msdm", "model.sampler.steps=1001", "model.sampler.steps=1001: pictures are drawn in 1 to 1000 steps here"),
    ("llcm", "model.sampler.steps=51", "model.sampler.steps=51: pictures are drawn in 1 to 50 steps here"),
    ("llcm", "evaluation.steps=51", "evaluation.steps=51: pictures are drawn in 1 to 50 steps here"),
    ("llcm", "model.guidance_min=20", "model.guidance_min=20.0: must not exceed guidance_max=16.0"),
    ("msdm", "model.noise.beta_start=0.5", "model.noise.beta_start=0.5: must not exceed beta_end=0.02"),
    ("msdm", "model.text_encoder.heads=3", "model.text_encoder.heads=3: must divide width=32"),
    ("stable_diffusion", "model.architecture.norm_groups=7", "norm_groups=7: must divide the width 8"),
    ("msdm", "evaluation.images=3", "evaluation.images=3: scores need at least 4; 0 scores nothing"),
    ("msdm", "checkpoint.monitor=eval/fid", "logs no such value; did you mean eval/fd_random?"),
    ("msdm", "checkpoint.monitor=eval/psnr", "checkpoint.monitor=eval/psnr: this run logs no such value"),
    ("msdm", "checkpoint.monitor=loss", "checkpoint.monitor=loss: this run logs no such value; did you mean val/loss?"),
    ("msdm", "evaluation.images=0", "checkpoint.monitor=eval/fd_random: this run logs no such value with evaluation.i"),
    ("msdm", "run_dir=", "run_dir is empty"),
    ("msdm", "model.optim.betas=0.9", "model.optim.betas takes list[float], 2 numbers in [0, 1)"),
    ("msdm", "data.workers=two", "data.workers takes int, ≥ 0"),
    ("msdm", "data.flips=2", "data.flips takes bool, true or false"),
    ("msdm", "hardware.compile=-1", "hardware.compile takes bool, true or false"),
]


@pytest.mark.parametrize(("preset", "setting", "said"), TOGETHER)
def test_values_that_do_not_go_together_are_refused_before_anything_is_made(preset, setting, said):
    with pytest.raises(UserError) as caught:
        check_monitor(load_config([TINY[preset]], [setting]))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("paired", [False, True])
def test_the_names_of_the_scores_are_those_that_are_computed(paired):
    import torch

    metrics = GenerationMetrics(build_extractor("random"), 6, 6)
    pictures = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    metrics.update_real(pictures, torch.arange(6))
    metrics.update_fake(pictures.flip(0), torch.arange(6))
    names = [f"eval/{name}" for name in metrics.compute()] + ([f"eval/{name}" for name in PAIRED] if paired else [])
    assert EvaluationConfig(extractor="random", paired=paired).names() == names
    assert EvaluationConfig(images=0).names() == []
    assert {"eval/fid", "eval/isc"} <= set(EvaluationConfig().names())


def test_a_field_with_another_default_keeps_its_range():
    config = OmegaConf.structured(RunConfig)
    assert {place.name: str(place.range) for place in places(config)}["seed"] == "[0, 4294967295]"
    cytology = {place.name: place.range for place in places(load_config([TINY["cytology"]]))}
    assert str(cytology["data.prompt_dropout"]) == "[0, 1]"
