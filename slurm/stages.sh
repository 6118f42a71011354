#!/usr/bin/env bash
# sbatch slurm/stages.sh STAGES.yaml [FILE.yaml…] [KEY=VALUE…]: stages one after the other, in one job
#SBATCH --job-name=stages
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-gpu=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.log
# shellcheck source=slurm/common.sh
. slurm/common.sh || { echo "slurm: type sbatch in the repository's root" >&2 && exit 2; }
[ $# -gt 0 ] || fail "name a file of stages, one of: $(echo configs/stages/*.yaml)"
launch "$1" configs/hardware/a100x8.yaml -- "${@:2}"
