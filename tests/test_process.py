"""What a container or a cluster's login may lack is settled before a command begins."""

import os
import pwd
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from medsynth import process
from medsynth.errors import UserError
from tests.conftest import REPOSITORY

ODD = "w rün = #1, $HOME 50% 'q' {x}"


@pytest.fixture
def nobody(monkeypatch, tmp_path):
    """A user id without an entry, whose temporary files lie in `tmp_path`."""

    def unknown(number):
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in ("USER", "HOME", "MPLCONFIGDIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return tmp_path


def test_a_user_id_without_name_and_home_gets_both(nobody, capsys):
    import getpass

    process.settle()
    assert getpass.getuser() == f"uid{os.getuid()}", "torch asks for it"
    assert Path.home() == nobody / f"medsynth-{os.getuid()}", "MLflow asks for it when it is imported"
    assert (Path.home().stat().st_mode & 0o777) == 0o700
    assert capsys.readouterr().err.count("\n") == 1
    process.settle()
    assert capsys.readouterr().err == ""


def test_caches_lie_elsewhere_where_nothing_can_be_written_at_home(nobody, monkeypatch, capsys):
    monkeypatch.setenv("HOME", "/dev/null")
    monkeypatch.setenv("TRITON_CACHE_DIR", "mine")
    process.settle()
    assert Path.home() == Path("/dev/null"), "weights that lie there are still found"
    assert os.environ["MPLCONFIGDIR"] == f"{nobody}/medsynth-{os.getuid()}/matplotlib"
    assert os.environ["TRITON_CACHE_DIR"] == "mine"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kind", ["folder", "link", "file"])
def test_a_folder_that_another_user_has_made_is_not_taken(kind, nobody, monkeypatch):
    place = nobody / f"medsynth-{os.getuid()}"
    if kind == "folder":
        monkeypatch.setattr(os, "getuid", lambda: 54321)
        (nobody / "medsynth-54321").mkdir()
    elif kind == "link":
        (nobody / "mine").mkdir()
        place.symlink_to("mine")
    else:
        place.touch()
    process.settle()
    assert Path.home().parent == nobody and re.fullmatch("medsynth-[a-z0-9_]{8}", Path.home().name)


def test_as_many_files_can_be_open_as_are_allowed():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard))
        process.settle()
        allowed = process._OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, process._OPEN_FILES)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (allowed, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_working_directory_that_is_gone_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tmp_path.rmdir()
    with pytest.raises(UserError, match="working directory has been removed"):
        process.settle()
    tmp_path.mkdir()


def test_no_place_for_temporary_files_is_one_line(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/dev/null"])  # all that Python tries
    with pytest.raises(UserError, match=r"No usable temporary directory found in .*: set TMPDIR to a folder"):
        process.settle()


@pytest.mark.parametrize("locale", [{"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {}])
def test_names_and_text_are_utf8_whatever_the_locale(tmp_path, locale):
    (tmp_path / ODD).mkdir()
    said = subprocess.run(
        [sys.executable, "-m", "jobs.train", f"{ODD}/größe.yaml", "seed=ß"],
        cwd=tmp_path, env={"PATH": os.environ["PATH"], "PYTHONPATH": str(REPOSITORY), **locale}, capture_output=True,
    )  # fmt: skip
    assert said.returncode == 2
    assert said.stderr.decode() == f"medsynth: there is no config file {ODD}/größe.yaml in {tmp_path}\n"
