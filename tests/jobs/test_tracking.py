"""jobs/tracking against real MLflow: SQLite, a file store, and a server that comes and goes."""

import getpass
import json
import logging
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from jobs.tracking.facts import run_facts
from jobs.tracking.logger import RunTracker, TrackingConfig, send_pending
from jobs.tracking.server import logged_images, mlflow_client, resolve_uri, ui_command
from medsynth.errors import UserError
from tests.processes import FORK


@pytest.fixture(scope="module", autouse=True)
def quick_mlflow() -> None:
    """Here MLflow makes its tables itself."""


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory) -> Path:
    """An SQLite file with MLflow's tables, which take seconds to make."""
    path = tmp_path_factory.mktemp("mlflow") / "empty.db"
    mlflow_client(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def uri(tmp_path, empty_database) -> str:
    shutil.copyfile(empty_database, tmp_path / "mlruns.db")
    return f"sqlite:///{tmp_path / 'mlruns.db'}"


@pytest.fixture
def dead_uri() -> str:
    """An address where nothing listens."""
    return f"http://127.0.0.1:{free_port()}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def tracker_of(tmp_path: Path, uri: str, timeout_seconds: float = 20.0) -> RunTracker:
    return RunTracker(tmp_path / "run", TrackingConfig(uri=uri, timeout_seconds=timeout_seconds), "a run")


def history(uri: str, run_id: str, key: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in mlflow_client(uri).get_metric_history(run_id, key)]


def told(caplog, uri: str, words: str) -> int:
    """How many warnings about `uri` hold these words."""
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    return sum(uri in message and words in message for message in warnings)


def eventually(condition, seconds: float = 30.0):
    """Wait until `condition()` is true; its value."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)
    return value


def test_everything_logged_arrives(tmp_path, uri):
    tracker = tracker_of(tmp_path, uri)
    tracker.log_hyperparams({"model": {"optim": {"lr": 1e-4}, "widths": [8, 16]}, "long": "x" * 7000, "empty": {}})
    tracker.set_tags({"method": "msdm", "note": "y" * 9000})
    tracker.log_metrics({"train/loss": torch.tensor(0.5), "eval/f1@0.5": 1.0}, step=3)
    tracker.log_metrics({"odd": math.nan}, step=4)
    tracker.log_metrics({"odd": math.inf}, step=5)
    tracker.log_metrics({"summary": 2.0})
    (tmp_path / "run" / "config.yaml").write_text("seed: 1\n")
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "a.txt").write_text("a")
    tracker.log_artifact(tmp_path / "run" / "config.yaml")
    tracker.log_artifact(tmp_path / "plots", "figures")
    tracker.finalize("success")

    client = mlflow_client(uri)
    run = client.get_run(tracker.run_id)
    params, tags = run.data.params, run.data.tags
    assert run.info.run_name == "a run" and run.info.status == "FINISHED"
    assert params | {"long": ""} == {"model.optim.lr": "0.0001", "model.widths": "[8, 16]", "long": "", "empty": "{}"}
    assert (len(params["long"]), len(tags["note"]), tags["method"]) == (6000, 8000, "msdm")
    assert history(uri, tracker.run_id, "train/loss") == [(3, 0.5)]
    assert history(uri, tracker.run_id, "eval/f1_0.5") == [(3, 1.0)]
    assert history(uri, tracker.run_id, "summary") == [(5, 2.0)]
    odd = history(uri, tracker.run_id, "odd")
    assert [step for step, _ in odd] == [4, 5] and math.isnan(odd[0][1]) and odd[1][1] == sys.float_info.max
    artifacts = {file.path for folder in (None, "figures") for file in client.list_artifacts(tracker.run_id, folder)}
    assert artifacts == {"config.yaml", "figures", "figures/a.txt"}
    assert (tmp_path / "mlartifacts").is_dir(), "pictures lie beside the database"
    assert (tracker.name, tracker.version, tracker.save_dir) == ("medsynth", "run", str(tmp_path / "run"))


def finished(*works) -> list[int]:
    """Do all `works` at once, each in a process of its own; their exit codes."""
    processes = [FORK.Process(target=work) for work in works]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()
    return [process.exitcode for process in processes]


def killed_while_making(uri: str, statement: int) -> None:
    """End a process, as by SIGKILL, at a statement of those that make the database at `uri`."""
    statements = []

    def count(*_) -> None:
        statements.append(1)
        if len(statements) == statement:
            os._exit(9)

    def make() -> None:
        sqlalchemy.event.listen(sqlalchemy.Engine, "before_cursor_execute", count)
        mlflow_client(uri)

    assert finished(make) == [9]


def test_a_database_whose_making_was_killed_is_made_anew(tmp_path, empty_database):
    database = tmp_path / "new" / "mlruns.db"
    uri = f"sqlite:///{database}"
    for statement in (1, 600, 1600):
        killed_while_making(uri, statement)
        assert not database.exists()
        assert len(list(database.parent.iterdir())) == 1, "what the kills before have left is gone"
    tracker = tracker_of(tmp_path, uri)
    tracker.log_metrics({"train/loss": 0.5}, 1)
    tracker.finalize("success")
    assert history(uri, tracker.run_id, "train/loss") == [(1, 0.5)]
    assert {path.name for path in database.parent.iterdir()} == {"mlruns.db"}


@pytest.mark.parametrize("links", [True, False])
def test_two_processes_make_a_database_at_once(tmp_path, empty_database, monkeypatch, links):
    """Each has made one of its own when the first puts it into place: one of them stays, and both go on with it."""
    uri, both_made, link = f"sqlite:///{tmp_path}/mlruns.db", FORK.Barrier(2), os.link

    def link_together(*paths) -> None:
        time.sleep(both_made.wait(60))  # 0 or 1 s
        if not links:
            raise PermissionError("links are not supported here")
        link(*paths)

    def make(name: str) -> None:
        client = mlflow_client(uri)
        eventually(lambda: made(client, name))

    def made(client, name: str) -> bool:
        with suppress(Exception):  # MLflow's own race for its default experiment
            return bool(client.create_experiment(name))
        return False

    monkeypatch.setattr(os, "link", link_together)
    assert finished(lambda: make("one"), lambda: make("two")) == [0, 0]
    names = {experiment.name for experiment in mlflow_client(uri).search_experiments()}
    assert {"one", "two"} <= names
    assert {path.name for path in tmp_path.iterdir()} == {"mlruns.db"}


def gradient() -> np.ndarray:
    """uint8 (5, 7, 3) with all values different."""
    return np.arange(105, dtype=np.uint8).reshape(5, 7, 3)


@pytest.mark.parametrize("form", ["path", "pil", "tensor", "array"])
def test_a_picture_comes_back_with_its_step(tmp_path, uri, form):
    pixels = gradient()
    Image.fromarray(pixels).save(tmp_path / "grid.png")
    picture = {
        "path": tmp_path / "grid.png",
        "pil": Image.fromarray(pixels),
        "tensor": torch.from_numpy(pixels).permute(2, 0, 1),
        "array": pixels,
    }[form]
    tracker = tracker_of(tmp_path, uri)
    tracker.log_image("eval/grid", picture, step=40)
    (tmp_path / "grid.png").unlink()  # copied when it was logged
    tracker.finalize("success")

    client = mlflow_client(uri)
    [image] = logged_images(client, tracker.run_id)
    assert (image.key, image.step) == ("eval/grid", 40)
    returned = Image.open(client.download_artifacts(tracker.run_id, image.path, tmp_path))
    assert np.array_equal(np.asarray(returned), pixels)
    assert not list((tmp_path / "run" / "tracking" / "files").iterdir()), "deleted once sent"


def test_a_restart_goes_on_with_the_same_run(tmp_path, uri):
    first = tracker_of(tmp_path, uri)
    first.log_hyperparams({"lr": 0.1, "seed": 1})
    for step in range(10):
        first.log_metrics({"train/loss": float(step)}, step)
    first.log_image("eval/grid", gradient(), step=9)
    first.finalize("failed")
    assert mlflow_client(uri).get_run(first.run_id).info.status == "FAILED"

    second = tracker_of(tmp_path, uri)
    second.log_hyperparams({"lr": 0.2, "seed": 1, "new": True})
    eventually(lambda: mlflow_client(uri).get_run(first.run_id).info.status == "RUNNING")
    for step in range(5, 15):  # from a checkpoint at step 5
        second.log_metrics({"train/loss": 100.0 + step, "val/loss": float(step)}, step)
    for step in (9, 14):
        second.log_image("eval/grid", gradient(), step)
    second.finalize("success")

    run = mlflow_client(uri).get_run(first.run_id)
    assert second.run_id == first.run_id and run.info.status == "FINISHED"
    expected = [(s, float(s)) for s in range(10)] + [(s, 100.0 + s) for s in range(10, 15)]
    assert history(uri, first.run_id, "train/loss") == expected
    assert [s for s, _ in history(uri, first.run_id, "val/loss")] == list(range(5, 15))
    assert [image.step for image in logged_images(mlflow_client(uri), first.run_id)] == [9, 14]
    assert run.data.params == {"lr": "0.1", "seed": "1", "new": "True"}
    assert run.data.tags["resumed.lr"] == "0.2" and "resumed.seed" not in run.data.tags


def test_nothing_is_doubled_after_a_crash_between_sending_and_recording(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # unlike a database it would store a point twice
    uri = (tmp_path / "mlruns").as_uri()
    first = tracker_of(tmp_path, uri)
    for step in range(5):
        first.log_metrics({"train/loss": float(step)}, step)
    first.log_image("eval/grid", gradient(), step=4)
    picture = next((tmp_path / "run" / "tracking" / "files").iterdir()).read_bytes()
    first.finalize("failed")
    sent = tmp_path / "run" / "tracking" / "sent.json"
    sent.write_text(json.dumps(json.loads(sent.read_text()) | {"records": 0, "files": 0}))
    events = [json.loads(line) for line in (tmp_path / "run" / "tracking" / "events.jsonl").read_text().splitlines()]
    file = next(event["file"] for event in events if event["kind"] == "image")
    (tmp_path / "run" / "tracking" / "files" / file).write_bytes(picture)

    second = tracker_of(tmp_path, uri)
    second.log_metrics({"train/loss": 5.0}, 5)
    second.finalize("success")
    assert history(uri, second.run_id, "train/loss") == [(s, float(s)) for s in range(6)]
    assert len(logged_images(mlflow_client(uri), second.run_id)) == 1


def test_steps_repeated_while_the_server_is_away_are_sent_once(tmp_path, uri, dead_uri):
    for first_step in (0, 3):
        tracker = tracker_of(tmp_path, dead_uri, timeout_seconds=0)
        for step in range(first_step, first_step + 6):
            tracker.log_metrics({"train/loss": float(step + 10 * first_step)}, step)
        tracker.finalize("failed")
    send_pending(tmp_path / "run", uri)
    assert history(uri, tracker.run_id, "train/loss") == [(s, float(s if s < 6 else s + 30)) for s in range(9)]


def test_steps_the_server_has_are_not_repeated_when_the_spool_is_lost(tmp_path, uri):
    for first_step in (0, 3):
        tracker = tracker_of(tmp_path, uri)
        for step in range(first_step, first_step + 6):
            tracker.log_metrics({"train/loss": float(step)}, step)
        tracker.finalize("success")
        (tmp_path / "run" / "tracking" / "events.jsonl").unlink()
    assert [s for s, _ in history(uri, tracker.run_id, "train/loss")] == list(range(9))


def test_a_line_cut_short_costs_only_itself(tmp_path, uri, dead_uri):
    first = tracker_of(tmp_path, dead_uri, timeout_seconds=0)
    first.log_metrics({"train/loss": 0.0}, 0)
    with (tmp_path / "run" / "tracking" / "events.jsonl").open("a") as spool:
        spool.write('{"kind": "metrics", "time": 1, "st')
    second = tracker_of(tmp_path, uri)
    second.log_metrics({"train/loss": 1.0}, 1)
    second.finalize("success")
    assert history(uri, second.run_id, "train/loss") == [(0, 0.0), (1, 1.0)]


@pytest.mark.parametrize(
    ("calls", "status"),
    [
        (["success"], "FINISHED"),
        (["failed"], "FAILED"),
        (["killed"], "KILLED"),
        (["interrupted", "failed", "success"], "KILLED"),
        (["success", "failed"], "FAILED"),
    ],
)
def test_final_status(tmp_path, uri, calls, status):
    tracker = tracker_of(tmp_path, uri)
    for call in calls:
        tracker.finalize(call)
    run = mlflow_client(uri).get_run(tracker.run_id)
    assert run.info.status == status and run.info.end_time >= run.info.start_time


def test_a_deleted_experiment_is_named_once_with_the_mend(tmp_path, uri, caplog):
    tracker = tracker_of(tmp_path, uri, timeout_seconds=5.0)
    tracker.log_metrics({"train/loss": 0.0}, 0)
    run_id = eventually(lambda: tracker.run_id)
    client = mlflow_client(uri)
    eventually(lambda: history(uri, run_id, "train/loss"))
    experiment = client.get_run(run_id).info.experiment_id
    client.delete_experiment(experiment)

    tracker.log_metrics({"train/loss": 1.0}, 1)
    tracker.finalize("success")
    assert told(caplog, uri, f"mlflow experiments restore -x {experiment}") == 1
    assert told(caplog, uri, "the experiment medsynth has been deleted") == 1
    assert not told(caplog, uri, "a new run is made"), "as long as none can be"
    assert not told(caplog, uri, "is away")

    with pytest.raises(UserError) as caught:
        send_pending(tmp_path / "run", uri)
    assert f"restore it (`MLFLOW_TRACKING_URI={uri} mlflow experiments restore -x {experiment}`)" in str(caught.value)
    assert "start the server" not in str(caught.value)
    client.restore_experiment(experiment)
    send_pending(tmp_path / "run", uri)
    assert history(uri, run_id, "train/loss") == [(0, 0.0), (1, 1.0)]


def test_track_on_a_damaged_database_names_the_file(tmp_path, uri):
    tracker = tracker_of(tmp_path, uri)
    tracker.log_metrics({"train/loss": 0.0}, 0)
    tracker.finalize("success")
    damaged = tmp_path / "damaged.db"
    damaged.write_bytes(b"no database" * 1000)
    with pytest.raises(UserError) as caught:
        send_pending(tmp_path / "run", f"sqlite:///{damaged}")
    assert str(caught.value).endswith(f"The record is kept; see to {damaged} and try again")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("how", ["deleted", "another database"])
def test_a_run_that_is_gone_is_made_anew_with_the_whole_record(tmp_path, uri, empty_database, caplog, how):
    first = tracker_of(tmp_path, uri)
    first.log_hyperparams({"lr": 0.1})
    first.log_metrics({"train/loss": 0.0}, 0)
    first.finalize("failed")
    old = first.run_id
    if how == "deleted":
        mlflow_client(uri).delete_run(old)
    else:
        uri = uri.replace("mlruns.db", "other.db")
        shutil.copyfile(empty_database, tmp_path / "other.db")
    second = tracker_of(tmp_path, uri)
    second.log_metrics({"train/loss": 1.0}, 1)
    second.finalize("success")

    assert second.run_id != old
    assert [r.message for r in caplog.records if "no longer has run" in r.message and old in r.message]
    assert history(uri, second.run_id, "train/loss") == [(0, 0.0), (1, 1.0)]
    assert mlflow_client(uri).get_run(second.run_id).data.params == {"lr": "0.1"}


def test_a_run_deleted_while_it_goes_on_is_made_anew(tmp_path, uri):
    tracker = tracker_of(tmp_path, uri)
    tracker.log_metrics({"train/loss": 0.0}, 0)
    tracker.finalize("success")
    mlflow_client(uri).delete_run(old := tracker.run_id)
    tracker.log_metrics({"train/loss": 1.0}, 1)
    tracker.finalize("success")
    assert tracker.run_id != old and history(uri, tracker.run_id, "train/loss") == [(0, 0.0), (1, 1.0)]


def test_a_run_whose_id_got_lost_is_found_again(tmp_path, uri):
    first = tracker_of(tmp_path, uri)
    first.log_metrics({"train/loss": 0.0}, 0)
    first.finalize("failed")
    old = first.run_id
    identity = tmp_path / "run" / "tracking" / "run.json"
    identity.write_text(json.dumps(json.loads(identity.read_text()) | {"run_id": None}))
    second = tracker_of(tmp_path, uri)
    second.finalize("success")
    assert second.run_id == old


def test_what_mlflow_refuses_holds_nothing_else_back(tmp_path, uri, caplog):
    tracker = tracker_of(tmp_path, uri)
    tracker.finalize("success")
    mlflow_client(uri).log_param(tracker.run_id, "lr", "from elsewhere")
    tracker.log_hyperparams({"lr": 0.1, "seed": 1})
    tracker.log_metrics({"/rooted": 1.0, "train/loss": 2.0}, 1)
    tracker.log_metrics({"train/loss": 3.0}, 2)
    tracker.log_artifact(tmp_path / "missing.txt")
    tracker.log_image("eval/grid", gradient(), 2)
    tracker.finalize("success")

    run = mlflow_client(uri).get_run(tracker.run_id)
    assert run.data.params == {"lr": "from elsewhere", "seed": "1"}
    assert run.data.tags["resumed.lr"] == "0.1"
    assert history(uri, tracker.run_id, "train/loss") == [(1, 2.0), (2, 3.0)]
    assert len(logged_images(mlflow_client(uri), tracker.run_id)) == 1
    warnings = [record.message for record in caplog.records]
    for word in ("/rooted", "missing.txt"):
        assert sum(word in message for message in warnings) == 1


def test_an_artifact_store_that_fails_holds_no_metrics_back(tmp_path, uri, caplog):
    blocked = tmp_path / "store"
    blocked.write_text("a file where a folder should be")
    mlflow_client(uri).create_experiment("medsynth", (blocked / "artifacts").as_uri())
    tracker = tracker_of(tmp_path, uri, timeout_seconds=1)
    tracker.log_image("eval/grid", gradient(), 1)
    tracker.log_metrics({"train/loss": 1.0}, 1)
    tracker.finalize("success")
    run = mlflow_client(uri).get_run(tracker.run_id)
    assert (run.data.metrics, run.info.status) == ({"train/loss": 1.0}, "FINISHED")
    assert told(caplog, uri, "is away") == told(caplog, uri, "medsynth track") == 1

    blocked.unlink()
    send_pending(tmp_path / "run")
    assert [image.step for image in logged_images(mlflow_client(uri), tracker.run_id)] == [1]


def test_a_dead_server_neither_slows_nor_stops_training(tmp_path, dead_uri, uri, caplog):
    tracker = tracker_of(tmp_path, dead_uri, timeout_seconds=1.5)
    tracker.log_hyperparams({"lr": 0.1})
    began = time.perf_counter()
    for step in range(10_000):
        tracker.log_metrics({"train/loss": 0.1, "epoch": 0.0}, step)
    assert time.perf_counter() - began < 1.0
    tracker.log_image("eval/grid", gradient(), 9_999)
    began = time.perf_counter()
    tracker.finalize("interrupted")
    tracker.finalize("failed")  # Lightning's own: all ends of a process wait once
    assert 1.4 < time.perf_counter() - began < 3.0
    assert told(caplog, dead_uri, "is away") == 1
    assert tracker.run_id is None

    with pytest.raises(UserError, match=f"{dead_uri} cannot take the record of .*run"):
        send_pending(tmp_path / "run")
    assert send_pending(tmp_path / "run", uri) == 10_005  # 10,000 metrics, a param, a picture, three statuses
    assert send_pending(tmp_path / "run", uri) == 0
    run = mlflow_client(uri).search_runs(["1"])[0]
    assert (run.info.status, run.data.params) == ("KILLED", {"lr": "0.1"})
    assert run.info.end_time <= time.time() * 1000 - 1
    assert [s for s, _ in history(uri, run.info.run_id, "train/loss")] == list(range(10_000))
    assert logged_images(mlflow_client(uri), run.info.run_id)[0].step == 9_999


def test_a_server_that_never_answers_does_not_hold_the_end_up(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        tracker = tracker_of(tmp_path, f"http://127.0.0.1:{deaf.getsockname()[1]}", timeout_seconds=1)
        tracker.log_metrics({"train/loss": 0.0}, 0)
        began = time.perf_counter()
        tracker.finalize("success")
        assert 0.9 < time.perf_counter() - began < 2.5


class Server:
    """`mlflow server` on loopback, over the database of the `uri` fixture."""

    def __init__(self, folder: Path, port: int):
        stores = ["--backend-store-uri", "sqlite:///mlruns.db", "--artifacts-destination", str(folder / "store")]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *stores, "--port", str(port), "--workers", "1"],
            cwd=folder,
            env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},  # spares seconds of its start
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def test_a_server_that_comes_and_goes(tmp_path, uri, caplog):
    port = free_port()
    server_uri = f"http://127.0.0.1:{port}"
    tracker = tracker_of(tmp_path, server_uri, timeout_seconds=120)
    tracker.log_metrics({"train/loss": 0.0, "odd": math.nan}, 0)
    tracker.log_image("eval/grid", gradient(), 0)
    eventually(lambda: told(caplog, server_uri, "is away"))
    server = Server(tmp_path, port)
    try:
        tracker.finalize("failed")
        assert told(caplog, server_uri, "is back") == 1 and history(uri, tracker.run_id, "train/loss") == [(0, 0.0)]
        server.kill()
        tracker.log_metrics({"train/loss": 1.0}, 1)
        eventually(lambda: told(caplog, server_uri, "is away") == 2)
        server = Server(tmp_path, port)
        tracker.finalize("killed")
    finally:
        server.kill()
    assert history(uri, tracker.run_id, "train/loss") == [(0, 0.0), (1, 1.0)]
    assert math.isnan(history(uri, tracker.run_id, "odd")[0][1])
    assert mlflow_client(uri).get_run(tracker.run_id).info.status == "KILLED"
    assert len(list((tmp_path / "store").rglob("*step+0+*.png"))) == 1
    assert told(caplog, server_uri, "is back") == 2 and not told(caplog, server_uri, "medsynth track")


class Failing(BoringModel):
    def training_step(self, batch, index):
        if index == 2:
            raise RuntimeError("out of luck")
        output = super().training_step(batch, index)
        self.log("train/loss", output["loss"])
        return output


def test_lightning_logs_through_it(tmp_path, uri):
    tracker = tracker_of(tmp_path, uri)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(logger=tracker, max_steps=4, log_every_n_steps=1, accelerator="cpu", limit_val_batches=0, **quiet)
    with pytest.raises(RuntimeError, match="out of luck"):
        trainer.fit(Failing())
    assert [step for step, _ in history(uri, tracker.run_id, "train/loss")] == [0, 1]
    assert mlflow_client(uri).get_run(tracker.run_id).info.status == "FAILED"


def test_only_rank_zero_does_anything(tmp_path, dead_uri, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    tracker = tracker_of(tmp_path, dead_uri)
    tracker.log_hyperparams({"lr": 0.1})
    tracker.log_metrics({"train/loss": 0.0}, 0)
    tracker.log_image("eval/grid", gradient(), 0)
    tracker.log_artifact(tmp_path)
    tracker.set_tags({"method": "msdm"})
    tracker.finalize("success")
    assert tracker.run_id is None and not (tmp_path / "run").exists()


def test_a_disk_that_fails_costs_events_and_one_warning(tmp_path, uri, caplog):
    tracker = tracker_of(tmp_path, uri)
    tracker.log_metrics({"train/loss": 0.0}, 0)
    shutil.rmtree(tmp_path / "run" / "tracking" / "files")
    tracker.log_image("eval/grid", gradient(), 0)
    tracker.log_image("eval/grid", gradient(), 1)
    tracker.finalize("success")
    assert sum("get lost" in record.message for record in caplog.records) == 1
    assert mlflow_client(uri).get_run(tracker.run_id).info.status == "FINISHED"


def test_send_pending_wants_a_run_directory(tmp_path):
    with pytest.raises(UserError, match=r"holds no record of a run \(tracking/run.json\)"):
        send_pending(tmp_path)


def test_the_tracking_uri(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert resolve_uri(None) == f"sqlite:///{tmp_path}/mlruns.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert resolve_uri(None) == "http://mlflow:5000"
    assert resolve_uri("sqlite:///other.db") == f"sqlite:///{tmp_path}/other.db"
    assert ui_command("sqlite:////a b.db") == "medsynth ui --tracking-uri 'sqlite:////a b.db'"
    assert ui_command("http://mlflow:5000", "study 2") == "medsynth ui --experiment 'study 2'"
    assert ui_command(None) == "medsynth ui"


def test_no_password_is_stored_or_shown(tmp_path, caplog):
    uri = f"http://me:secret@127.0.0.1:{free_port()}"
    tracker = tracker_of(tmp_path, uri, timeout_seconds=0.5)
    tracker.finalize("success")
    assert told(caplog, "me:***@", "is away") == 1
    written = "".join(path.read_text() for path in (tmp_path / "run" / "tracking").glob("*.json*"))
    assert "me:***@" in written and "secret" not in written + caplog.text + ui_command(uri)


def test_run_facts_name_code_and_hardware_but_no_person():
    facts = run_facts()
    assert torch.__version__.startswith(facts["version.torch"]) and facts["version.python"] == sys.version.split()[0]
    assert int(facts["hardware.cpu_count"]) >= 1 and int(facts["hardware.ram_gib"]) >= 1 and facts["hardware.cpu"]
    assert facts["git.commit"] == "unknown" or len(facts["git.commit"]) == 40
    text = " ".join(facts.values())
    assert str(Path.home()) not in text and not any(getpass.getuser() == word for word in text.split())
