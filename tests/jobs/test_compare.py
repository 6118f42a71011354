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

from callbacks.protocols import PROTOCOL_TAG, Note, as_tag, at_step, noted_after, parse_notes
from jobs.compare import main
from jobs.report.curves import draw_curves
from jobs.report.runs import Run, better, with_protocol
from jobs.report.table import compare, heading, mismatches, paper_figures
from jobs.tracking.logger import RunTracker, TrackingConfig
from jobs.tracking.server import mlflow_client
from medsynth.errors import UserError
from metrics.protocol import Protocol

ODD_NAME = "cells <b>&amp [bold]"


@pytest.fixture(scope="module")
def uri(tmp_path_factory) -> str:
    """A database with four runs: two of MSDM, of which one is a trial, one cell GAN, and one from elsewhere."""
    folder = tmp_path_factory.mktemp("compare")
    uri = f"sqlite:///{folder / 'mlruns.db'}"

    trial = log_run(folder, uri, "trial", "msdm", "medvqa_gi", 64, "random")
    trial.set_tags({PROTOCOL_TAG: as_tag([Note(0, protocol(extractor="random", resolution=64))])})
    trial.log_metrics({"eval/fd_random": 5.0, "eval/kd_random_std": 0.1, "throughput/images_per_second": 12.5}, 10)
    trial.finalize("interrupted")

    full = log_run(folder, uri, "full", "msdm", "medvqa_gi", 256, "inception")
    full.set_tags({PROTOCOL_TAG: as_tag([Note(0, protocol())])})
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


def protocol(**facts) -> Protocol:
    """One of Inception at 256×256, 2,000 against 2,000, with these facts in place of its own."""
    own = {
        "extractor": "inception", "weights": "inception-0123456789", "resize": "bilinear", "antialias": False,
        "input_range": "(x - 128) / 128", "resolution": 256, "square": "crop", "sixteen_bit": "full", "window": None,
        "reading": 2, "reference": "all", "split_seed": None, "real": 2000, "fake": 2000, "bank": 10_000,
        "quantisation": "uint8", "subsets": "100 of 1000",
    }  # fmt: skip
    return Protocol(**own | facts)


def log_run(folder: Path, uri: str, name: str, method: str, data: str, resolution: int, extractor: str) -> RunTracker:
    tracker = RunTracker(folder / f"run-{method}-{resolution}", TrackingConfig(uri, timeout_seconds=300), name)
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
    assert full[:5] == ["full", "finished", "medvqa_gi 01234567", "200", "12.3 M"]
    # Ours and the papers' figures of one metric stand side by side, in columns of their own.
    assert full[5:] == ["34.25", "", "", "", "0.4829", "", "", ""]
    trial = cells_of(printed, "trial")
    assert [trial[i] for i in (1, 7, 12)] == ["killed", "5", "12.5"]
    paper = cells_of(printed, "paper: MMCP 2024")
    assert paper[2:] == ["medvqa_gi", "", "326 M", "", "33.58", "", "0.929", "", "0.498", "0.648", ""]
    assert "fid ↓ A" in printed and "fid ↓ paper" in printed and "protocol A: inception" in printed
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


# Protocols


def test_two_protocols_never_share_a_column(uri, tmp_path):
    """A run that was resumed with another number of pictures, one of that number, and one that has noted nothing."""
    few, many = protocol(fake=500), protocol()
    resumed = log_run(tmp_path / "a", uri, "resumed", "llcm", "canine_hip", 256, "inception")
    resumed.set_tags({PROTOCOL_TAG: as_tag([Note(0, few), Note(20, many)])})
    for step, fid in ((0, 90.0), (10, 50.0), (20, 40.0), (30, 60.0)):
        resumed.log_metrics({"eval/fid": fid, "val/loss": fid}, step)
    other = log_run(tmp_path / "b", uri, "other", "llcm", "canine_hip", 256, "inception")
    other.set_tags({PROTOCOL_TAG: as_tag([Note(0, many)])})
    other.log_metrics({"eval/fid": 55.0, "val/loss": 1.0}, 30)
    unnoted = log_run(tmp_path / "c", uri, "unnoted", "llcm", "canine_hip", 256, "inception")
    unnoted.log_metrics({"eval/fid": 1.0}, 30)
    for tracker in (resumed, other, unnoted):
        tracker.finalize("success")

    page = tmp_path / "page.html"
    named = [part for name in ("resumed", "other", "unnoted") for part in ("--runs", name)]
    printed = invoke(uri, *named, "--html", str(page))
    columns = sorted([few.digest, many.digest])
    values = {name: cells_of(printed, name)[5:8] for name in ("resumed", "other", "unnoted")}
    assert values["resumed"][columns.index(few.digest)].startswith("40") and values["resumed"][2] == ""
    assert values["resumed"][columns.index(many.digest)] == "60"
    assert values["other"][columns.index(many.digest)] == "55" and values["other"].count("") == 2
    assert values["unnoted"] == ["", "", "1"]
    assert "500 generated against 2000 real" in printed and "protocol C: not noted" in printed
    for letter in "ABC":
        assert page.read_text(encoding="utf-8").count(f"<h3>fid ↓ {letter}</h3>") == 1, "nor one picture of curves"


def test_the_first_of_two_values_of_a_step_has_the_first_protocol():
    few, many = protocol(fake=500), protocol()
    notes = noted_after(noted_after([], 0, few), 20, many)
    assert noted_after(notes, 40, many) == notes
    assert [at_step(notes, step) for step in (0, 20, 21)] == [few, few, many]
    assert parse_notes(as_tag(notes)) == notes and at_step([], 3) is None
    assert parse_notes("[{}]") == parse_notes("broken") == parse_notes("3") == []


def test_a_tag_that_holds_too_much_forgets_what_came_first():
    notes = [Note(10 * i, protocol(fake=i)) for i in range(100)]
    kept = parse_notes(as_tag(notes))
    assert len(as_tag(notes)) <= 8000 and kept == notes[-len(kept) :]
    assert at_step(kept, 0) is None and at_step(kept, 10_000) == notes[-1].protocol


def test_protocols_are_equal_but_for_versions_and_say_what_differs():
    one = protocol()
    assert one == protocol(versions={"torch": "1"}) and one.digest == protocol(versions={"torch": "1"}).digest
    other = protocol(window=(40.0, 400.0), real=7)
    assert other != one and other.digest != one.digest
    assert other.differences(one) == ["window [40.0, 400.0], not none", "real 7, not 2000"]


def test_only_runs_that_saw_the_same_pictures_lead():
    key = with_protocol("eval/fid", "0123abcd")
    runs = [a_run("one"), a_run("two"), a_run("elsewhere")]
    for run, value in zip(runs, (3.0, 4.0, 1.0), strict=True):
        run.history[key] = [(1, value)]
    runs[2].tags = runs[2].tags | {"data.pictures": "another"}
    [group] = compare("x", runs, []).groups
    assert {row.name: row.leads for row in group.rows} == {"one": [True], "two": [False], "elsewhere": [False]}
    assert heading(key, {"0123abcd": "A"}) == "fid ↓ A"


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
