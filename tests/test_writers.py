"""Whatever is written is whole or as it was where the disk is full, and nothing writes in a way of its own."""

import ast
import os
import resource
import sys
import traceback
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from callbacks import class_pictures
from callbacks.durable import DurableCheckpointIO, newest_verified, read_manifest, verify
from callbacks.evaluation import Evaluation
from datamodules.files import depth
from datamodules.files.latents import CacheWriter, cut
from datamodules.files.layout_writers import convert
from datamodules.phantoms.colonoscopy import write_colonoscopy
from jobs import submit
from jobs.drawing.kept import write_picture
from jobs.run.config import load_config, to_yaml
from jobs.run.folder import build_source, write_config, write_split
from jobs.scoring.report import write_report
from jobs.study.submission import Submission
from jobs.tracking.logger import RunTracker, TrackingConfig
from jobs.train import train
from lightning_modules.msdm import MSDM
from medsynth.errors import UserError
from medsynth.files import put_whole, whole_folder
from tests.conftest import REPOSITORY
from tests.processes import FORK
from tests.test_architecture import SOURCES

TINY = REPOSITORY / "configs/tiny/msdm.yaml"

METHODS = {"write_text", "write_bytes", "save", "save_pretrained", "save_file", "savefig", "rename", "symlink_to"}
COPIES = {"copyfile", "copy", "copy2", "copytree", "move"}
MEMORY = {"content", "buffer", "checked"}
# Files, or folders, that do not write by medsynth.files.
WAYS = {
    "medsynth/files.py": "the ways that the others take",
    "medsynth/owner.py": "the lock, which needs no content",
    "callbacks/durable.py": "a checkpoint: written beside, on the disk, then renamed",
    "callbacks/manifest.py": "of a checkpoint, likewise",
    "callbacks/sharding.py": "of a checkpoint, likewise",
    "datamodules/files/latents.py": "shards of a cache: written beside, on the disk, then renamed",
    "datamodules/files/layout_writers.py": "within `new_folder`: the folder has its name once it is complete",
    "datamodules/files/augmented.py": "within `new_folder`, likewise",
    "datamodules/phantoms/": "within `new_folder`, likewise",
    "lightning_modules/": "an export, which is written within `whole_folder`",
    "jobs/tracking/spool.py": "events, each one write to the end of a file; what is cut short is passed over",
    "jobs/tracking/server.py": "a database: made beside, then linked",
    "jobs/tracking/sender.py": "by the spool",
    "jobs/tracking/logger.py": "by the spool",
    "jobs/study/manifests.py": "the developers' own `make manifests`",
}


@cache
def calls(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse((REPOSITORY / path).read_text())) if isinstance(node, ast.Call)]


def is_write(call: ast.Call) -> bool:
    """Whether a call may bring something onto the disk."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    owner = ast.unparse(call.func.value) if isinstance(call.func, ast.Attribute) else ""
    given = [*call.args, *(keyword.value for keyword in call.keywords)]
    if any(isinstance(node, ast.Name) and node.id in MEMORY for node in given) and name in METHODS:
        return False
    if name in ("open", "TarFile", "NamedTemporaryFile"):
        texts = [node.value for node in given if isinstance(node, ast.Constant)]
        modes = [text for text in texts if isinstance(text, str) and len(text) <= 3]
        return "O_CREAT" in ast.unparse(call) or any(set(mode) & set("wax+") for mode in modes)
    if name == "replace":  # of a text it has two arguments
        return len(given) == 1 or owner == "os"
    return (bool(owner) and name in METHODS) or name == "save_file" or (owner == "shutil" and name in COPIES)


def test_all_that_writes_does_so_in_a_known_way():
    found = {str(path): [ast.unparse(call) for call in calls(path) if is_write(call)] for path in SOURCES}
    writers = [path for path, written in found.items() if written]
    assert not [(p, found[p]) for p in writers if not any(p.startswith(way) for way in WAYS)], "use medsynth.files"
    assert not [way for way in WAYS if not any(path.startswith(way) for path in writers)], "it writes nothing any more"
    exports = {str(p) for p in SOURCES for c in calls(p) if ast.unparse(c.func).endswith(".export")}
    assert exports == {"jobs/run/export.py"}, "an export is whole because it is written there"


# On a disk that takes no more


def full_disk(most: int = 1024) -> None:
    """From here on no file of this process gets longer than `most` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))


def forked(work: Callable[[], Any]) -> tuple[int | None, str]:
    """The exit code of a process that does `work`, that of a UserError where it raises one, and what it says."""
    reading, writing = os.pipe()  # a log on the same disk could not be written

    def child() -> None:
        sys.stdout = sys.stderr = os.fdopen(writing, "w", buffering=1)
        warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}")
        try:
            work()
        except UserError as error:
            print(f"medsynth: {error}")
            os._exit(error.exit_code)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    process = FORK.Process(target=child)
    process.start()
    os.close(writing)
    with os.fdopen(reading) as said:
        text = said.read()
    process.join()
    return process.exitcode, text


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def tiny(phantom: Path, run_dir: Path | str, *settings: str):
    own = ["evaluation.images=0", "checkpoint.monitor=val/loss", "hardware.threads=1"]
    return load_config([TINY], [f"data.root={phantom}", f"run_dir={run_dir}", *own, *settings])


NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)


def pictures(folder: Path) -> Path:
    for name in ("a", "b"):
        (folder / "set" / name).mkdir(parents=True)
        Image.fromarray(NOISE).save(folder / "set" / name / "1.png")
    return folder / "set"


def encode(folder: Path) -> None:
    writer = CacheWriter(folder, {"shard_rows": 2})
    writer.write(cut("validation", 2, 2)[0], {"moments": torch.zeros(2, 8, 32, 32), "row": torch.arange(2)})


def export(folder: Path) -> None:
    with whole_folder(folder / "export") as new:
        (new / "weights").write_bytes(bytes(10_000))


def long_config(phantom: Path, folder: Path):
    return tiny(phantom, folder, f"tracking.run_name={'long ' * 1000}")


def submission(config) -> Submission:
    return Submission(config, to_yaml(config), [config])


WRITERS: dict[str, Callable[[Path, Path], Any]] = {
    "a file": lambda folder, phantom: put_whole(folder / "a", bytes(10_000)),
    "an export": lambda folder, phantom: export(folder),
    "phantoms": lambda folder, phantom: write_colonoscopy(folder / "new", images=2, seed=0, size=128),
    "another layout": lambda folder, phantom: convert(folder / "set", folder / "new", "webdataset"),
    "a shard of latents": lambda folder, phantom: encode(folder),
    "a depth map": lambda folder, phantom: depth._save(NOISE[..., 0].astype(np.uint16) * 257, folder / "a.png"),
    "a class picture": lambda folder, phantom: class_pictures._write(folder / "a.png", bytes(10_000)),
    "the config": lambda folder, phantom: write_config(long_config(phantom, folder)),
    "the split": lambda folder, phantom: full_disk(256) or write_split(build_source(tiny(phantom, folder))[0], folder),
    "a sample": lambda folder, phantom: write_picture(folder / "a.png", NOISE, {"prompt": "x"}),
    "scores": lambda folder, phantom: write_report({"scores": ["x" * 10_000]}, folder / "a"),
    "a submission": lambda folder, phantom: submit._write_submission(submission(long_config(phantom, folder))),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_writer_leaves_what_was_there_and_says_so_in_a_line(writer, tmp_path, phantom):
    folder = tmp_path / "folder"
    pictures(folder)
    for name in ("a", "a.png", "export/weights", "config.yaml", "split.json", "submit/old.yaml"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"old")
    (folder / "config.yaml").unlink()  # another run's would be refused
    before = files(folder)

    def work() -> None:
        full_disk()
        try:
            WRITERS[writer](folder, phantom)
        except OSError as error:  # of the two that others build on
            assert writer in ("a file", "an export")
            raise UserError(f"{error.filename}: {error.strerror}") from None

    code, said = forked(work)
    assert code == 2 and said.count("medsynth: ") == 1 and said.splitlines()[-1].startswith("medsynth: ")
    assert "File too large" in said
    assert files(folder) == before, "no half of a file either"


def test_a_kill_between_the_two_names_of_an_export_loses_none(tmp_path):
    (tmp_path / ".export.old").mkdir()
    (tmp_path / ".export.old" / "weights").write_text("before")
    with pytest.raises(OSError, match="broken off"), whole_folder(tmp_path / "export"):
        raise OSError("broken off")
    assert files(tmp_path) == {"export/weights": b"before"}


def test_a_training_on_a_full_disk_keeps_its_checkpoint_and_goes_on_later(phantom, here):
    """Grids and the record are dispensable; without its last checkpoint a run has failed."""
    settings = ["train.validate_every_steps=1", "checkpoint.every_steps=1", "evaluation.grid=2", "train.max_steps=2"]
    train(tiny(phantom, "run", *settings))
    grids = files(here / "run/grids")

    def work() -> None:
        warnings.simplefilter("default")  # as a command has it
        start = Evaluation.setup
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Evaluation, "setup", lambda *given, **named: (full_disk(), start(*given, **named)))
            train(tiny(phantom, "run", *settings[:-1], "train.max_steps=5", "tracking.timeout_seconds=1"))

    code, said = forked(work)
    assert code == 2, said
    assert said.count("run/grids/step-0000003.png cannot be written: File too large. Training goes on") == 1
    assert "step-0000004.png cannot" not in said, "once is enough"
    (line,) = (line for line in said.splitlines() if line.startswith("medsynth: checkpoint"))
    assert "last.ckpt could not be written: File too large. Check the free space" in line
    assert "Traceback" not in said
    assert newest_verified("run/checkpoints")[1] == []
    assert read_manifest("run/checkpoints/last.ckpt")["global_step"] == 2
    assert files(here / "run/grids") == grids

    exported = files(here / "run/export")

    def export_fails() -> None:
        write = MSDM.export
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(MSDM, "export", lambda *given: (full_disk(), write(*given)))
            train(tiny(phantom, "run", *settings[:-1], "train.max_steps=5", "tracking.timeout_seconds=1"))

    code, said = forked(export_fails)
    assert code == 2 and "run/export cannot be written: File too large; the training is whole" in said
    assert read_manifest("run/checkpoints/last.ckpt")["global_step"] == 5, "it went on where it was"
    assert files(here / "run/export") == exported and not list((here / "run").glob(".export*"))


def test_a_record_that_no_disk_takes_ends_no_run(tmp_path):
    """Not even its first event, so that there is nothing to send."""

    def work() -> None:
        full_disk(0)
        tracker = RunTracker(tmp_path / "run", TrackingConfig(uri="http://127.0.0.1:9", timeout_seconds=1))
        tracker.log_metrics({"train/loss": 1.0}, 1)
        tracker.log_metrics({"train/loss": 1.0}, 2)
        tracker.finalize("failed")

    code, said = forked(work)
    assert code == 0, said


def test_a_link_is_replaced_and_never_followed(tmp_path):
    """In a folder of samples, an export and checkpoints alike."""
    theirs = tmp_path / "theirs"
    (theirs / "folder").mkdir(parents=True)
    (theirs / "folder" / "kept").write_text("kept")
    (theirs / "file").write_text("kept")
    for name, target in (("a.png", "file"), ("export", "folder"), ("last.ckpt", "folder")):
        (tmp_path / name).symlink_to(theirs / target)
    (tmp_path / f".a.png.{os.getpid()}").symlink_to(theirs / "file")
    write_picture(tmp_path / "a.png", NOISE, {})
    export(tmp_path)
    state = {"state_dict": {"w": torch.zeros(2)}, "global_step": 1, "epoch": 0, "callbacks": {}, "optimizer_states": []}
    DurableCheckpointIO().save_checkpoint(state, tmp_path / "last.ckpt")
    assert verify(tmp_path / "last.ckpt") is None
    assert files(theirs) == {"file": b"kept", "folder/kept": b"kept"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "export", "last.ckpt", "theirs"]
