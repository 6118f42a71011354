"""The file of a study: what it is read as, which runs it makes, and what is refused; no run is trained here."""

import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.run.config import load_config
from jobs.study.choose import best_of, choose
from jobs.study.local import time_left
from jobs.study.plan import all_runs, arguments_of, check_all, runs_of
from jobs.study.read import read_study
from jobs.study.record import Record, State, note, read_record, refuse_another_study
from jobs.study.report import as_csv, as_markdown, draw, tables
from jobs.study.slurm import array_of
from jobs.tracking.server import mlflow_client
from medsynth.errors import UserError
from tests.conftest import REPOSITORY

TINY = REPOSITORY / "configs/tiny"
TWO = f"""
folder: runs/two
report: [eval/fd_random, val/loss]
stages:
  vae:
    config: {TINY}/msdm_vae.yaml
    grid: {{model.optim.lr: [1e-4, 1e-3]}}
    choose: {{metric: val/loss, mode: min}}
  msdm:
    config: {TINY}/msdm.yaml
    set: {{model.vae: "${{best.vae.export}}/vae", model.optim.lr: "${{best.vae.model.optim.lr}}"}}
    grid: {{seed: [0, 1]}}
    choose: {{metric: eval/fd_random, mode: min}}
    paper: [{{seed: 1, fd_random: 12.5}}, {{seed: 7, fd_random: 13}}]
"""


@pytest.fixture
def write(here):
    """Writes a sweep into the working directory; its path."""

    def write(text: str, name: str = "two.yaml") -> Path:
        (here / name).write_text(text)
        return Path(name)

    return write


def test_stages_runs_and_what_each_is_given(write):
    study = read_study(write(TWO), ["train.max_steps=9"])
    assert [run.label for run in all_runs(study)] == ["vae/lr-0.0001", "vae/lr-0.001", "msdm/seed-0", "msdm/seed-1"]
    best = {"vae": load_config([TINY / "msdm_vae.yaml"], ["run_dir=runs/two/vae/lr-0.001", "model.optim.lr=1e-3"])}
    given = arguments_of(study, runs_of(study, study.stage("msdm"))[1], best)
    assert given == [
        f"{TINY}/msdm.yaml",
        "model.vae=runs/two/vae/lr-0.001/export/vae",
        "model.optim.lr=0.001",
        "tracking.parent=runs/two",
        "tracking.run_name=msdm/seed-1",
        "seed=1",
        "run_dir=runs/two/msdm/seed-1",
        "train.max_steps=9",
    ]
    unknown = arguments_of(study, runs_of(study, study.stage("msdm"))[1], {})
    assert "model.vae=${best.vae.export}/vae" in unknown
    configs = check_all(study)
    assert configs["msdm/seed-1"].model.vae == "runs/two/vae/lr-0.0001/export/vae"  # by the first in the best's place
    assert configs["msdm/seed-1"].train.max_steps == 9


def test_the_base_config_and_settings_hold_where_a_stage_has_none_of_its_own(write):
    study = read_study(
        write(
            "config: [a.yaml, b.yaml]\nset: {seed: 1, train.max_steps: 5}\nstages:\n"
            "  one: {}\n  two: {config: c.yaml, set: {seed: 2}}\n  three:\n"
        )
    )
    assert [stage.files for stage in study.stages] == [("a.yaml", "b.yaml"), ("c.yaml",), ("a.yaml", "b.yaml")]
    assert [stage.settings for stage in study.stages] == [
        ("seed=1", "train.max_steps=5"),
        ("seed=2", "train.max_steps=5"),
        ("seed=1", "train.max_steps=5"),
    ]
    assert [run.run_dir for run in all_runs(study)] == [Path("runs/two") / name for name in ("one", "two", "three")]
    assert read_study(Path("two.yaml"), folder=Path("elsewhere")).folder == Path("elsewhere")


def test_a_list_has_names_and_multiplies_a_grid(write):
    text = "config: a.yaml\nlist: [{name: small, seed: 1}, {train.max_steps: 3}]\ngrid: {model.optim.lr: [1e-4, 1e-3]}"
    study = read_study(write(text))
    assert [run.label for run in all_runs(study)] == [
        "small_lr-0.0001", "small_lr-0.001", "max_steps-3_lr-0.0001", "max_steps-3_lr-0.001"
    ]  # fmt: skip
    assert study.stages[0].swept == ("seed", "model.optim.lr", "train.max_steps")


KEYS = st.sampled_from(["seed", "model.optim.lr", "model.adapter.rank", "train.max_steps", "data.root"])
VALUES = st.lists(st.integers(0, 999), min_size=1, max_size=4, unique=True)


@settings(max_examples=60, deadline=None)
@given(grids=st.lists(st.dictionaries(KEYS, VALUES, min_size=1, max_size=3), min_size=1, max_size=3))
def test_a_plan_is_the_product_of_each_grid_once(tmp_path_factory, grids):
    """Of any grids: as many runs as the product has points, each point once, folders and labels all different."""
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(yaml.safe_dump({"stages": {f"s{i}": {"config": "a.yaml", "grid": g} for i, g in enumerate(grids)}}))
    study = read_study(path)
    runs = all_runs(study)
    assert len({run.run_dir for run in runs}) == len({run.label for run in runs}) == len(runs)
    for stage, grid in zip(study.stages, grids, strict=True):
        points = {tuple((v.key, v.read) for v in run.point.values) for run in runs_of(study, stage)}
        # As YAML has written the keys, sorted.
        ordered = {key: grid[key] for key in sorted(grid)}
        assert points == {tuple(zip(ordered, p, strict=True)) for p in itertools.product(*ordered.values())}
        for run in runs_of(study, stage):
            given = arguments_of(study, run, {})
            assert given[0] == "a.yaml" and given[-1] == f"run_dir={run.run_dir}"
            assert {f"{v.key}={v.read}" for v in run.point.values} <= set(given)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("${best.vae.export}", "${best.vea.export}"), "stage msdm refers to a stage vea; did you mean vae?"),
        (("${best.vae.export}", "${best.msdm.export}"), "in a circle: msdm → msdm"),
        (("seed: [0, 1]", "sed: [0, 1]"), "stage msdm: sed=0: there is no key sed; did you mean seed?"),
        (("seed: [0, 1]", "seed: [0, 0]"), "two of its runs would have one run_dir, seed-0"),
        (("seed: [0, 1]", "seed: 0"), "stage msdm is not of the form"),
        (("seed: [0, 1]", "seed: []"), "stage msdm is not of the form"),
        (("seed: [0, 1]", "run_dir: [a, b]"), "run_dir: each run has its own"),
        (("seed: [0, 1]", "data.root: ['${best.vae.run_dir}', b]"), "a reference stands in `set`"),
        (("metric: eval/fd_random", "metric: eval/fid"), "choose.metric=eval/fid: this run logs no such value"),
        (("mode: min", "mode: lowest"), "mode=lowest: use min or max"),
        (("metric: val/loss, mode: min", "key: val/loss"), "give {metric: eval/fid, mode: min}"),
        (("    choose: {metric: val/loss, mode: min}\n", ""), "the best of vae, which has 2 runs and no `choose"),
        (("${best.vae.export}", "${best.vae}"), "${best.vae} names nothing"),
        (("${best.vae.model.optim.lr}", "${best.vae.model.optim.lrr}"), "no key model.optim.lrr; did you mean"),
        (("grid:", "gird:"), "stage vae has no key gird; did you mean grid?"),
        (("report:", "reports:"), "it has no key reports; did you mean report?"),
        (("report: [eval/fd_random, val/loss]", "report: 3"), "`report` is a list of metrics"),
        (("  vae:\n", "  v/ae:\n"), "stage v/ae: a name is of letters, digits, - and _"),
        (("  vae:\n", "  tracking:\n"), "and not tracking or submit"),
        (("  vae:\n", "  no:\n"), "stage no: a name is of letters"),
        (("paper: [", "paper: {a: ["), "is no YAML"),
        ((f"    config: {TINY}/msdm.yaml\n", ""), "stage msdm has no `config: FILE`"),
        ((f"{TINY}/msdm.yaml", "none.yaml"), "there is no config file none.yaml"),
    ],
)
def test_a_mistake_in_the_file_is_one_line_that_names_it(write, change, said):
    path = write(TWO.replace(*change))
    assert path.read_text() != TWO
    with pytest.raises(UserError) as caught:
        check_all(read_study(path))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_stages_in_a_circle_or_in_the_wrong_order_are_named(write):
    forward = "config: a.yaml\nstages:\n  a: {set: {x: '${best.b.export}'}}\n"
    with pytest.raises(UserError, match="in a circle: (a → b → a|b → a → b)"):
        read_study(write(forward + "  b: {set: {y: '${best.a.export}'}}\n"))
    with pytest.raises(UserError, match="stage a refers to b, which comes after it; put that before"):
        read_study(write(forward + "  b: {}\n"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run_dir=runs/mine"], "run_dir=runs/mine: each run of a sweep has its own"),
        (["seed=3"], "seed=3: the runs of msdm differ by it"),
        (["data.root=${best.vae.run_dir}"], "a reference stands in the file"),
    ],
)
def test_settings_that_would_make_runs_the_same_are_refused(write, arguments, said):
    with pytest.raises(UserError) as caught:
        read_study(write(TWO), arguments)
    assert said in str(caught.value)


@pytest.mark.parametrize("sweep", sorted((REPOSITORY / "configs/sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_sweep_is_read(sweep, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    study = read_study(sweep)
    assert len(all_runs(study)) > 1
    if all(Path(file).is_file() for stage in study.stages for file in stage.files):
        check_all(study)


# The choice


NUMBERS = st.one_of(st.none(), st.floats(allow_nan=True, allow_infinity=True))


@settings(deadline=None)
@given(scores=st.lists(NUMBERS, max_size=6), mode=st.sampled_from(["min", "max"]))
def test_the_best_is_the_first_of_the_best_finite_scores(scores, mode):
    finite = [score for score in scores if score is not None and math.isfinite(score)]
    place = best_of(scores, mode)
    if not finite:
        assert place is None
        return
    assert scores[place] == (min if mode == "min" else max)(finite)
    assert scores[place] not in [s for s in scores[:place] if s is not None and math.isfinite(s)]


def of(state: State, step: int | None = 2, reason: str = "", **history: float) -> Record:
    return Record(state, reason, step, {key.replace("_", "/", 1): {2: value} for key, value in history.items()})


@pytest.mark.parametrize(
    ("first", "second", "skip", "said"),
    [
        (of(State.DONE, val_loss=2.0), of(State.DONE, val_loss=1.0), False, 1),
        (of(State.DONE, val_loss=1.0), of(State.DONE, val_loss=1.0), False, 0),
        (of(State.DONE, val_loss=math.nan), of(State.DONE, val_loss=9.0), False, 1),
        (of(State.DONE), of(State.DONE, val_loss=9.0), False, 1),
        (of(State.DONE, step=4, val_loss=1.0), of(State.DONE, val_loss=9.0), False, 1),
        (of(State.BEGUN), of(State.DONE, val_loss=9.0), False, None),
        (of(State.FAILED, reason="it diverged"), of(State.DONE, val_loss=9.0), True, 1),
        (
            of(State.FAILED, reason="it diverged"),
            of(State.DONE, val_loss=9.0),
            False,
            "1 of 2 runs failed .*diverged",
        ),
        (of(State.FAILED, reason="it diverged"), of(State.FAILED), True, "no run has finished.*it diverged"),
        (of(State.DONE, val_loss=math.nan), of(State.DONE), False, "set checkpoint.monitor=val/loss"),
        (of(State.DONE, train_loss=1.0), of(State.DONE), False, "no run has logged val/loss; they have train/loss"),
    ],
)
def test_the_choice_of_a_stage(write, first, second, skip, said):
    study = read_study(write(TWO))
    runs = runs_of(study, study.stages[0])
    records = dict(zip([run.label for run in runs], (first, second), strict=True))
    if isinstance(said, str):
        with pytest.raises(UserError, match=said):
            choose(study.stages[0], runs, records, skip)
    else:
        assert choose(study.stages[0], runs, records, skip) == (None if said is None else runs[said])


def test_what_was_monitored_stands_in_for_a_score_that_was_not_logged():
    record = Record(State.DONE, step=3, history={"eval/fid": {2: 1.0}}, monitored=("eval/fid", 0.5))
    assert record.score("eval/fid") == 0.5
    assert record.score("eval/f1") is None


# What a run's folder says


def record_of(folder: Path, *events: dict) -> None:
    (folder / "tracking").mkdir(parents=True)
    lines = [json.dumps({"time": 0, **event}) for event in events]
    (folder / "tracking/events.jsonl").write_text("\n".join([*lines, '{"kind": "met']))
    (folder / "config.yaml").write_text("method: msdm\n")


def status(said: str) -> dict:
    return {"kind": "status", "status": said}


@pytest.mark.parametrize(
    ("events", "state", "reason"),
    [
        ([status("RUNNING")], State.BEGUN, ""),
        ([status("RUNNING"), status("KILLED")], State.BEGUN, ""),
        ([status("RUNNING"), status("FINISHED")], State.DONE, ""),
        (
            [status("RUNNING"), {"kind": "tag", "key": "failure", "value": "it diverged"}, status("FAILED")],
            State.FAILED,
            "it diverged",
        ),
        (
            [{"kind": "tag", "key": "failure", "value": "it diverged"}, status("FAILED"), status("RUNNING")],
            State.BEGUN,
            "",
        ),
    ],
)
def test_the_state_of_a_run_by_its_record(write, events, state, reason):
    run = all_runs(read_study(write(TWO)))[0]
    record_of(run.run_dir, *events)
    record = read_record(run)
    assert (record.state, record.reason) == (state, reason)


def test_of_a_step_that_was_repeated_the_first_value_counts(write):
    run = all_runs(read_study(write(TWO)))[0]
    values = [
        {"kind": "metrics", "step": step, "values": {"val/loss": v}} for step, v in ((1, 3.0), (2, 2.0), (2, 9.0))
    ]
    record_of(run.run_dir, status("RUNNING"), *values)
    assert read_record(run).history == {"val/loss": {1: 3.0, 2: 2.0}}


def test_a_run_that_ended_before_it_had_a_record_is_known(write):
    study = read_study(write(TWO))
    run = all_runs(study)[0]
    assert read_record(run).state is State.WAITING
    note(run, study, failed="ended with exit code 2", seconds=4.0)
    assert (read_record(run).state, read_record(run).reason) == (State.FAILED, "ended with exit code 2")
    note(run, study, failed=None)
    assert (read_record(run).state, read_record(run).seconds) == (State.WAITING, 4.0)


def test_folders_of_another_sweep_are_refused(write):
    study, other = read_study(write(TWO)), read_study(write(TWO, "other.yaml"))
    run = all_runs(study)[2]
    note(run, other)
    with pytest.raises(UserError, match="runs/two/msdm/seed-0 belongs to the sweep other; choose another folder"):
        refuse_another_study(study, all_runs(study))
    note(run, study)
    shutil.copy(run.run_dir / "sweep.json", all_runs(study)[3].run_dir.mkdir() or all_runs(study)[3].run_dir)
    with pytest.raises(UserError, match="is the run msdm/seed-0 of this sweep, not msdm/seed-1"):
        refuse_another_study(study, all_runs(study))
    (study.folder / "config.yaml").write_text("")
    with pytest.raises(UserError, match="runs/two is the folder of a run"):
        refuse_another_study(study, all_runs(study))


def test_the_time_that_is_left(write):
    study = read_study(write(TWO))
    runs = all_runs(study)
    records = {run.label: Record(State.WAITING) for run in runs}
    assert time_left(study, records, runs) is None
    records[runs[0].label] = Record(State.DONE, seconds=10.0)
    assert time_left(study, records, runs) == 30.0  # of the other stage nothing is known yet
    records[runs[2].label] = Record(State.DONE, seconds=100.0)
    records[runs[3].label] = Record(State.BEGUN, seconds=60.0)
    assert time_left(study, records, runs) == 10.0 + 40.0
    assert time_left(study, records, runs[2:]) == 40.0


# The report


@pytest.fixture
def found(write):
    study = read_study(write(TWO))
    runs = [run.label for run in all_runs(study)]
    history = [{"val/loss": {2: 1.5}}, {"val/loss": {2: 1.25}}, {"eval/fd_random": {2: 12.345678}}]
    records = {label: Record(State.DONE, "", 2, points) for label, points in zip(runs, history, strict=False)}
    records[runs[3]] = Record(State.FAILED, "it | diverged")
    return study, tables(study, records, {"vae": runs[1]})


def test_tables_have_swept_values_scores_and_the_papers_figures(found):
    study, (vae, msdm) = found
    assert vae.header() == ["run", "model.optim.lr", "state", "step", "val/loss"]
    assert [vae.cells(row) for row in vae.rows] == [
        ["vae/lr-0.0001", "0.0001", "done", "2", "1.5"],
        ["vae/lr-0.001", "0.001", "done", "2", "1.25"],
    ]
    assert msdm.header() == ["run", "seed", "state", "step", "eval/fd_random", "paper eval/fd_random"]
    assert [msdm.cells(row) for row in msdm.rows] == [
        ["msdm/seed-0", "0", "done", "2", "12.345678", ""],
        ["msdm/seed-1", "1", "failed", "", "", "12.5"],
        ["paper", "7", "paper", "", "", "13"],
    ]
    written = as_markdown(study, [vae, msdm])
    assert "| **vae/lr-0.001** | 0.001 | done | 2 | 1.25 |" in written
    assert "| msdm/seed-0 | 0 | done | 2 | 12.35 |  |" in written
    assert "msdm/seed-1 failed: it | diverged" in written
    lines = as_csv([vae, msdm]).splitlines()
    assert lines[0] == "stage,best,run,model.optim.lr,state,step,val/loss,seed,eval/fd_random,paper eval/fd_random"
    assert lines[2] == "vae,yes,vae/lr-0.001,0.001,done,2,1.25,,,"
    assert lines[3] == "msdm,,msdm/seed-0,,done,2,,0,12.345678,"


def test_the_plot_is_a_picture_and_nothing_without_a_score(found):
    _, shown = found
    picture = draw(shown)
    assert picture is not None and picture.startswith(b"\x89PNG")
    for table in shown:
        for row in table.rows:
            row.metrics = {}
    assert draw(shown) is None


# What Slurm's scripts ask


@given(numbers=st.sets(st.integers(1, 40)))
def test_an_array_names_each_number_once(numbers):
    said = array_of(sorted(numbers))
    read = []
    for part in filter(None, said.split(",")):
        first, _, last = part.partition("-")
        read += range(int(first), int(last or first) + 1)
    assert read == sorted(numbers)


SBATCH = """#!/usr/bin/env bash
# Says what it was called with, as a line of sbatch.log, and numbers jobs from 101.
printf '%s' "SWEEP=${SWEEP-}" >>sbatch.log; printf '\\t%s' "$@" >>sbatch.log; echo >>sbatch.log
echo $((100 + $(wc --lines <sbatch.log)))
"""


@pytest.fixture
def slurm(here) -> Path:
    """A clone of what the scripts need, where sbatch says what it was asked."""
    for part in ("slurm", "configs"):
        shutil.copytree(REPOSITORY / part, here / part, ignore=shutil.ignore_patterns("site.env", "*.log"))
    (here / "bin").mkdir()
    (here / "bin/sbatch").write_text(SBATCH)
    (here / "bin/sbatch").chmod(0o755)
    (here / "slurm/site.env").write_text(f"export VENV={sys.prefix} CPU=1\n")
    mlflow_client(f"sqlite:///{here}/mlruns.db")
    return here


def sweep_on(slurm: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
    """slurm/sweep.sh, and what each sbatch was called with."""
    (slurm / "sbatch.log").write_text("")
    environment = os.environ | {"PATH": f"{slurm}/bin:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY)}
    environment.pop("SLURM_JOB_ID", None)
    result = subprocess.run(
        ["bash", "slurm/sweep.sh", *arguments], cwd=slurm, env=environment, capture_output=True, text=True
    )
    return result, [line.split("\t") for line in (slurm / "sbatch.log").read_text().splitlines()]


def test_stages_become_arrays_with_a_step_that_chooses_between_them(slurm):
    """Of which the second begins where the first has chosen, and only what is not done is submitted."""
    text = TWO.replace(f"{TINY}/msdm_vae.yaml", "[configs/msdm_vae.yaml, configs/tiny/msdm_vae.yaml]")
    (slurm / "two.yaml").write_text(text.replace(f"{TINY}/msdm.yaml", "[configs/msdm.yaml, configs/tiny/msdm.yaml]"))
    result, calls = sweep_on(
        slurm, "two.yaml", "--time=1:00:00", "--partition=gpu", "train.max_steps=9", "--skip-failed"
    )
    assert result.returncode == 0, result.stderr
    first, chooser, second, last = calls
    table = first[0].removeprefix("SWEEP=")
    prefix = table.removesuffix("-vae.tsv")
    assert first[1:] == [
        "--parsable", "--array=1-2", "--time=1:00:00", "--partition=gpu", "slurm/msdm_vae.sh", "train.max_steps=9"
    ]  # fmt: skip
    assert chooser == [
        "SWEEP=", "--parsable", "--dependency=afterany:101", "--partition=gpu", "slurm/choose.sh",
        "two.yaml", "train.max_steps=9", "--skip-failed", f"--tables={prefix}", "--choose=vae",
    ]  # fmt: skip
    assert second[:5] == [
        f"SWEEP={prefix}-msdm.tsv", "--parsable", "--array=1-2", "--dependency=afterok:102", "--kill-on-invalid-dep=yes"
    ]  # fmt: skip
    assert second[-2:] == ["slurm/msdm.sh", "train.max_steps=9"]
    assert last[2] == "--dependency=afterany:103"
    lines = (slurm / table).read_text().splitlines()
    assert lines[0] == "configs/msdm_vae.yaml"
    assert lines[2].split("\t") == [
        "configs/tiny/msdm_vae.yaml", "tracking.parent=runs/two", "tracking.run_name=vae/lr-0.001",
        "model.optim.lr=1e-3", "run_dir=runs/two/vae/lr-0.001",
    ]  # fmt: skip
    assert not (slurm / f"{prefix}-msdm.tsv").exists(), "its runs are not known before the choice"
    assert "stage vae: array job 101" in result.stdout
