"""What `medsynth evaluate` says beside its scores: intervals, extrapolation, groups, and what counts do not bear."""

import csv
import json
import shutil

import pytest

from medsynth.errors import UserError
from tests.jobs.test_evaluate import evaluate, pictures


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """48 real and 44 generated pictures, in two groups each, and a third of one side alone."""
    folder = tmp_path_factory.mktemp("claims")
    real, fake = pictures(folder / "r/real", 48, (32, 32)), pictures(folder / "f/fake", 44, (32, 32), seed=1)
    for side, count, header in ((real, 48, "file,class"), (fake, 44, "Filename;class")):
        separator = header[-6]
        rows = [f"{i}.png{separator}{'cyst' if i % 3 else 'polyp'}" for i in range(count - 2)]
        rows += [f"{count - 2}{separator}tumour"] if side == real else []
        (side / "labels.csv").write_text("\n".join([header, *rows]) + "\n")
    return real, fake


def test_each_group_s_scores_are_those_of_its_own_folder(sides, tmp_path):
    printed = evaluate(*sides, "--by", "class", "--no-intervals", "--out", tmp_path / "scores.json")
    report = json.loads((tmp_path / "scores.json").read_text())
    assert set(report["groups"]) == {"cyst", "polyp"} and report["intervals"] == {}
    for group in ("cyst", "polyp"):
        own = []
        for side, count in zip(sides, (46, 42), strict=True):
            own.append(tmp_path / group / side.name)
            own[-1].mkdir(parents=True)
            for i in [i for i in range(count) if bool(i % 3) == (group == "cyst")]:
                shutil.copy(side / f"{i}.png", own[-1] / f"{i:03d}.png")
        evaluate(*own, "--no-intervals", "--out", tmp_path / group / "own.json")
        expected = json.loads((tmp_path / group / "own.json").read_text())["scores"]
        found = report["groups"][group]
        order_free = [name for name in expected if not name.startswith("kd_random")] + ["kd_full_random"]
        assert {name: found[name] for name in order_free} == pytest.approx(
            {name: expected[name] for name in order_free}, rel=1e-6
        )
    assert "tumour: 1 real and 0 generated pictures cannot be scored" in printed
    assert "cyst: 30 real and 28 generated pictures, fewer than 200" in printed.replace("\n", " ")


def test_class_folders_are_groups_without_a_table(tmp_path):
    for side, seed in (("real", 0), ("fake", 1)):
        for name, count in (("benign", 9), ("malignant", 7)):
            pictures(tmp_path / side / name, count, (32, 32), seed=seed)
    sides = tmp_path / "real", tmp_path / "fake"
    evaluate(*sides, "--by", "folder", "--no-intervals", "--out", tmp_path / "scores.json")
    groups = json.loads((tmp_path / "scores.json").read_text())["groups"]
    assert {name: (group["real"], group["fake"]) for name, group in groups.items()} == {
        "benign": (9, 9), "malignant": (7, 7)
    }  # fmt: skip
    own = [side / "benign" for side in sides]
    evaluate(*own, "--no-intervals", "--out", tmp_path / "own.json")
    expected = json.loads((tmp_path / "own.json").read_text())["scores"]["fd_random"]
    assert groups["benign"]["fd_random"] == pytest.approx(expected, rel=1e-6)
    with pytest.raises(UserError, match="--by folder: no picture of .*benign lies in a folder in it"):
        evaluate(*own, "--by", "folder")


def test_scores_have_intervals_and_what_counts_do_not_bear_is_said(sides, tmp_path):
    printed = evaluate(*sides, "--out", tmp_path / "scores.csv")
    rows = {row["score"]: row for row in csv.DictReader((tmp_path / "scores.csv").open())}
    for name in ("fd_random", "kd_full_random", "recall_random", "coverage_random"):
        assert float(rows[name]["low"]) <= float(rows[name]["value"]) <= float(rows[name]["high"])
    assert (
        float(rows["fd_inf_random"]["value"]) < float(rows["fd_random"]["value"]) and not rows["fd_inf_random"]["low"]
    )
    assert "95 %" in printed and "48 real pictures for 608 features" in printed.replace("\n", " ")


@pytest.mark.parametrize(
    ("column", "said"),
    [
        ("centre", "--by centre: no CSV file in .*real or beside it has that column and one of file, file_name"),
        ("class", r"q\.png"),
    ],
)
def test_tables_that_do_not_tell_are_refused(tmp_path, column, said):
    real, fake = pictures(tmp_path / "real", 5, (32, 32)), pictures(tmp_path / "fake", 5, (32, 32))
    (real / "labels.csv").write_text("file,class\nq.png,a\n")
    with pytest.raises(UserError, match=said) as refused:
        evaluate(real, fake, "--by", column)
    assert "\n" not in str(refused.value)
