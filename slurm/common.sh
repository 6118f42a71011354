# shellcheck shell=bash
# What every script of this folder does, and what the one that `medsynth submit` makes does around its step; sourced from
# the repository's root. docs/clusters.md says how it is used.
#
# Who requeues: this script and nobody else, besides Slurm itself.
#   0       finished                      left
#   2, 76   a mistake, or no progress     left: another start would end alike
#   130     interrupted by SIGINT         left: somebody meant it to end
#   75      preempted and saved           requeued
#   other   a crash                       requeued, three times in a row at the most
#
# Why --signal=B:USR1@… and not USR1@…: without B only the steps hear the signal. The batch shell must hear it, too, for it
# has the last word: a signal that comes before python listens kills the ranks, and only who knows of the signal can tell
# that from a crash; and where a rank hangs, Slurm would end all of it as TIMEOUT, from which nothing is requeued. The
# batch shell hands the signal to srun, which hands it to every rank of every node.
#
# SIGTERM reaches the batch shell only when Slurm itself ends the job (scancel, scontrol requeue, a node lost, the limit
# over) and has settled what follows. To requeue then would raise a job that its owner cancelled.

readonly ATTEMPTS=3
readonly LAST_SECONDS=30

fail() {
  echo "slurm: $*" >&2
  exit 2
}

# The facts of the cluster, and data/ and runs/ in their places.
read_site() {
  [ -f slurm/site.env ] || fail "slurm/site.env is missing; copy slurm/site.env.example and fill it in"
  # shellcheck source=slurm/site.env.example
  . slurm/site.env
  if [ -n "${CONTAINER_IMAGE-}" ]; then
    [ -z "${VENV-}" ] || fail "slurm/site.env sets VENV and CONTAINER_IMAGE; keep one of them"
  elif [ -z "${VENV-}" ]; then
    fail "slurm/site.env sets neither VENV nor CONTAINER_IMAGE"
  elif [ ! -x "$VENV/bin/python" ]; then
    fail "slurm/site.env says VENV=$VENV, where there is no bin/python"
  fi
  link data "${DATA_ROOT-}"
  link runs "${RUNS_ROOT-}"
  mkdir -p runs/slurm || fail "runs/slurm cannot be made; does slurm/site.env say the right RUNS_ROOT?"
}

# link NAME FOLDER: make NAME, which the configs say, the FOLDER that the site says.
link() {
  [ -n "$2" ] || return 0
  mkdir -p "$2" 2>/dev/null || [ -d "$2" ] || fail "slurm/site.env names the folder $2, which cannot be made"
  [ -e "$1" ] || ln -s "$2" "$1" 2>/dev/null || true # another job may have been quicker
  [ "$1" -ef "$2" ] || fail "$PWD/$1 is not the folder $2 of slurm/site.env; move what is in it there, and remove it"
}

# in_step SRUN_OPTION… -- ARGUMENT…: python with ARGUMENTs as a step, in the container where there is one.
in_step() {
  local options=()
  while [ "$1" != -- ]; do
    options+=("$1")
    shift
  done
  shift
  local python=${VENV-}/bin/python
  if [ -n "${CONTAINER_IMAGE-}" ]; then
    python=python
    options+=("--container-image=$CONTAINER_IMAGE" "--container-workdir=$PWD" "--container-mounts=$(mounts)")
  fi
  # exec: srun takes the place of a subshell that runs this in the background, and so has the process id that is signalled.
  exec srun "${options[@]}" "$python" "$@"
}

mounts() {
  local folder list=$PWD:$PWD
  for folder in "${DATA_ROOT-}" "${RUNS_ROOT-}" "${HF_HOME-}"; do
    if [ -n "$folder" ]; then list+=,$folder:$folder; fi
  done
  echo "$list${MOUNTS:+,$MOUNTS}"
}

# launch FILE… -- [FILE…] [KEY=VALUE…]: train the config that FILEs, the allocation and the arguments make.
launch() {
  begin
  local asked=${SBATCH_PARTITION-}
  read_site
  warn_of_partition "$asked"
  local log=runs/slurm/$SLURM_JOB_NAME-$SLURM_JOB_ID.log
  echo "log: $log"
  exec >>"$log" 2>&1

  local files=()
  while [ "$1" != -- ]; do
    files+=("$1")
    shift
  done
  shift
  # srun would take it for its own, beside --cpus-per-task, and refuse the two together.
  unset SLURM_CPUS_PER_GPU

  local config=runs/slurm/$SLURM_JOB_ID.yaml settings processes
  # Slurm may begin its numbers anew: what a job of this number left is not this one's.
  if [ "${SLURM_RESTART_COUNT:-0}" = 0 ]; then rm -f "$config"; fi
  set_settings
  resolve "$config" "${files[@]}" "${settings[@]}" "$@"
  processes=$(processes_a_node)
  train in_step --nodes="$SLURM_JOB_NUM_NODES" --ntasks=$((SLURM_JOB_NUM_NODES * processes)) \
    --ntasks-per-node="$processes" --cpus-per-task=$((SLURM_CPUS_ON_NODE / processes)) --kill-on-bad-exit=1 \
    -- -m jobs.train "$config"
}

# Before anything else in a batch script.
begin() {
  [ -n "${SLURM_JOB_ID-}" ] || fail "start it with sbatch"
  signalled='' ended='' failures=runs/slurm/$SLURM_JOB_ID.failures
  # The last task of an array has the array's id, by which scontrol would requeue all of it.
  job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
  job=${job:-$SLURM_JOB_ID}
  trap on_usr1 USR1
  trap 'ended=1' TERM
  # The batch script runs on the first node, where rank 0 is.
  MASTER_ADDR=$(hostname)
  MASTER_PORT=$((15000 + SLURM_JOB_ID % 10000))
  export MASTER_ADDR MASTER_PORT
  if [ "${SLURM_RESTART_COUNT:-0}" = 0 ]; then rm -f "$failures"; fi # of an earlier job of this number
}

# Slurm has read the SBATCH_ lines only where they stood in the shell that called sbatch, which had asked for $1.
warn_of_partition() {
  local site=${SBATCH_PARTITION-$SLURM_JOB_PARTITION}
  if [ -z "$1" ] && [ "$site" != "$SLURM_JOB_PARTITION" ]; then
    echo "slurm: this job is in partition $SLURM_JOB_PARTITION and slurm/site.env says $site;" \
      "type \`. slurm/site.env\` before sbatch"
  fi
}

# What the allocation, the site and the sweep settle.
set_settings() {
  settings=("hardware.nodes=$SLURM_JOB_NUM_NODES" "hardware.devices=$(processes_a_node)")
  if [ "${CPU-}" = 1 ]; then settings+=(hardware.accelerator=cpu hardware.precision=32-true); fi
  [ -n "${SWEEP-}" ] || return 0
  local point
  IFS=$'\t' read -ra point < <(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" "$SWEEP") || true # the first line is the preset
  [ ${#point[@]} -gt 0 ] || fail "$SWEEP has no run $SLURM_ARRAY_TASK_ID: the step that was to write it has failed"
  settings+=("${point[@]}")
}

# One a GPU; where no GPU was asked for, as many as --ntasks-per-node says.
processes_a_node() {
  local gpus=${SLURM_GPUS_ON_NODE:-0}
  echo $((gpus > 0 ? gpus : ${SLURM_NTASKS_PER_NODE:-1}))
}

# resolve YAML ARGUMENT…: the whole config, settled at the job's first start, so that a requeued job goes on with what it
# began with, whatever has become of the files meanwhile; and so that a mistake is found by one process, not by all.
resolve() {
  if [ -s "$1" ]; then return; fi
  local code=0
  (in_step --nodes=1 --ntasks=1 -- -m jobs.train "${@:2}" --print) >"$1.part" || code=$?
  if [ "$code" = 0 ]; then
    mv "$1.part" "$1"
  else
    rm -f "$1.part"
    finish "$code"
  fi
}

# train COMMAND…: an srun, in one process a GPU, until all have ended, and with them the job.
train() {
  [ -z "$signalled" ] || finish 75
  "$@" &
  step=$!
  [ -z "$signalled" ] || on_usr1 # it came while there was no step yet to hand it to
  # A trap cuts `wait` short; the step is over when its process is, and its exit code is kept.
  while kill -0 "$step" 2>/dev/null; do wait "$step"; done
  wait "$step"
  finish $?
}

on_usr1() {
  signalled=1
  [ -n "${step-}" ] || return 0
  kill -USR1 "$step" 2>/dev/null
  [ -z "${watch-}" ] || return 0
  last_word &
  watch=$!
}

# Where a rank hangs, requeue while the time limit has not yet struck: a job that ended as TIMEOUT cannot be requeued.
last_word() {
  local end
  end=$(SLURM_TIME_FORMAT=%s squeue --noheader --jobs="$job" --format=%e)
  [[ $end =~ ^[0-9]+$ ]] || return # no limit
  while [ "$(date +%s)" -lt $((end - LAST_SECONDS)) ]; do
    sleep 2
    kill -0 $$ 2>/dev/null || return # the script has been killed
  done
  echo "slurm: a process has not ended in time; the job is requeued"
  requeue
}

# finish CODE: end the job, or have it started again.
finish() {
  # Where it outlives this start, it could requeue the next one.
  if [ -n "${watch-}" ]; then kill "$watch" 2>/dev/null; fi
  if [ -n "$ended" ]; then exit "$1"; fi
  case $1 in
  0 | 2 | 76 | 130) exit "$1" ;;
  75) rm -f "$failures" ;;
  *) [ -n "$signalled" ] || attempts_left || exit "$1" ;;
  esac
  echo "slurm: the job is requeued"
  requeue
  exit "$1" # what the job ends with where it was submitted with --no-requeue
}

# slurmctld may be away for a while; a job that was submitted with --no-requeue stays where it is.
requeue() {
  local said
  for _ in {1..10}; do
    [ -z "$ended" ] || return 0 # Slurm has begun to end this start
    said=$(scontrol requeue "$job" 2>&1) && return
    echo "slurm: $said"
    [[ $said != *disabled* ]] || return 0
    sleep 6
  done
}

# Whether there is another attempt after one more crash.
attempts_left() {
  echo crash >>"$failures"
  [ "$(wc --lines <"$failures")" -lt "$ATTEMPTS" ]
}
