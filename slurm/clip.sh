#!/usr/bin/env bash
# sbatch slurm/clip.sh [FILE.yaml…] [KEY=VALUE…]
#SBATCH --job-name=clip
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
launch configs/clip.yaml configs/hardware/a100x8.yaml -- "$@"
