"""The arrows between the rooms, the length of files and functions, and that every shipped config is sound."""

import ast
import os
import subprocess
import sys
import time
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from jobs.run.config import load_config
from jobs.run.folder import build_module
from jobs.run.keys import describe
from jobs.run.registry import DATA, METHODS, method_class
from lightning_modules.base import count_parameters
from tests.conftest import REPOSITORY

# What a floor may import of the project, besides itself and the leaf `medsynth`. A floor is a folder, or the files that
# stand at the top of a room; "…/base.py" and its like are a room's contract, which stands on a floor of its own.
METHOD = ("base", "families", "parts", "maths", "nets")
ARROWS = {
    "metrics": (),
    "datamodules/files": ("datamodules.batches",),
    "datamodules/phantoms": ("datamodules.files",),
    "datamodules": ("datamodules.files",),
    "lightning_modules/nets": (),
    "lightning_modules/maths": (),
    "lightning_modules/parts": ("lightning_modules.nets", "lightning_modules.maths"),
    "lightning_modules/families": (*(f"lightning_modules.{name}" for name in METHOD), "datamodules.batches"),
    "lightning_modules": (
        *(f"lightning_modules.{name}" for name in METHOD), "datamodules.batches", "datamodules.stream"
    ),
    "callbacks": (
        "lightning_modules.base", "metrics", "datamodules.base", "datamodules.batches", "datamodules.stream"
    ),
    "jobs/run": ("lightning_modules", "datamodules", "callbacks", "metrics", "jobs.tracking"),
    "jobs/tracking": (),
    "jobs/cluster": ("jobs.run",),
    "jobs/report": ("jobs.run", "jobs.tracking", "callbacks.protocols", "metrics.protocol"),
    "jobs/study": ("jobs.run", "jobs.report", "jobs.tracking", "jobs.cluster", "callbacks"),
    "jobs/scoring": ("jobs.run", "jobs.drawing", "lightning_modules", "datamodules", "callbacks", "metrics"),
    "jobs/drawing": ("jobs.run", "lightning_modules", "datamodules", "callbacks", "metrics"),
    "jobs": ("lightning_modules", "datamodules", "callbacks", "metrics", "jobs"),
}  # fmt: skip
ROOMS = ("lightning_modules", "datamodules", "metrics", "callbacks", "jobs")
# Floors that are free of the libraries above them, and what of the outside they may import.
OUTSIDE = {
    "lightning_modules/nets": {"torch"},
    "lightning_modules/maths": {"torch"},
}
FREE = {"metrics": {"lightning", "diffusers"}}
CONFIGS = sorted(p.relative_to(REPOSITORY) for p in (REPOSITORY / "configs").rglob("*.yaml"))
RUNS = [p for p in CONFIGS if not {"hardware", "sweeps", "stages"} & set(p.parts)]
SOURCES = sorted(p.relative_to(REPOSITORY) for room in (*ROOMS, "medsynth") for p in (REPOSITORY / room).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Every module that a file imports, also inside functions; relative to the repository."""
    tree = ast.parse((REPOSITORY / path).read_text())
    found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return found | {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}


def within(module: str, allowed: str) -> bool:
    return module == allowed or module.startswith(allowed + ".")


def module_name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def of_floor(floor: str) -> list[Path]:
    return [path for path in SOURCES if path.parent == Path(floor)]


def test_every_folder_is_a_floor():
    assert {str(path.parent) for path in SOURCES} - {"medsynth"} <= set(ARROWS)


@pytest.mark.parametrize("floor", ARROWS)
def test_floors_import_only_along_the_arrows(floor):
    allowed = (floor.replace("/", "."), "medsynth", *ARROWS[floor])
    wrong = [
        f"{path} imports {module}"
        for path in of_floor(floor)
        for module in imports(path)
        if module.split(".")[0] in ROOMS and not any(within(module, a) for a in allowed)
    ]
    assert not wrong


@pytest.mark.parametrize("floor", OUTSIDE)
def test_the_mathematics_and_the_networks_need_torch_only(floor):
    wrong = {
        f"{path} imports {module}"
        for path in of_floor(floor)
        for module in imports(path)
        if module.split(".")[0] not in {*OUTSIDE[floor], *ROOMS, "medsynth", *sys.stdlib_module_names}
    }
    assert not wrong


@pytest.mark.parametrize("room", FREE)
def test_plain_rooms_stay_plain(room):
    wrong = [f"{path} imports {m}" for path in of_floor(room) for m in imports(path) if m.split(".")[0] in FREE[room]]
    assert not wrong


def test_a_method_never_imports_another_but_its_own_first_stage():
    """The files at the top of lightning_modules are the methods and their contract; a first stage has its second's name
    before its own, as msdm_vae has msdm's."""
    for path in of_floor("lightning_modules"):
        others = {m.split(".")[1] for m in imports(path) if m.startswith("lightning_modules.")}
        others &= {other.stem for other in of_floor("lightning_modules")} - {"base", path.stem}
        assert all(other.startswith(f"{path.stem}_") for other in others), path


def test_the_contract_knows_no_method():
    allowed = ("lightning_modules.parts", "datamodules.batches", "medsynth")
    for module in imports(Path("lightning_modules/base.py")):
        assert module.split(".")[0] not in ROOMS or any(within(module, a) for a in allowed), module


def test_nothing_runs_in_a_circle():
    """Over what is imported when a module is: what a function imports when it is called closes no circle."""
    graph = {}
    names = {module_name(path) for path in SOURCES}
    for path in SOURCES:
        tree = ast.parse((REPOSITORY / path).read_text())
        top = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module in names]
        graph[module_name(path)] = {node.module for node in top}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as circle:
        pytest.fail(f"{' -> '.join(circle.args[1])}")


def test_the_top_of_a_room_is_its_list():
    """`ls lightning_modules/*.py` is the methods and their contract, `ls jobs/*.py` the commands."""
    targets = {method.target.split(":")[0] for method in METHODS.values()}
    assert {module_name(p) for p in of_floor("lightning_modules")} - targets == {
        "lightning_modules", "lightning_modules.base"
    }  # fmt: skip
    data = {target.split(":")[0] for target in DATA.values()}
    contract = {"base", "batches", "stream", "splits", "captioned", "cached"}
    assert {p.stem for p in of_floor("datamodules") if module_name(p) not in data} == {"__init__", *contract}
    for path in of_floor("jobs"):
        if path.stem not in ("__init__", "cli"):
            assert "@click." in (REPOSITORY / path).read_text(), f"{path} is no command"


def test_files_and_functions_are_short():
    """400 lines a file, 60 a function: longer ones are two."""
    long = []
    for path in SOURCES:
        text = (REPOSITORY / path).read_text()
        long += [f"{path}: {len(text.splitlines())} lines"] if len(text.splitlines()) > 400 else []
        functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
        lengths = {f"{path}: {f.name}": (f.end_lineno or f.lineno) - f.lineno + 1 for f in functions}
        long += [f"{name}, {lines} lines" for name, lines in lengths.items() if lines > 60]
    assert not long


def test_the_tests_mirror_the_rooms():
    for path in (REPOSITORY / "tests").iterdir():
        if path.is_dir() and (path / "__init__.py").exists():
            assert path.name in (*ROOMS, "cluster"), path


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
    keys = ("vae", "text_encoder.source", "pretrained", "perceptual_weights", "image_encoder", "decoder", "prior")
    keys += ("generator",)
    return [f"model.{key}=random" for key in keys if isinstance(OmegaConf.select(found, key), str)]
