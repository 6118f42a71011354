"""Text stays the text that was typed or written; a file is read as its author meant it."""

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from jobs.run.config import load_arguments, load_config, to_yaml
from jobs.run.sources import is_setting, read_setting
from jobs.study.plan import all_runs, arguments_of
from jobs.study.read import read_study
from medsynth.errors import UserError
from tests.conftest import REPOSITORY

TINY = REPOSITORY / "configs/tiny/msdm.yaml"
TEXTS = {"run_dir": False, "tracking.run_name": True, "data.tokens.*": False}

TYPED = [
    "2026_11_26",
    "runs/Study #3",
    "1:30",
    "0123",
    "no",
    "~",
    "a=b=c",
    "'quoted'",
    '"so"',
    "[x",
    "{",
    "- a",
    "a: b",
]
TYPED += [
    "#3",
    "it's",
    "1e5",
    "2026-11-26",
    "!x",
    "&a",
    "*a",
    "ä β 漢",
    " x ",
    "%d",
    "|",
    ">",
    "@",
    "`",
    "\\n",
    "null ",
]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.sampled_from(TYPED) | st.text(st.characters(exclude_characters="$", exclude_categories=["Cs"]), min_size=1))
def test_a_text_key_takes_the_text_as_it_is_typed(text):
    if text in ("null", "???"):
        return
    for key in ("run_dir", "tracking.run_name", "data.tokens.benign"):
        assert OmegaConf.select(read_setting(f"{key}={text}", TEXTS), key) == text


def test_text_reaches_the_run_as_it_was_typed():
    given = ["run_dir=runs/Study #3", "tracking.run_name=1:30", "data.root=0123", "data.csv=a=b #1.csv"]
    config = load_config([TINY], given)
    assert (config.run_dir, config.tracking.run_name) == ("runs/Study #3", "1:30")
    assert (config.data.root, config.data.csv) == ("0123", "a=b #1.csv")
    nothing = load_config([TINY], ["tracking.run_name=null", "data.latents="])
    assert nothing.tracking.run_name is None
    assert nothing.data.latents is None
    lora = REPOSITORY / "configs/tiny/stable_diffusion_lora.yaml"
    assert load_config([lora], ["model.adapter.targets=[to_q, 0123]"]).model.adapter.targets == ["to_q", "0123"]
    assert load_config([TINY], ["run_dir=~/runs"]).run_dir == str(Path("~/runs").expanduser())


FILE = "# é\nrun_dir: 2026-11-26\ntracking: {run_name: 1:30, uri: ~}\ndata:\n  csv: no\nmodel: {optim: {lr: 3e-4}}\n"


@pytest.mark.parametrize(
    "data", [FILE.encode(), FILE.replace("\n", "\r\n").encode(), FILE.encode("utf-8-sig")], ids=["LF", "CRLF", "BOM"]
)
def test_text_in_a_file_is_what_is_written_there(tmp_path, data):
    path = tmp_path / "a = b #1.yaml"
    path.write_bytes(data)
    config = load_arguments([str(TINY), str(path), "train.max_steps=3"])
    assert (config.run_dir, config.tracking.run_name, config.tracking.uri) == ("2026-11-26", "1:30", None)
    assert (config.data.csv, config.model.optim.lr) == ("no", 3e-4)
    assert not is_setting(str(path))
    assert is_setting(f"data.root={path}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: 1\nseed: 2", "is no YAML: line 2: the key seed stands there twice"),
        ("run_dir:", "run_dir takes str"),
        ("run_dir: !include x", "is no YAML: line 1: a config takes no !include"),
        ("\tseed: 3", "is no YAML: line 1: found character"),
        ("- a", "holds no keys"),
        ("x: &a [*a]", "is no YAML"),
        ("seed: 1:30", "seed takes int, [0, 4294967295]"),
        (b"seed: \xff", "is no YAML: save it as text in UTF-8"),
    ],
)
def test_a_file_that_cannot_be_meant_is_one_line(tmp_path, text, said):
    path = tmp_path / "bad.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as caught:
        load_config([TINY, path])
    assert str(caught.value).startswith(str(path))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_a_file_in_another_encoding_is_one_line(tmp_path, encoding):
    path = tmp_path / "wide.yaml"
    path.write_bytes(FILE.encode(encoding))
    with pytest.raises(UserError, match=r"wide.yaml is no YAML: save it as text in UTF-8$"):
        load_config([TINY, path])


@pytest.mark.parametrize("text", ["data:\n\tcsv: x\n", "seed:\t3", "seed: 3\t\n", "model: {\n\tvae: x}"])
def test_a_tab_is_read_or_named(tmp_path, text):
    path = tmp_path / "tab.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"tab.yaml is no YAML: line \d: .*\(a tab: indent with spaces\)$"):
        load_config([TINY, path])


PATHS = [
    "a b",
    "a=b",
    " #1",
    "a,b",
    "$HOME",
    "50%",
    "it's",
    '"q"',
    "{x: 1}",
    "[1, 2]",
    "a\nb",
    "a\\b",
    "%d",
    "*a",
    "a\u2028b",
]


@pytest.mark.parametrize("name", PATHS)
def test_a_path_is_the_same_after_it_was_written_down(tmp_path, name):
    given = load_config([TINY], [f"run_dir={tmp_path}/{name}", f"data.root={name}/{name}"])
    (tmp_path / "config.yaml").write_text(to_yaml(given), encoding="utf-8")
    for config in (given, load_config([tmp_path / "config.yaml"])):
        assert (config.run_dir, config.data.root) == (f"{tmp_path}/{name}", f"{name}/{name}")


def test_a_config_that_is_not_here_is_named_with_where(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    where = re.escape(f"configs/tiny/msdm.yaml in {tmp_path}; there is {TINY}")
    with pytest.raises(UserError, match=f"there is no config file {where}$"):
        load_arguments(["configs/tiny/msdm.yaml"])
    with pytest.raises(UserError, match="there is no config file a b=1.yaml in"):
        load_arguments(["a b=1.yaml"])


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("run_dir=runs/${x}", "run_dir: Interpolation key 'x' not found"),
        ("data.root=${data.root}", "data.root: Recursive interpolation detected"),
        ("data.root=d\udce4ta", "this is not UTF-8; rename what it names"),
    ],
)
def test_what_no_config_can_hold_is_one_line(setting, said):
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        load_config([TINY], [setting])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("setting", ["data.csv=${", "run_dir=???", "train.max_steps=[1", "=3", "seed=1:30"])
def test_a_setting_that_cannot_be_meant_is_one_line(setting):
    with pytest.raises(UserError) as caught:
        load_config([TINY], [setting])
    assert str(caught.value).startswith(setting)
    assert "\n" not in str(caught.value)


def test_a_sweep_keeps_text_as_it_is_written(tmp_path):
    path = tmp_path / "names.yaml"
    path.write_text("config: a.yaml\ngrid:\n  tracking.run_name: [2026_11_26, 1:30, null]\n  model.optim.lr: [1e-4]\n")
    study = read_study(path)
    runs = [arguments_of(study, run, {}) for run in all_runs(study)]
    assert [given[-3:-1] for given in runs] == [
        [f"tracking.run_name={name}", "model.optim.lr=1e-4"] for name in ("2026_11_26", "1:30", "null")
    ]
    assert runs[0][-1] == "run_dir=runs/names/run_name-20261126_lr-0.0001", "as it was named before"
    path.write_text("config: a.yaml\ngrid: {seed: [1, 1]}\n")
    with pytest.raises(UserError, match="two of its runs would have one run_dir"):
        read_study(path)
