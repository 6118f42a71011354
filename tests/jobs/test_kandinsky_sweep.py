"""The study of ranks that the project ships, configs/sweeps/kandinsky22.yaml, at tiny size, killed once a stage."""

from pathlib import Path

import pytest
import yaml

from jobs.run.config import load_config
from tests.conftest import REPOSITORY
from tests.jobs.test_sweep import begin, starts, step, wait_for

STEPS = 6
RANKS = [2, 4]
SMALL = {
    "train.max_epochs": 100, "train.max_steps": STEPS, "train.validate_every_steps": STEPS, "checkpoint.every_steps": 1,
    "model.export_merged": True, "evaluation.cache": "cache", "tracking.uri": "sqlite:///mlruns.db",
}  # fmt: skip
TRAINED = ["decoder", *(f"{stage}_rank/rank-{rank}" for stage in ("prior", "decoder") for rank in RANKS)]
KILLED = ["decoder", "prior_rank/rank-4", "decoder_rank/rank-2"]


def tiny(data: Path) -> str:
    """The shipped file with the tiny twins of its presets, two ranks, and scores that need no weights."""
    study = yaml.safe_load((REPOSITORY / "configs/sweeps/kandinsky22.yaml").read_text(encoding="utf-8"))
    scored = [metric.replace("/fid", "/fd") + "_random" for metric in study["report"]]
    for stage in study["stages"].values():
        twin = REPOSITORY / "configs/tiny" / Path(stage["config"]).name
        stage["config"] = str(twin)
        stage["set"] = {key: _random(value) for key, value in stage["set"].items()} | SMALL | {"data.root": str(data)}
        if "grid" in stage:
            assert set(RANKS[1:]) <= set(stage["grid"]["model.adapter.rank"])
            stage["grid"] = {"model.adapter.rank": RANKS}
            stage["choose"]["metric"] = _random(stage["choose"]["metric"])
    return yaml.safe_dump(study | {"folder": "study", "report": scored}, sort_keys=False)


def _random(value: object) -> object:
    return "eval/fd_random" if value == "eval/fid" else value


@pytest.fixture(scope="module")
def study(tmp_path_factory, phantom) -> Path:
    folder = tmp_path_factory.mktemp("kandinsky")
    (folder / "sweep.yaml").write_text(tiny(phantom), encoding="utf-8")
    for run in KILLED:
        process = begin(folder)
        wait_for(lambda run=run: step(folder / "study" / run) >= 2, process, folder)
        process.kill()
        process.join()
        assert step(folder / "study" / run) < STEPS
    last = begin(folder)
    last.join(300)
    assert last.exitcode == 0, (folder / "log").read_text()[-4000:]
    return folder / "study"


def test_each_run_goes_on_where_it_was_killed_and_none_is_trained_again(study):
    assert {run: starts(study / run) for run in TRAINED} == {run: 2 if run in KILLED else 1 for run in TRAINED}
    assert {run: step(study / run) for run in TRAINED} == dict.fromkeys(TRAINED, STEPS)


def test_each_stage_draws_with_what_the_stage_before_has_exported(study, monkeypatch):
    monkeypatch.chdir(study.parent)
    runs = {run: load_config([study / run / "config.yaml"]).model for run in TRAINED}
    assert {runs[f"prior_rank/rank-{rank}"].decoder for rank in RANKS} == {"study/decoder/export/merged"}
    (prior,) = {runs[f"decoder_rank/rank-{rank}"].prior for rank in RANKS}
    assert prior in {f"study/prior_rank/rank-{rank}/export/merged" for rank in RANKS}
    assert [runs[f"decoder_rank/rank-{rank}"].adapter.rank for rank in RANKS] == RANKS


def test_the_report_has_the_papers_measures_of_each_rank(study):
    report = (study / "report.md").read_text(encoding="utf-8")
    for name in ("fd_random", "precision_random", "recall_random", "f1_random"):
        assert name in report
    assert (study / "report.png").read_bytes().startswith(b"\x89PNG")
