#!/usr/bin/env bash
# slurm/sweep.sh SWEEP.yaml [SBATCH OPTION…] [FILE.yaml…] [KEY=VALUE…]: an array job, a run for each point of the grid.
#   slurm/sweep.sh configs/sweeps/stable_diffusion_lora_rank.yaml --time=8:00:00
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=slurm/common.sh
. slurm/common.sh
[ -z "${SLURM_JOB_ID-}" ] || fail "type slurm/sweep.sh without sbatch; it calls sbatch itself"
[ $# -gt 0 ] || fail "name a sweep, one of: $(echo configs/sweeps/*.yaml)"
read_site

sweep=$1
shift
options=() arguments=()
for argument; do
  case $argument in
  -*) options+=("$argument") ;;
  *) arguments+=("$argument") ;;
  esac
done

table=runs/slurm/$(basename "$sweep" .yaml)-$(date +%Y%m%d-%H%M%S)-$$.tsv
if [ -n "${CONTAINER_IMAGE-}" ]; then
  # srun does not read sbatch's variables.
  where=(${SBATCH_PARTITION:+"--partition=$SBATCH_PARTITION"} ${SBATCH_ACCOUNT:+"--account=$SBATCH_ACCOUNT"})
  (in_step "${where[@]}" --nodes=1 --ntasks=1 -- -m jobs.sweep "$sweep" "${arguments[@]}") >"$table"
else
  "$VENV/bin/python" -m jobs.sweep "$sweep" "${arguments[@]}" >"$table"
fi
{ read -r config && mapfile -t runs; } <"$table"
SWEEP=$table exec sbatch --array="1-${#runs[@]}" "${options[@]}" "slurm/$(basename "$config" .yaml).sh" "${arguments[@]}"
