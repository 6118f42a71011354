"""`medsynth evaluate --gate` and the search for copies: what is released, what is not, and what is refused before."""

import json
import shutil

import pytest
from PIL import Image, ImageOps

from jobs import cli
from jobs.scoring.gates import Gate, check_gates, hold_gates, read_gates
from medsynth.errors import GateClosed, UserError
from medsynth.exit_codes import GATE
from tests.jobs.test_evaluate import evaluate, pictures


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """12 pictures that were trained on, 60 that were not, and 10 generated ones, of which 2 are copies."""
    folder = tmp_path_factory.mktemp("gates")
    train, held, fake = (
        pictures(folder / name, count, (64, 64), seed=seed)
        # Of the generated pictures that are new, one in 61 would be nearer than all held out: here none is.
        for name, count, seed in (("train", 12, 0), ("held", 60, 1), ("fake", 10, 3))
    )
    shutil.copy(train / "3.png", fake / "0.png")
    ImageOps.mirror(Image.open(train / "5.png")).save(fake / "1.png")
    return train, held, fake


def copies(folders, *arguments) -> str:
    train, held, fake = folders
    return evaluate(train, fake, "--train", train, "--held-out", held, "--no-intervals", *arguments)


def test_copies_are_counted_shown_and_close_the_gate(folders, tmp_path):
    out, sheet = tmp_path / "scores.json", tmp_path / "copies.png"
    with pytest.raises(GateClosed, match=r"^memorisation<0\.01 is not so: it is 0\.2$") as closed:
        copies(folders, "--gate", "memorisation<0.01", "--out", out, "--copies", sheet)
    assert closed.value.exit_code == GATE == 3
    report = json.loads(out.read_text())  # written all the same
    assert report["scores"]["memorisation"] == 0.2 and 0 <= report["scores"]["authenticity"] <= 0.8
    low, high, _ = report["intervals"]["memorisation"]
    assert low < 0.2 < high
    with Image.open(sheet) as picture:
        assert picture.format == "PNG" and picture.width > 300
    assert any("of 60 held-out pictures a share of 1% cannot be told" in note for note in report["notes"])

    printed = copies(folders, "--gate", "memorisation<=0.2", "--gate", "fd_random>0")
    assert "2 of 10 generated pictures lie nearer to training pictures than 0 of 60" in printed.replace("\n", " ")
    assert "1 of 10 generated pictures are byte for byte among the real ones" in printed.replace("\n", " ")


def test_the_command_ends_with_the_gate_s_code(folders, monkeypatch):
    train, _, fake = folders
    options = ["--real", train, "--fake", fake, "--extractor", "random", "--workers", 0, "--no-intervals"]
    monkeypatch.setattr("sys.argv", ["medsynth", "evaluate", *map(str, options), "--gate", "fd_random<0"])
    with pytest.raises(SystemExit) as ended:
        cli.run()
    assert ended.value.code == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gate", "memorisation=0"], "--gate 'memorisation=0': write SCORE<NUMBER"),
        (["--gate", "fd_random<nan"], "write SCORE<NUMBER"),
        (["--gate", "fid<3"], "--gate fid<3: there will be no such score; "),
        (["--copies", "sheet.jpg"], "name a PNG file"),
    ],
)
def test_gates_that_cannot_be_are_refused_before_anything_is_scored(folders, monkeypatch, arguments, said):
    monkeypatch.setattr("jobs.scoring.folders.stream", lambda *args: pytest.fail("scored before it was refused"))
    with pytest.raises(UserError, match=said):
        copies(folders, *arguments)


def test_copies_are_told_by_what_was_trained_on_and_what_was_not(folders, tmp_path):
    train, held, fake = folders
    with pytest.raises(UserError, match="told by --train FOLDER and --held-out FOLDER, or by the split of --like RUN"):
        evaluate(train, fake, "--gate", "memorisation<1")
    both = tmp_path / "both"
    shutil.copytree(held, both)
    shutil.copy(train / "7.png", both / "x.png")
    with pytest.raises(UserError, match=r"1 of 61 pictures of .*both are byte for byte in .*train, too"):
        evaluate(train, fake, "--train", train, "--held-out", both)


def test_a_score_that_is_not_there_passes_no_gate():
    gates = read_gates(["a < 1", "b>=2.5"])
    assert gates == [Gate("a", "<", 1.0), Gate("b", ">=", 2.5)]
    check_gates(gates, ["a", "b", "c"])
    hold_gates(gates, {"a": 0.5, "b": 2.5})
    with pytest.raises(GateClosed, match=r"b>=2\.5 is not so: it is not there"):
        hold_gates(gates, {"a": 0.5})
    with pytest.raises(UserError, match="did you mean"):
        check_gates([Gate("fd_randon", "<", 1.0)], ["fd_random"])
