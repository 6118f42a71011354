"""Medsynth on a real Slurm: where each disturbance is tested, with real training but for the scripts' stand-in (*).

`make cluster` meets each of them, and each launcher where it has code of its own for it. Both launchers share what
slurm/common.sh does around the step, and training what callbacks/preemption.py does: (all) is met by `make cluster-all`
alone, which is the whole table.

| what happens | sbatch | `medsynth submit` |
|---|---|---|
| --signal, sent by Slurm itself | test_limits | test_limits |
| a time limit that strikes | test_limits | test_limits |
| the same signal, sent by hand | test_slurm: of an array, of a run in parts; of others (all) | test_submit (all) |
| scontrol requeue | test_slurm: of an array; of others (all) | test_submit |
| a node DOWN and back | test_slurm: of a run in parts; of others (all) | test_submit (all) |
| an array | test_slurm, sweep.sh in test_scripts (*) | it submits one run: sweeps are slurm/sweep.sh's |
| arrays that wait for the choice before them | test_stages | as above |
| stages of one job | test_stages | the same stages, in what both share |
| scancel --signal=TERM | test_slurm (all) | test_submit |
| a signal before the first step | test_scripts (*), test_slurm (all) | test_submit |
| a signal during a save | test_slurm | test_submit (all) |
| two signals | test_slurm | test_submit (all) |
| one rank stopped by SIGSTOP | test_slurm: the second | test_submit: the first; the second (all) |
| a rank killed | test_slurm, the limit of three crashes in test_scripts (*) | test_submit |
| a more urgent job | test_scripts (*) | test_submit |
| scancel by its owner | test_scripts (*) | test_submit |
"""
