"""A run goes on with the split that it began with, or not at all."""

import json
import re
import shutil

import pytest

from jobs.run.config import load_config
from jobs.run.folder import build_module, build_source, require_same_split, write_config
from jobs.run.summary import print_summary, try_picture
from medsynth.errors import UserError
from tests.conftest import REPOSITORY


def tiny(root, *settings: str):
    keys = [f"data.root={root}", "data.validation_images=4", "data.workers=0", "run_dir=run"]
    return load_config([REPOSITORY / "configs/tiny/msdm.yaml"], [*keys, *settings])


def test_another_group_is_another_run(here, phantom):
    write_config(tiny(phantom))
    write_config(tiny(phantom))
    with pytest.raises(
        UserError, match=r"^run_dir=run holds a run with data\.group=None, and so another split: choose"
    ):
        write_config(tiny(phantom, "data.group=(.)"))


def test_what_trained_does_not_validate(here, phantom):
    data, _ = build_source(tiny(phantom))
    (here / "run").mkdir()
    require_same_split(data, here / "run")
    data.write_split("run")
    split = json.loads((here / "run/split.json").read_text())
    assert list(split) == ["seed", "train", "val"] and len(split["val"]) == 4
    require_same_split(build_source(tiny(phantom))[0], here / "run")
    fewer, _ = build_source(tiny(phantom, "data.validation_images=3"))
    require_same_split(fewer, here / "run")  # one that validated trains: no score is wrong
    more, _ = build_source(tiny(phantom, "data.validation_images=6"))
    moved = sorted(set(more.split_facts()["val"]) - set(split["val"]))
    line = f"/run: {moved[0]}, {moved[1]} trained in this run and would now validate: set the split as it was"
    with pytest.raises(UserError, match=re.escape(line)):
        require_same_split(more, here / "run")


def test_the_summary_names_what_is_not_read(here, phantom, capsys):
    root = shutil.copytree(phantom, here / "set")
    (root / "images/[odd].heic").write_bytes(b"x")
    config = tiny(root, r"data.group=phantom-(\d{5})")
    data, counts = build_source(config)
    module = build_module(config)
    module.configure_model()
    print_summary(config, module, try_picture(module, data), counts, data.notes())
    told = " ".join(capsys.readouterr().out.split())
    assert "1 file is not read: images/[odd].heic" in told and "4 groups, 3 train groups" in told
