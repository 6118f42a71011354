"""Configs: merging, and one clear line for each mistake."""

import json
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner
from omegaconf import OmegaConf

from jobs.run.checks import accumulation
from jobs.run.config import load_config, to_yaml
from jobs.run.keys import Key, as_table
from jobs.train import main
from medsynth.errors import UserError
from tests.conftest import REPOSITORY

TINY = REPOSITORY / "configs/tiny/msdm.yaml"


def test_later_files_and_settings_win(tmp_path):
    override = tmp_path / "more.yaml"
    override.write_text("model: {optim: {lr: 3e-4}}\ntrain: {max_steps: 7}\n")
    config = load_config([TINY, override], ["train.max_steps=9", "model.unet.widths=[16,32,32]"])
    assert config.model.optim.lr == 3e-4
    assert config.train.max_steps == 9
    assert config.model.unet.widths == [16, 32, 32]


def test_the_resolved_yaml_repeats_the_run(tmp_path):
    config = load_config([TINY], ["data.resolution=64"])
    path = tmp_path / "resolved.yaml"
    path.write_text(to_yaml(config))
    again = load_config([path])
    assert again == config
    assert config.model.resolution == 64, "one fact in one place: the model's side follows the data's"


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("model.optim.lrr=1", "did you mean lr?"),
        ("model.unet.width=[8]", "did you mean widths?"),
        ("trian.max_steps=1", "did you mean train?"),
        ("data.resolutoin=8", "did you mean resolution?"),
        ("train.max_steps=many", "train.max_steps"),
        ("model.optim.name=sgdd", "use one of adamw, adam"),
        ("model.loss=l3", "use one of l1, l2"),
        ("method=msdn", "did you mean msdm?"),
        ("data.name=medvqa", "did you mean medvqa_gi?"),
        ("evaluation.reference=some", "use one of train, val, all"),
        ("model.self_conditioning=2", "must be in [0, 1]"),
        ("data.prompt_dropout=1.5", "must be in [0, 1]"),
        ("train.global_batch_size=5", "4 would be"),
        ("hardware.devices=2 ", "hardware.strategy=ddp"),
        ("configs/none.yml", "key=value"),
    ],
)
def test_a_mistake_is_one_clear_line(setting, said):
    with pytest.raises(UserError) as caught:
        load_config([TINY], [setting.strip(), "train.device_batch_size=2"] if "devices" in setting else [setting])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


# Asked one after another in one new interpreter: argument lists of commands, and what each says.
INSTANT = r"""
import contextlib, io, os, sys, time
from jobs.cli import main, run_command

def said(*arguments):
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()) as out:
        sys.argv = ["medsynth", *arguments]
        try:
            run_command(main, "medsynth")
        except SystemExit as end:
            assert end.code == 2, end.code
    return err.getvalue() + out.getvalue()

sys.argv, tiny = sys.argv[:1], sys.argv[1]
with open("broken.yaml", "w") as file:
    file.write("a: [1, 2\nb: }")
with open("empty.yaml", "w") as file:
    file.write("seed: 1")
with open("methodical.yaml", "w") as file:
    file.write("method: msdm")
assert "no config file nosuch.yaml" in said("train", "nosuch.yaml")
assert "broken.yaml is no YAML" in said("train", "broken.yaml")
assert "did you mean msdm?" in said("train", tiny, "method=msdn")
assert "did you mean medvqa_gi?" in said("train", tiny, "data.name=medvqa")
assert "there is no key trian; did you mean train?" in said("train", tiny, "trian.max_steps=3")
assert "ema is a section" in said("train", tiny, "ema=0.9")
assert "names a method" in said("train", "empty.yaml")
assert "names a data set" in said("train", "methodical.yaml")
assert "resolved YAML" in said("train", "--help")
for others in (["encode"], ["prepare", "weights"], ["prepare", "depth"]):
    assert "did you mean msdm?" in said(*others, tiny, "method=msdn", *(["--out", "x"] if "encode" in others else []))
assert "did you mean msdm?" in said("submit", "--cluster", "local", tiny, "method=msdn")
assert "did you mean msdm?" in said("submit", "--cluster", "kubernetes", tiny, "method=msdn")
heavy = {"torch", "lightning", "diffusers", "transformers", "mlflow"} & sys.modules.keys()
assert not heavy, heavy
assert os.environ["GOMP_SPINCOUNT"] == "2000", "before torch is imported, which reads it"
print(time.process_time())
"""


def test_what_needs_no_torch_is_said_at_once(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", INSTANT, str(TINY)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1.0, "seconds of CPU for all of these mistakes"


@pytest.mark.parametrize("section", ["ema", "train", "model", "tracking"])
def test_a_section_takes_no_value(section):
    with pytest.raises(UserError, match=f"{section} is a section: give its keys"):
        load_config([TINY], [f"{section}=null"])


def test_what_is_missing_is_named():
    with pytest.raises(UserError, match="there is no config file"):
        load_config(["no/such.yaml"])
    with pytest.raises(UserError, match="names a method"):
        load_config([REPOSITORY / "configs/hardware/cpu.yaml"])


def test_a_broken_file_is_named(tmp_path):
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1, 2\nb: }")
    with pytest.raises(UserError, match="broken.yaml is no YAML"):
        load_config([broken])


def test_a_run_without_an_end_is_refused():
    with pytest.raises(UserError, match="no end"):
        load_config([TINY], ["train.max_steps=null"])


def test_accumulation_follows_from_the_global_batch():
    config = load_config([TINY], ["train.global_batch_size=24", "train.device_batch_size=4"])
    assert accumulation(config) == 6
    config = load_config([TINY], ["hardware.devices=3", "hardware.strategy=ddp", "train.global_batch_size=24"])
    assert accumulation(config) == 2


def test_everything_is_typed():
    config = load_config([TINY])
    for section in ("data", "model", "train", "hardware", "ema", "checkpoint", "evaluation", "tracking"):
        assert OmegaConf.get_type(config[section]) is not dict, section


def test_keys_are_printed_as_they_are():
    meaning = "What [x] stands for in [/a prompt]; see [bold]."
    keys = [Key("data.word", "str", "", "[x]", meaning), Key("n", "int", "≥ 1", 3, "Many.")]
    heading, word, n = as_table(keys, width=None)
    assert word == f"data.word  str          [x]    {meaning}"
    assert heading.index("meaning") == word.index("What") == n.index("Many.")
    _, first, second, _ = as_table(keys, width=67)
    assert first == "data.word  str          [x]    What [x] stands for in [/a prompt];"
    assert second == " " * word.index("What") + "see [bold]."
    assert all(key.name in " ".join(as_table(keys, width=20)) for key in keys), "names are whole on any terminal"


def test_keys_are_listed_whole_to_a_pipe_and_to_programs():
    preset = str(REPOSITORY / "configs/tiny/dreambooth.yaml")
    table = CliRunner().invoke(main, ["--keys", preset]).output.splitlines()
    listed = json.loads(CliRunner().invoke(main, [preset, "--keys=json"]).output)
    assert [line.split()[0] for line in table[1:]] == [key["name"] for key in listed]
    assert all(key["meaning"] in line for line, key in zip(table[1:], listed, strict=True))
    assert any("[" in key["meaning"] for key in listed)
    (steps,) = [key for key in listed if key["name"] == "train.max_steps"]
    assert (steps["type"], steps["range"], steps["value"]) == ("Optional[int]", "≥ 1 or null", 2)
