"""The arrows between the rooms, and that every shipped config is sound."""

import ast
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from jobs.run.config import load_config
from jobs.run.folder import build_module
from jobs.run.keys import describe
from jobs.run.registry import METHODS, method_class
from lightning_modules.base import count_parameters
from tests.conftest import REPOSITORY

ROOMS = ("lightning_modules", "datamodules", "metrics", "callbacks", "jobs")
# What a room may import of the project, besides itself and the leaf `medsynth`.
ARROWS = {
    "datamodules": (),
    "metrics": (),
    "lightning_modules": ("datamodules.base",),
    "callbacks": ("lightning_modules.base", "metrics", "datamodules.base"),
    "jobs": ROOMS,
}
# Rooms that must stay free of a framework, and what they must not import.
FREE = {"lightning_modules/nets": ("lightning", "diffusers", "transformers"), "metrics": ("lightning", "diffusers")}
# What methods share; everything else in lightning_modules is one method.
SHARED = {"base", "optim", "diffusion", "solvers", "text", "weights", "perceptual", "nets"}
SHARED |= {"latent_diffusion", "sd", "fine_tuning", "adapters", "image_prompt"}
# A second stage needs its own first stage.
STAGES = {("msdm", "msdm_vae")}
CONFIGS = sorted(p.relative_to(REPOSITORY) for p in (REPOSITORY / "configs").rglob("*.yaml"))
RUNS = [p for p in CONFIGS if not {"hardware", "sweeps"} & set(p.parts)]


def imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return found | {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}


def within(module: str, allowed: str) -> bool:
    return module == allowed or module.startswith(allowed + ".")


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_along_the_arrows(room):
    allowed = (room, "medsynth", *ARROWS[room])
    wrong = [
        f"{path.relative_to(REPOSITORY)} imports {module}"
        for path in (REPOSITORY / room).rglob("*.py")
        for module in imports(path)
        if module.split(".")[0] in ROOMS and not any(within(module, a) for a in allowed)
    ]
    assert not wrong


@pytest.mark.parametrize("room", FREE)
def test_plain_rooms_stay_plain(room):
    wrong = [
        f"{path.name} imports {module}"
        for path in (REPOSITORY / room).rglob("*.py")
        for module in imports(path)
        if module.split(".")[0] in FREE[room]
    ]
    assert not wrong


def test_the_mathematics_needs_torch_only():
    assert {m.split(".")[0] for m in imports(REPOSITORY / "lightning_modules/maths/diffusion.py")} == {"torch"}
    others = {m for m in imports(REPOSITORY / "lightning_modules/maths/solvers.py") if not m.startswith("torch")}
    assert others == {"collections.abc", "lightning_modules.maths.diffusion"}


def test_a_method_never_imports_another():
    for path in (REPOSITORY / "lightning_modules").glob("*.py"):
        own = {m.split(".")[1] for m in imports(path) if m.startswith("lightning_modules.")}
        others = {(path.stem, name) for name in own - SHARED - {path.stem}}
        assert others <= STAGES, path.name


@pytest.mark.parametrize("path", RUNS, ids=str)
def test_every_config_parses_and_builds_on_the_meta_device(path):
    config = load_config([REPOSITORY / path], _without_weights(path))
    with torch.device("meta"):
        module = build_module(config)
        module.configure_model()
    trained, _ = count_parameters(module)
    assert trained > 0


@pytest.mark.parametrize("path", [p for p in CONFIGS if "hardware" in p.parts], ids=str)
def test_every_hardware_config_goes_with_a_preset(path):
    config = load_config([REPOSITORY / "configs/msdm.yaml", REPOSITORY / path], ["train.global_batch_size=64"])
    assert config.hardware.strategy in method_class("msdm").supports.strategies


def test_every_method_has_a_preset_a_tiny_twin_and_a_page():
    for name in METHODS:
        assert (REPOSITORY / f"configs/{name}.yaml").is_file()
        assert (REPOSITORY / f"configs/tiny/{name}.yaml").is_file()
        assert any(name.startswith(page.stem) for page in (REPOSITORY / "docs/methods").glob("*.md"))


def test_every_key_has_a_meaning():
    for name in METHODS:
        config = load_config([REPOSITORY / f"configs/tiny/{name}.yaml"])
        for key in describe(OmegaConf.to_object(config)):
            assert len(key.meaning) > 5, key.name


def test_help_is_instant():
    """No torch behind `--help`: it answers in well under a second of work."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    code = "import sys, jobs.cli; jobs.cli.main(['--help'], standalone_mode=False); assert 'torch' not in sys.modules"
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True)
    assert time.perf_counter() - started < 5


def _without_weights(path: Path) -> list[str]:
    """Settings that put random weights in the place of downloads and earlier stages, at their full size."""
    found = load_config([REPOSITORY / path]).model
    keys = ("vae", "text_encoder.source", "pretrained", "perceptual_weights", "image_encoder")
    return [f"model.{key}=random" for key in keys if isinstance(OmegaConf.select(found, key), str)]
