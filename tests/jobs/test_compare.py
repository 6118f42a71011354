"""jobs/compare.py and jobs/report on real runs, logged through RunTracker to MLflow on SQLite."""

import base64
import io
import math
import re
import socket
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from jobs.compare import main
from jobs.report.curves import draw_curves
from jobs.report.runs import Run, better
from jobs.report.table import compare, mismatches, paper_figures
from jobs.tracking.logger import RunTracker, TrackingConfig
from jobs.tracking.server import mlflow_client
from medsynth.errors import UserError

ODD_NAME = "cells <b>&amp [bold]"


@pytest.fixture(scope="module")
def uri(tmp_path_factory) -> str:
    """A database with four runs: two of MSDM, of which one is a trial, one cell GAN, and one from elsewhere."""
    folder = tmp_path_factory.mktemp("compare")
    uri = f"sqlite:///{folder / 'mlruns.db'}"

    trial = log_run(folder, uri, "trial", "msdm", "medvqa_gi", 64, "random")
    trial.log_metrics({"eval/fd_random": 5.0, "eval/kd_random_std": 0.1, "throughput/images_per_second": 12.5}, 10)
    trial.finalize("interrupted")

    full = log_run(folder, uri, "full", "msdm", "medvqa_gi", 256, "inception")
    for step, fid in ((100, 40.0), (200, 34.25), (300, 36.5)):
        full.log_metrics({"eval/fid": fid, "eval/recall": 0.5 - fid / 2000, "train/loss": fid / 100}, step)
        full.log_image("eval/grid", Image.new("RGB", (2048, 512), (step - 100, 40, 90)), step)
        full.log_image("other", Image.new("RGB", (8, 8)), step + 1)
    full.finalize("success")

    cells = log_run(folder, uri, ODD_NAME, "cell_gan", "cytology", 64, "none")
    for step, loss in enumerate((2.0, 1.0, math.inf, math.nan)):
        cells.log_metrics({"val/loss": loss}, step)
    cells.finalize("failed")

    client = mlflow_client(uri)
    client.create_run(client.get_experiment_by_name("medsynth").experiment_id, run_name="stray")
    client.create_experiment("empty")
    return uri


def log_run(folder: Path, uri: str, name: str, method: str, data: str, resolution: int, extractor: str) -> RunTracker:
    tracker = RunTracker(folder / f"run-{method}-{resolution}", TrackingConfig(uri), name)
    tracker.log_hyperparams({"method": method, "data": {"name": data, "resolution": resolution}})
    tags = {"data.fingerprint": "0123456789abcdef", "extractor": extractor, "parameters.trained": 12_300_000}
    tracker.set_tags({"method": method} | tags)
    return tracker


@pytest.fixture(scope="module")
def output(uri, tmp_path_factory) -> tuple[str, str]:
    """What the command prints, and the page it writes."""
    page = tmp_path_factory.mktemp("page") / "compare.html"
    return invoke(uri, "--html", str(page)), page.read_text(encoding="utf-8")


def invoke(uri: str, *arguments: str) -> str:
    result = CliRunner().invoke(main, ["--tracking-uri", uri, *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def cells_of(printed: str, name: str) -> list[str]:
    """The cells of the table's line whose first cell begins with `name`."""
    lines = [line for line in printed.splitlines() if line.startswith(f"│ {name}")]
    return [cell.strip() for cell in lines[0].strip("│").split("│")]


def test_the_table_has_runs_beside_the_papers_figures(output):
    printed, _ = output
    full = cells_of(printed, "full")
    assert full == ["full", "finished", "medvqa_gi 01234567", "200", "12.3 M", "34.25", "", "", "0.4829", "", ""]
    trial = cells_of(printed, "trial")
    assert [trial[i] for i in (1, 6, 10)] == ["killed", "5", "12.5"]
    paper = cells_of(printed, "paper: MMCP 2024")
    assert paper[2:] == ["medvqa_gi", "", "326 M", "33.58", "", "0.929", "0.498", "0.648", ""]
    assert cells_of(printed, ODD_NAME)[1:] == ["failed", "cytology 01234567", "1", "12.3 M", "1", ""]
    assert cells_of(printed, "stray")[1:3] == ["running", "unknown"]
    assert "(36.5)" in printed and "kd_random_std" not in printed and "FID in own scale 3.39" in printed


def test_only_runs_that_differ_from_the_paper_are_marked_as_not_comparable(output):
    printed, _ = output
    notes = dict(re.findall(r"^\[(\d+)\] (.*)$", printed, flags=re.M))
    marks = re.findall(r"\[(\d+)\]", cells_of(printed, "trial")[0])
    assert [notes[mark] for mark in marks] == [
        "not comparable with MMCP 2024: its extractor is inception, not random",
        "not comparable with MMCP 2024: its resolution is 256, not 64",
    ]
    assert cells_of(printed, "full")[0] == "full"


def test_the_page_has_all_in_one_file(output):
    _, page = output
    assert not re.search(r"<script|<link|@import|(src|href)=\"(?!data:|#)", page)
    assert "cells &lt;b&gt;&amp;amp [bold]" in page and "<b>" not in page
    assert page.count("<svg") == 5  # fid, fd_random, recall, val/loss, train/loss
    for text in ("paper: MMCP 2024", "33.58", "34.25\n(36.5)", "its extractor is inception, not random", "12.3 M"):
        assert text in page


def test_the_page_shows_the_newest_grid_of_each_run(output):
    _, page = output
    [(alt, source)] = [(alt, source) for source, alt in re.findall(r'<img src="([^"]+)" alt="([^"]+)"', page)]
    assert alt == "Samples of full at step 300" and "2048 × 512 pixels as logged" in page
    picture = Image.open(io.BytesIO(base64.b64decode(source.partition("base64,")[2])))
    assert picture.size == (1024, 256)
    assert max(abs(a - b) for a, b in zip(picture.getpixel((500, 100)), (200, 40, 90), strict=True)) < 6


def test_choosing_runs_and_the_metric(uri, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed = invoke(uri, "--no-html", "--runs", "full", "--runs", "trial", "--metric", "eval/fd_random")
    assert printed.index("│ trial") < printed.index("│ full") and "cells" not in printed
    assert cells_of(printed, "trial")[3] == "10"
    assert not list(tmp_path.iterdir())


def test_pictures_that_cannot_be_read_cost_only_themselves(uri, tmp_path):
    store = Path(uri.removeprefix("sqlite:///")).with_name("mlartifacts")
    grids = list(store.rglob("eval~grid*.png"))
    try:
        for grid in grids:
            grid.rename(grid.with_suffix(".png.away"))
            grid.mkdir()
        printed = invoke(uri, "--html", str(tmp_path / "deep" / "page.html"))
    finally:
        for grid in grids:
            grid.rmdir()
            grid.with_suffix(".png.away").rename(grid)
    assert "the pictures of full cannot be read" in printed and "34.25" in (tmp_path / "deep" / "page.html").read_text()


def refused(uri: str, *arguments: str) -> str:
    with pytest.raises(UserError) as refusal:
        invoke(uri, *arguments)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def test_a_users_mistakes_get_one_line(uri, tmp_path):
    assert "no experiment medsinth; did you mean medsynth?" in refused(uri, "--experiment", "medsinth")
    assert "--runs ful: no such run in medsynth; did you mean full?" in refused(uri, "--runs", "ful")
    assert "--metric eval/fit: no run has it; did you mean eval/fid?" in refused(uri, "--metric", "eval/fit")
    assert "experiment empty has no run yet: `medsynth train" in refused(uri, "--experiment", "empty")
    missing = tmp_path / "typo.db"
    assert f"no MLflow database {missing}" in refused(f"sqlite:///{missing}") and not missing.exists()


def test_a_server_that_is_away_gets_one_line():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{probe.getsockname()[1]}"
    assert re.match(f"MLflow at {uri} cannot be reached: .*refused.*--tracking-uri$", refused(uri))


@pytest.mark.parametrize(
    ("key", "choice"),
    [
        ("eval/fid", min),
        ("eval/fd_random", min),
        ("eval/clef_fid", min),
        ("val/loss", min),
        ("eval/isc", max),
        ("eval/f1_random", max),
        ("eval/kid_std", None),
        ("throughput/images_per_second", None),
        ("eval/fiddle", None),
    ],
)
def test_which_way_a_metric_is_better(key, choice):
    assert better(key) is choice


def a_run(name: str, **history: list[tuple[int, float]]) -> Run:
    tags = {"method": "msdm", "extractor": "inception"}
    params = {"data.name": "medvqa_gi", "data.resolution": "256"}
    keys = {f"eval/{key}": points for key, points in history.items()}
    return Run(name, name, "FINISHED", tags, params, "#000000", keys, None)


def test_the_best_run_leads_and_comes_first():
    runs = [a_run("worse", fid=[(1, 9.0)], recall=[(1, 0.9)]), a_run("better", fid=[(1, 3.0)]), a_run("none")]
    [group] = compare("x", runs, []).groups
    assert [(row.name, row.leads) for row in group.rows] == [
        ("better", [True, False]),
        ("worse", [False, False]),
        ("none", [False, False]),
    ]


def test_a_metric_that_never_was_finite_has_no_best():
    run = a_run("broken", fid=[(1, math.nan), (2, math.inf)])
    assert run.best("eval/fid") is None
    [group] = compare("x", [run], []).groups
    assert (group.rows[0].values, group.rows[0].step) == (["inf"], "")
    assert draw_curves("eval/fid", [run]).startswith("<svg")


def test_other_data_are_not_comparable():
    [figure] = [figure for figure in paper_figures() if "controlnet" in figure.methods]
    assert mismatches(a_run("r"), figure) == [
        "not comparable with ControlNet paper: its data is chest_xray, not medvqa_gi"
    ]


def test_the_papers_figures_are_complete_and_well_formed():
    figures = paper_figures()
    methods = {method for figure in figures for method in figure.methods}
    assert methods == {
        *("msdm", "kandinsky3", "kandinsky22_prior", "kandinsky22_decoder", "clip", "stable_diffusion", "dreambooth"),
        *("dreambooth_lora", "llcm", "dalle", "cell_gan", "dcgan", "wgan", "wgan_gp", "bgan", "began", "hypernetwork"),
        "controlnet",
    }
    assert {figure.data for figure in figures} == {"medvqa_gi", "canine_hip", "cytology", "chest_xray"}
    assert all(figure.metrics for figure in figures)
    best = next(figure for figure in figures if "msdm" in figure.methods)
    assert best.metrics == {"fid": 33.58, "precision": 0.929, "recall": 0.498, "f1": 0.648}
    assert best.parameters == 326e6 and best.extractor == "inception"
