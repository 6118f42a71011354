"""Training by the batch scripts on a real Slurm of two nodes: the weights of a run left alone, whatever happens."""

from pathlib import Path

import torch

from callbacks.durable import DurableCheckpointIO
from callbacks.ema import EMA
from tests.cluster.cluster import (
    ALLOCATION,
    RUN,
    SETTINGS,
    STEPS,
    BatchTraining,
    assert_same_run,
    log,
    step,
    submit,
    wait_for,
)


def test_a_run_through_everything_that_slurm_does(slurm, folders, undisturbed, whole_matrix):
    folder = folders("disturbed")
    training = BatchTraining(slurm, folder, submit(slurm, folder))
    disturbances = [training.kill_a_rank, training.warn_during_a_save, training.warn_twice, training.stop_a_rank]
    if whole_matrix:
        disturbances += [training.warn, training.requeue, training.lose_a_node, training.terminate_the_ranks]
    training.survive(disturbances)
    restarts = len(disturbances)
    if whole_matrix:
        training.warn_before_a_step()
        restarts += 1
    fields = slurm.end(training.job, seconds=600)
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", str(restarts)), training.log()
    assert_same_run(folder, undisturbed)


def test_of_an_array_only_the_run_that_is_disturbed_starts_again(slurm, folders, undisturbed):
    """The last task, which has the id of the whole array."""
    folder = folders("array")
    (folder / "configs/sweeps/seeds.yaml").write_text("config: configs/msdm.yaml\ngrid: {seed: [1, 0]}\n")
    sweep = ["slurm/sweep.sh", "configs/sweeps/seeds.yaml", "--parsable", *ALLOCATION, *SETTINGS]
    array = slurm.call(*sweep, cwd=folder)
    for disturb in (("scancel", "--batch", "--signal=USR1"), ("scontrol", "requeue")):
        before = step(folder, "runs/seeds/seed-0")
        wait_for(lambda n=before: step(folder, "runs/seeds/seed-0") > n, f"a step, {log(folder, array)}", 180)
        slurm.call(*disturb, f"{array}_2")
        wait_for(lambda: slurm.job(f"{array}_2")["JobState"] != "RUNNING", "the end of this start")
    other, disturbed = (slurm.end(f"{array}_{task}", seconds=600) for task in (1, 2))
    assert disturbed["JobId"] == array
    assert (other["JobState"], other["Restarts"]) == ("COMPLETED", "0"), log(folder, other["JobId"])
    assert (disturbed["JobState"], disturbed["Restarts"]) == ("COMPLETED", "2"), log(folder, array)
    assert_same_run(folder, undisturbed, "runs/seeds/seed-0", runs=3)  # two, below the sweep's own
    assert step(folder, "runs/seeds/seed-1") == step(folder, "runs/seeds/seed-0")


def test_a_run_in_parts_through_a_preemption_and_the_loss_of_a_node(slurm, folders):
    folder, alone = folders("parts"), folders("parts-undisturbed")
    undisturbed = submit(slurm, alone, "hardware.strategy=fsdp")
    assert slurm.end(undisturbed, seconds=600)["JobState"] == "COMPLETED", log(alone, undisturbed)
    training = BatchTraining(slurm, folder, submit(slurm, folder, "hardware.strategy=fsdp"))
    training.survive([training.warn, training.lose_a_node])
    fields = slurm.end(training.job, seconds=600)
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "2"), training.log()
    assert step(folder) == step(alone) == STEPS
    parts, whole = (held(path / RUN / "checkpoints/last.ckpt") for path in (folder, alone))
    torch.testing.assert_close(parts, whole, rtol=0, atol=0)


def held(checkpoint: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Weights and averages of a checkpoint in parts."""
    whole = DurableCheckpointIO().load_checkpoint(checkpoint)
    return {"weights": whole["state_dict"], "averages": whole["callbacks"][EMA.state_key]["shadow"]}
