"""Merging of configs, over every valid key and value that hypothesis thinks of."""

import json
import tempfile
from functools import reduce
from operator import getitem
from pathlib import Path

import pytest
import yaml
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from jobs.run.config import load_config, to_yaml
from jobs.run.keys import Key, describe
from medsynth.errors import UserError
from tests.conftest import REPOSITORY

TINY = REPOSITORY / "configs/tiny/msdm.yaml"
KEYS = describe(OmegaConf.to_object(load_config([TINY])))
DEFAULTS = {key.name: key.value for key in KEYS}
TYPES = {key.name: key.type for key in KEYS}
# A load takes about a tenth of a second: few examples of many keys each, and none is made smaller, which takes minutes.
PHASES = [phase for phase in Phase if phase not in (Phase.shrink, Phase.explain)]
STABLE = settings(max_examples=30, deadline=None, derandomize=True, phases=PHASES)

# These are left at their value: the choices, and what must agree with another key.
CHOICES = {"method", "data.name", "data.square", "data.on_bad", "data.check", "data.samples"}
CHOICES |= {"data.sixteen_bit", "data.on_duplicates"}
CHOICES |= {"data.paraphrase_strategy", "model.sampler.name", "model.optim.name", "model.optim.schedule", "model.loss"}
CHOICES |= {"model.prediction", "model.noise", "model.augmentation"}
CHOICES |= {"hardware.accelerator", "hardware.strategy", "hardware.precision", "checkpoint.mode", "checkpoint.on_error"}
CHOICES |= {"model.noise.schedule", "model.noise.zero_terminal_snr", "evaluation.extractor", "evaluation.reference"}
CHOICES |= {"evaluation.resize"}
TIED = {"data.resolution", "model.resolution", "train.global_batch_size", "train.device_batch_size"}
TIED |= {"hardware.devices", "hardware.nodes", "model.noise.beta_start", "model.noise.beta_end", "checkpoint.monitor"}
TIED |= {"model.noise.steps", "model.sampler.steps", "evaluation.steps", "evaluation.images"}
TIED |= {"model.text_encoder.width", "model.text_encoder.heads", "data.window"}

SHARES = st.floats(0, 1, exclude_min=True, exclude_max=True)  # every float key allows them
COUNTS = st.integers(4, 10**6)  # likewise every whole number
LOOKS_LIKE_ANOTHER_TYPE = [
    "null",
    "~",
    "true",
    "yes",
    "1e5",
    "1_000",
    "0x10",
    "12:30",
    "2024-01-01",
    ".inf",
    "- a",
    "a: b",
]
WORDS = st.text("aZ09 _-./:=#'\"\\,[]{}äß\u200b\n\t", min_size=1) | st.sampled_from(LOOKS_LIKE_ANOTHER_TYPE)
OF_TYPE = {"bool": st.booleans(), "int": COUNTS, "float": SHARES, "str": WORDS}


def values(key: Key) -> st.SearchStrategy:
    """Valid values of a key."""
    inner = key.type.removeprefix("Optional[").removeprefix("list[").rstrip("]")
    if key.type.startswith("list["):
        return st.lists(OF_TYPE[inner], min_size=len(key.value), max_size=len(key.value))
    if key.name in ("run_dir", "data.root"):  # which must name a folder; that of the home is resolved
        return WORDS.filter(lambda text: bool(text.strip()) and not text.startswith("~"))
    endless = key.name == "train.max_steps"  # a run needs an end
    return OF_TYPE[inner] | st.none() if key.type.startswith("Optional[") and not endless else OF_TYPE[inner]


FREE = [key for key in KEYS if key.name not in CHOICES | TIED]


@st.composite
def sources(draw) -> tuple[list[dict], list[tuple]]:
    """What 1 to 3 files say, and up to 4 settings behind them; they speak of the same keys."""
    keys = draw(st.lists(st.sampled_from(FREE), min_size=1, max_size=15, unique_by=lambda key: key.name))
    file = st.fixed_dictionaries({}, optional={key.name: values(key) for key in keys})
    setting = st.sampled_from(keys).flatmap(lambda key: st.tuples(st.just(key.name), values(key).filter(typable)))
    return draw(st.lists(file, min_size=1, max_size=3)), draw(st.lists(setting, max_size=4))


def typable(value) -> bool:
    """Whether a setting can say it: behind KEY= null is none, and not the word."""
    return value != "null"


def write(path: Path, said: dict) -> Path:
    """A YAML file of full names and their values."""
    tree: dict = {}
    for name, value in said.items():
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    path.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    return path


def setting(name: str, value) -> str:
    """As it is typed: text as it is, all else as YAML."""
    text = isinstance(value, str) and TYPES.get(name) in ("str", "Optional[str]")
    return f"{name}={value if text else json.dumps(value, ensure_ascii=False)}"


@STABLE
@given(sources())
def test_the_last_one_said_wins_and_the_resolved_yaml_is_a_fixed_point(said):
    files, overrides = said
    expected = DEFAULTS | {name: value for file in files for name, value in file.items()} | dict(overrides)
    with tempfile.TemporaryDirectory() as folder:
        paths = [write(Path(folder, f"{number}.yaml"), file) for number, file in enumerate(files)]
        config = load_config([TINY, *paths], [setting(*pair) for pair in overrides])
        resolved = Path(folder, "resolved.yaml")
        resolved.write_text(to_yaml(config), encoding="utf-8")
        again = load_config([resolved])
    plain = OmegaConf.to_container(config)
    found = {name: reduce(getitem, name.split("."), plain) for name in expected}
    assert found == expected
    assert {name: type(value) for name, value in found.items()} == {name: type(v) for name, v in expected.items()}
    assert again == config
    assert to_yaml(again) == to_yaml(config)


@st.composite
def misspelt(draw) -> tuple[str, str]:
    """A key with one part misspelt by one letter, and the key up to that part."""
    parts = draw(st.sampled_from(KEYS)).name.split(".")
    place = draw(st.integers(0, len(parts) - 1))
    word, at = parts[place], draw(st.integers(0, len(parts[place]) - 1))
    letter = draw(st.sampled_from("abcdefghijklmnopqrstuvwxyz_"))
    edits = [word[:at] + word[at + 1 :], word[:at] + letter + word[at:], word[:at] + letter + word[at + 1 :]]
    wrong = draw(st.sampled_from(edits))
    up_to = ".".join([*parts[:place], wrong])
    known = {".".join(key.name.split(".")[:depth]) for key in KEYS for depth in range(1, 5)}
    assume(wrong and up_to not in known)
    return ".".join([*parts[:place], wrong, *parts[place + 1 :]]), up_to


@STABLE
@given(misspelt(), st.sampled_from([1, 0.5, True, "word", [1, 2], None]), st.booleans())
def test_any_misspelt_key_is_refused_by_its_name(key, value, in_a_file):
    name, up_to = key
    with tempfile.TemporaryDirectory() as folder:
        file, override = write(Path(folder, "more.yaml"), {name: value}), setting(name, value)
        with pytest.raises(UserError) as caught:
            load_config([TINY, file] if in_a_file else [TINY], [] if in_a_file else [override])
    said = str(caught.value)
    assert said.startswith(f"{file}: " if in_a_file else f"{override}: ")
    assert f"there is no key {up_to};" in said
    assert "\n" not in said
