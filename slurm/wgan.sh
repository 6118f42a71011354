#!/usr/bin/env bash
# sbatch slurm/wgan.sh [FILE.yaml…] [KEY=VALUE…]
#SBATCH --job-name=wgan
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-gpu=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.log
# shellcheck source=slurm/common.sh
. slurm/common.sh || { echo "slurm: type sbatch in the repository's root" >&2 && exit 2; }
launch configs/wgan.yaml configs/hardware/gpu.yaml -- "$@"
