"""The scripts of slurm/ without a Slurm: each preset has one, and their configs and their shell are sound."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from jobs.run.config import load_config
from jobs.study.job import read_job
from jobs.study.read import Point, Stage, read_study
from jobs.study.slurm import script_of
from jobs.submit import SIGNAL_SECONDS, load_for_job, make_executor, parse_minutes
from jobs.sweep import main
from medsynth.errors import UserError
from tests.conftest import REPOSITORY

CONFIGS = REPOSITORY / "configs"
# The others are shrunk to a CPU, for a machine of one's own.
PRESETS = [path for path in sorted(CONFIGS.glob("*.yaml")) if "accelerator: cpu" not in path.read_text()]
KANDINSKY = CONFIGS / "stages/kandinsky.yaml"
SHELL = [path for path in (*REPOSITORY.glob("**/*.sh"), REPOSITORY / ".ci/run") if ".venv" not in path.parts]


def options(preset: Path) -> dict[str, str]:
    """The #SBATCH options of a preset's script."""
    script = (REPOSITORY / f"slurm/{preset.stem}.sh").read_text()
    return dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", script, re.MULTILINE))


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_every_preset_has_a_script_whose_allocation_its_batch_fits(preset):
    script = REPOSITORY / f"slurm/{preset.stem}.sh"
    lines = script.read_text().splitlines()
    assert len(lines) <= 20
    (launch,) = [line for line in lines if line.startswith("launch ")]
    files = [REPOSITORY / word for word in launch.split()[1:3]]
    assert files[0] == preset
    asked = options(preset)
    config = load_config(files, [f"hardware.devices={asked['gpus-per-node']}", f"hardware.nodes={asked['nodes']}"])
    assert config.hardware.accelerator == "gpu"
    assert asked["job-name"] == preset.stem


def test_kandinskys_script_trains_its_stages_on_what_it_asks_for(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    (launch,) = re.findall("^launch (.*) -- ", (REPOSITORY / "slurm/kandinsky.sh").read_text(), re.MULTILINE)
    asked = options(KANDINSKY)
    job = read_job([*launch.split(), f"hardware.nodes={asked['nodes']}"])
    assert launch.split()[0] == str(KANDINSKY.relative_to(REPOSITORY))
    assert [config.method for config in job.configs] == ["kandinsky22_prior", "kandinsky22_decoder"]
    assert {config.hardware.devices for config in job.configs} == {int(asked["gpus-per-node"])}
    # What the second draws with is what the first exports: an update alone could not be drawn with.
    prior, decoder = job.configs
    assert prior.model.export_merged and prior.model.adapter.rank > 0
    assert decoder.model.prior == f"{prior.run_dir}/export/merged"


@pytest.mark.parametrize("preset", [*PRESETS, KANDINSKY], ids=lambda path: path.stem)
def test_every_script_survives_alike(preset):
    common = {"requeue": "", "signal": "B:USR1@300", "open-mode": "append", "output": "slurm/logs/%x-%j.log"}
    assert common.items() <= options(preset).items()


@pytest.mark.parametrize("sweep", sorted((CONFIGS / "sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_stage_of_a_sweep_has_a_script(sweep, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    for stage in read_study(sweep).stages:
        if Path(stage.files[0]).is_file():
            assert Path(script_of(stage)).is_file()


def test_a_stage_without_a_script_is_named(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    for files in (("configs/tiny/msdm.yaml",), ("configs/none.yaml",), ()):
        with pytest.raises(UserError, match="stage a: no script of slurm/ trains"):
            script_of(Stage("a", files, (), (Point(""),)))


@pytest.mark.parametrize("text", ["", "config: a.yaml", "grid: {seed: [0]}", "config: a.yaml\ngrid: {seed: 0}", "- 1"])
def test_what_is_no_sweep_is_named(tmp_path, text):
    (tmp_path / "sweep.yaml").write_text(text)
    with pytest.raises(UserError, match=r"sweep\.yaml (is no sweep|holds no keys)"):
        read_study(tmp_path / "sweep.yaml")
    with pytest.raises(UserError, match="there is no sweep"):
        read_study(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("limit", "minutes"), [("24:00:00", 1440), ("2-00:00:00", 2880), ("0:00:30", 1), ("1:30:01", 91)]
)
def test_time_limits(limit, minutes):
    assert parse_minutes(limit) == minutes


@pytest.mark.parametrize("limit", ["", "60", "1:00", "a:00:00", "1:2:3"])
def test_another_time_limit_is_refused(limit):
    with pytest.raises(UserError, match=r"\[DAYS-\]HOURS"):
        parse_minutes(limit)


def test_a_submitted_run_that_hangs_is_ended_before_the_limit_it_is_warned_of():
    for cluster in ("slurm", "local"):
        config = load_for_job(cluster, [str(CONFIGS / "msdm.yaml")], nodes=1, gpus=None).config
        assert config.preemption.grace_seconds < SIGNAL_SECONDS


@pytest.mark.parametrize(
    ("given", "nodes", "gpus", "expected"),
    [
        ([], None, None, (1, 8)),
        (["configs/hardware/a100x16-fsdp.yaml"], None, None, (2, 8)),
        (["hardware.devices=4"], None, None, (1, 4)),
        (["configs/hardware/a100x16-fsdp.yaml"], 1, 2, (1, 2)),
        (["train.global_batch_size=48"], None, None, (1, 2)),  # 6 batches of 8
    ],
)
def test_a_submitted_run_is_as_large_as_its_config_and_options_say(given, nodes, gpus, expected):
    arguments = ["configs/msdm.yaml", "train.global_batch_size=128", "train.device_batch_size=8", *given]
    arguments = [argument if "=" in argument else str(REPOSITORY / argument) for argument in arguments]
    for cluster in ("slurm", "kubernetes"):
        hardware = load_for_job(cluster, arguments, nodes, gpus).config.hardware
        assert (hardware.nodes, hardware.devices) == expected


def test_a_local_run_keeps_to_the_gpus_it_is_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    settings = [
        str(CONFIGS / "msdm.yaml"),
        str(CONFIGS / "hardware/gpu.yaml"),
        f"run_dir={tmp_path}",
        "hardware.strategy=ddp",
    ]
    executor = make_executor("local", load_for_job("local", settings, None, 2).config, 60, {})
    assert executor.parameters["visible_gpus"] == [4, 5]
    with pytest.raises(UserError, match="hardware.devices=4: CUDA_VISIBLE_DEVICES names 2 GPUs"):
        make_executor("local", load_for_job("local", settings, None, 4).config, 60, {})


def test_the_runs_of_a_sweep_do_not_share_a_folder():
    sweep = str(CONFIGS / "sweeps/stable_diffusion_lora_rank.yaml")
    result = CliRunner().invoke(main, [sweep, "run_dir=runs/mine"])
    assert isinstance(result.exception, UserError)
    assert "run_dir=runs/mine: each run of a sweep has its own" in str(result.exception)


def test_shellcheck_has_nothing_to_say():
    own = Path(sys.executable).with_name("shellcheck")
    program = str(own) if own.exists() else shutil.which("shellcheck")
    if program is None:
        pytest.skip("no shellcheck here; the dev extra brings one")
    result = subprocess.run([program, "-x", *SHELL], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


# What a script says of a mistake, before anything of Slurm is needed


def launch(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """slurm/msdm.sh in `folder`, as a batch job of one node begins it."""
    facts = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "msdm", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_PARTITION": "gpu"}
    facts |= {"SLURM_CPUS_ON_NODE": "8", "SLURM_GPUS_ON_NODE": "4", "PATH": f"{folder}/bin:/usr/bin:/bin"}
    script = REPOSITORY / "slurm/msdm.sh"
    return subprocess.run(["bash", script], cwd=folder, env=facts | environment, capture_output=True, text=True)


@pytest.fixture
def folder(tmp_path) -> Path:
    shutil.copytree(REPOSITORY / "slurm", tmp_path / "slurm", ignore=shutil.ignore_patterns("site.env", "*.log"))
    return tmp_path


@pytest.mark.parametrize(
    ("site", "said"),
    [
        (None, "slurm/site.env is missing; copy slurm/site.env.example and fill it in"),
        ("", "sets neither VENV nor CONTAINER_IMAGE"),
        ("VENV=/no/venv", "VENV=/no/venv, where there is no bin/python"),
        ("VENV=/usr\nCONTAINER_IMAGE=x.sqsh", "sets VENV and CONTAINER_IMAGE; keep one of them"),
        ("CONTAINER_IMAGE=x.sqsh\nRUNS_ROOT=/proc/none", "the folder /proc/none, which cannot be made"),
        ("CONTAINER_IMAGE=x.sqsh\nRUNS_ROOT=elsewhere", "runs is not the folder elsewhere of slurm/site.env"),
    ],
)
def test_a_mistake_in_the_site_is_one_line_and_exit_2(folder, site, said):
    (folder / "runs").mkdir()
    if site is not None:
        (folder / "slurm/site.env").write_text(site)
    result = launch(folder)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert said in result.stderr


def test_a_script_outside_the_repository_says_so(tmp_path):
    result = launch(tmp_path)
    assert result.returncode == 2
    assert "type sbatch in the repository's root" in result.stderr


def test_the_container_gets_image_folders_and_runs_as_links(folder):
    """pyxis is no package of Debian: an srun that prints its arguments stands in for it."""
    (folder / "bin").mkdir()
    (folder / "bin/srun").write_text('#!/bin/sh\necho "srun $*"\n')
    (folder / "bin/srun").chmod(0o755)
    lines = ["CONTAINER_IMAGE=/images/medsynth.sqsh", f"RUNS_ROOT={folder}/scratch", "MOUNTS=/weights:/weights"]
    (folder / "slurm/site.env").write_text("\n".join(lines))
    assert launch(folder).returncode == 0
    assert (folder / "runs").resolve() == folder / "scratch"
    log = (folder / "runs/slurm/msdm-7.log").read_text()
    assert "--ntasks=4 --ntasks-per-node=4 --cpus-per-task=2" in log
    assert f"--container-image=/images/medsynth.sqsh --container-workdir={folder}" in log
    assert f"--container-mounts={folder}:{folder},{folder}/scratch:{folder}/scratch,/weights:/weights python -m" in log
