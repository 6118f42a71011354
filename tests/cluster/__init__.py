"""Medsynth on a real Slurm: where each disturbance is tested, with real training but for the scripts' stand-in (*).

| what happens | sbatch | `medsynth submit` |
|---|---|---|
| --signal, sent by Slurm itself | test_limits | test_limits |
| a time limit that strikes | test_limits | test_limits |
| scontrol requeue | test_slurm | test_submit |
| a node DOWN and back | test_slurm | test_submit |
| an array | test_slurm, sweep.sh in test_scripts (*) | it submits one run: sweeps are slurm/sweep.sh's |
| scancel --signal=TERM | test_slurm | test_submit |
| a signal before the first step | test_slurm, test_scripts (*) | test_submit |
| a signal during a save | test_slurm | test_submit |
| two signals | test_slurm | test_submit |
| one rank stopped by SIGSTOP | test_slurm | test_submit: either rank |
| a rank killed | test_slurm, the limit of three crashes in test_scripts (*) | test_submit |
| a more urgent job | test_scripts (*) | test_submit |
| scancel by its owner | test_scripts (*) | test_submit |
"""
