"""The scripts of slurm/, unmodified, on a real Slurm: who requeues what, when, and how often.

In place of python stands a shell script that runs the command given as `do=COMMAND`, so that a start costs nothing;
tests/cluster/test_slurm.py has the real training.
"""

import sys
from pathlib import Path

import pytest

from jobs.run.config import load_config
from tests.cluster.cluster import Slurm, clone, wait_for, write_site
from tests.conftest import REPOSITORY

SCRIPTS = REPOSITORY / "slurm"
PRESETS = sorted(path.stem for path in (REPOSITORY / "configs").glob("*.yaml"))
PRESETS_ON_GPUS = [
    name for name in PRESETS if load_config([REPOSITORY / f"configs/{name}.yaml"]).hardware.accelerator != "cpu"
]

# `--print` gives the settings as they came, in place of YAML; a rank runs the one called do, and says which it was.
STAND_IN = rf"""#!/usr/bin/env bash
if [ "$2" = jobs.sweep ]; then exec {sys.executable} "$@"; fi
if [ "${{*: -1}}" = --print ]; then
  printf '%s\n' "${{@:3:$#-3}}"
else
  echo "rank $SLURM_PROCID of $SLURM_NTASKS on $SLURMD_NODENAME at $MASTER_ADDR:$MASTER_PORT"
  eval "$(sed -n 's/^do=//p' "$3")"
fi
"""


@pytest.fixture
def stand_in(tmp_path) -> Path:
    """A clone whose python is the stand-in."""
    python = tmp_path / "venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(STAND_IN)
    python.chmod(0o755)
    write_site(clone(tmp_path), tmp_path / "venv")
    return tmp_path


def submit(slurm: Slurm, folder: Path, do: str, *options: str) -> str:
    arguments = ["--parsable", "--gpus-per-node=2", "--cpus-per-gpu=1", *options, "slurm/msdm.sh", f"do={do}"]
    return slurm.call("sbatch", *arguments, cwd=folder)


def log(folder: Path, job: str) -> str:
    path = folder / f"runs/slurm/msdm-{job}.log"
    return path.read_text() if path.exists() else ""


def test_two_nodes_with_a_process_a_gpu(slurm, stand_in):
    job = submit(slurm, stand_in, "sleep 1", "--nodes=2")
    assert slurm.end(job)["JobState"] == "COMPLETED", log(stand_in, job)
    lines = sorted(line for line in log(stand_in, job).splitlines() if line.startswith("rank"))
    assert [line.split(" at ")[0] for line in lines] == [
        "rank 0 of 4 on n1",
        "rank 1 of 4 on n1",
        "rank 2 of 4 on n2",
        "rank 3 of 4 on n2",
    ]
    assert len({line.split()[7] for line in lines}) == 1, "one address for all"
    settings = (stand_in / f"runs/slurm/{job}.yaml").read_text().split()
    assert settings[:2] == ["configs/msdm.yaml", "configs/hardware/a100x8.yaml"]
    assert {"hardware.nodes=2", "hardware.devices=2", "hardware.accelerator=cpu"} <= set(settings)


@pytest.mark.parametrize("code", [2, 76, 130])
def test_what_no_start_can_mend_is_not_requeued(slurm, stand_in, code):
    fields = slurm.end(submit(slurm, stand_in, f"exit {code}"))
    assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("FAILED", f"{code}:0", "0")


def test_a_preempted_run_is_requeued_and_goes_on_with_the_config_it_began_with(slurm, stand_in):
    job = submit(slurm, stand_in, "exit $((${SLURM_RESTART_COUNT:-0} < 3 ? 75 : 0))")
    wait_for(lambda: "requeued" in log(stand_in, job), "the first requeue")
    (stand_in / "configs/msdm.yaml").unlink()
    fields = slurm.end(job)
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "3"), log(stand_in, job)


def test_a_crash_is_tried_three_times(slurm, stand_in):
    fields = slurm.end(submit(slurm, stand_in, "exit 1"))
    assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("FAILED", "1:0", "2")


# At the first start, ranks that leave together once each has heard the signal; the second start ends at once.
HEAR = """
trap 'touch heard-$SLURM_PROCID; until [ "$(ls heard-* | wc -l)" = $SLURM_NTASKS ]; do sleep 0.1; done; exit 75' {0}
[ ${{SLURM_RESTART_COUNT:-0}} = 1 ] && exit 0; echo ready; while :; do sleep 0.2; done
""".strip().replace("\n", "; ")


def heard(folder: Path) -> int:
    """How many ranks have."""
    return len(list(folder.glob("heard-*")))


def test_a_signal_reaches_all_ranks_of_all_nodes_through_the_batch_shell(slurm, stand_in):
    job = submit(slurm, stand_in, HEAR.format("USR1"), "--nodes=2")
    wait_for(lambda: log(stand_in, job).count("ready") == 4, "four ranks")
    slurm.call("scancel", "--batch", "--signal=USR1", job)
    fields = slurm.end(job)
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "1"), log(stand_in, job)
    assert heard(stand_in) == 4


def test_a_signal_before_python_listens_is_no_crash(slurm, stand_in):
    job = submit(slurm, stand_in, "[ ${SLURM_RESTART_COUNT:-0} = 3 ] && exit 0; echo ready; sleep 100")
    for start in range(1, 4):  # more often than a crash would be forgiven
        wait_for(lambda n=start: log(stand_in, job).count("ready") == 2 * n, f"start {start}")
        slurm.call("scancel", "--batch", "--signal=USR1", job)
    fields = slurm.end(job)
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "3"), log(stand_in, job)


def test_what_its_owner_cancels_stays_cancelled(slurm, stand_in):
    job = submit(slurm, stand_in, HEAR.format("TERM"))
    wait_for(lambda: log(stand_in, job).count("ready") == 2, "two ranks")
    slurm.call("scancel", job)
    fields = slurm.end(job)
    assert (fields["JobState"], fields["Restarts"]) == ("CANCELLED", "0"), log(stand_in, job)
    assert heard(stand_in) == 2, "it had the time to save"


def test_a_job_that_a_more_urgent_one_preempts(slurm, stand_in):
    """Slurm's own preemption: SIGTERM, and at the end of its grace a requeue."""
    job = submit(slurm, stand_in, HEAR.format("TERM"), "--nodes=2")
    wait_for(lambda: log(stand_in, job).count("ready") == 4, "four ranks")
    options = ["--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null"]
    urgent = slurm.call("sbatch", *options, "--wrap=sleep 3", cwd=stand_in)
    assert slurm.end(urgent)["JobState"] == "COMPLETED"
    fields = slurm.end(job)
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "1"), log(stand_in, job)
    assert heard(stand_in) == 4


def test_a_sweep_is_an_array_with_a_run_a_point(slurm, stand_in):
    (stand_in / "configs/sweeps/lr.yaml").write_text(
        "config: configs/msdm.yaml\ngrid:\n  model.optim.lr: [0.001, 0.002]\n  seed: [0, 1]\n"
    )
    sbatch = ["slurm/sweep.sh", "configs/sweeps/lr.yaml", "--parsable", "--gpus-per-node=1", "--cpus-per-gpu=1"]
    array = slurm.call(*sbatch, "train.max_steps=9", cwd=stand_in)
    jobs = [slurm.end(f"{array}_{point}") for point in range(1, 5)]
    assert [job["JobState"] for job in jobs] == ["COMPLETED"] * 4
    for job, (rate, seed) in zip(jobs, [(0.001, 0), (0.001, 1), (0.002, 0), (0.002, 1)], strict=True):
        settings = (stand_in / f"runs/slurm/{job['JobId']}.yaml").read_text().split("\n")
        own = [f"model.optim.lr={rate}", f"seed={seed}", f"run_dir=runs/lr/lr-{rate}_seed-{seed}"]
        assert settings[-5:-1] == [*own, "train.max_steps=9"]


def test_a_sweep_with_a_mistake_submits_nothing(slurm, stand_in):
    (stand_in / "configs/sweeps/lr.yaml").write_text("config: configs/msdm.yaml\ngrid: {model.optim.rate: [0.1]}\n")
    result = slurm.run("slurm/sweep.sh", "configs/sweeps/lr.yaml", cwd=stand_in)
    assert result.returncode == 2
    assert "there is no key model.optim.rate" in result.stderr
    assert not result.stdout
