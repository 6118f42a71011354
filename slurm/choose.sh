#!/usr/bin/env bash
# What slurm/sweep.sh submits between two stages of a sweep: it chooses the best run, and says what the next ones train.
#SBATCH --job-name=choose
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --time=0:30:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.log
# shellcheck source=slurm/common.sh
. slurm/common.sh || { echo "slurm: type slurm/sweep.sh, which submits this" >&2 && exit 2; }
[ -n "${SLURM_JOB_ID-}" ] || fail "type slurm/sweep.sh, which submits this"
read_site
in_step --nodes=1 --ntasks=1 -- -m jobs.sweep "$@"
