#!/usr/bin/env bash
# slurm/sweep.sh SWEEP.yaml [--skip-failed] [SBATCH OPTION…] [FILE.yaml…] [KEY=VALUE…]: an array job for each stage of a
# sweep, a run for each point of its grid, and between two stages a short job that chooses the best run.
#   slurm/sweep.sh configs/sweeps/stable_diffusion_lora_rank.yaml --time=8:00:00
# Runs that are done are not submitted again.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=slurm/common.sh
. slurm/common.sh
[ -z "${SLURM_JOB_ID-}" ] || fail "type slurm/sweep.sh without sbatch; it calls sbatch itself"
[ $# -gt 0 ] || fail "name a sweep, one of: $(echo configs/sweeps/*.yaml)"
read_site

sweep=$1
shift
# Of sbatch's options, the choosing step takes those that say where and for whom.
options=() arguments=() where=() skip=()
for argument; do
  case $argument in
  --skip-failed) skip=(--skip-failed) ;;
  --account=* | --partition=* | --qos=* | --reservation=*) options+=("$argument") where+=("$argument") ;;
  -*) options+=("$argument") ;;
  *) arguments+=("$argument") ;;
  esac
done

tables=runs/slurm/$(basename "$sweep" .yaml)-$(date +%Y%m%d-%H%M%S)-$$
plan=$tables.plan
ask=(-m jobs.sweep "$sweep" "${arguments[@]}" "${skip[@]}" "--tables=$tables")
if [ -n "${CONTAINER_IMAGE-}" ]; then
  # srun does not read sbatch's variables.
  step=(${SBATCH_PARTITION:+"--partition=$SBATCH_PARTITION"} ${SBATCH_ACCOUNT:+"--account=$SBATCH_ACCOUNT"})
  (in_step "${step[@]}" --nodes=1 --ntasks=1 -- "${ask[@]}") >"$plan"
else
  "$VENV/bin/python" "${ask[@]}" >"$plan"
fi

# Nothing of Slurm begins before the stage before it has a best run: such jobs wait for the choice, and go where it fails.
after=()
while IFS=$'\t' read -r stage script runs table next; do
  if [ "$next" = - ]; then # one stage, after which nothing is chosen
    [ "$runs" != - ] || fail "all runs of $sweep are done; medsynth sweep $sweep --report shows them"
    SWEEP=$table exec sbatch --array="$runs" "${options[@]}" "$script" "${arguments[@]}"
  fi
  if [ "$runs" != - ]; then
    array=$(SWEEP=$table sbatch --parsable --array="$runs" "${after[@]}" "${options[@]}" "$script" "${arguments[@]}")
    echo "stage $stage: array job ${array%%;*} of runs $runs"
    after=("--dependency=afterany:${array%%;*}")
  fi
  choice=$(sbatch --parsable "${after[@]}" "${where[@]}" slurm/choose.sh "$sweep" "${arguments[@]}" "${skip[@]}" \
    "--tables=$tables" "--choose=$stage")
  echo "stage $stage: job ${choice%%;*} chooses its best run"
  after=("--dependency=afterok:${choice%%;*}" --kill-on-invalid-dep=yes)
done <"$plan"
