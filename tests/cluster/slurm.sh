#!/usr/bin/env bash
# A Slurm of two virtual nodes on this machine, each with 16 CPUs and 8 GPUs that are plain files.
#   tests/cluster/slurm.sh install       slurm-wlm and munge from Debian's packages
#   tests/cluster/slurm.sh start FOLDER  munged, slurmctld, slurmd n1 and n2, all of whose files are in FOLDER;
#                                        its jobs are numbered from FIRST_JOB, by default 1
#   tests/cluster/slurm.sh stop FOLDER
# Then `export SLURM_CONF=FOLDER/slurm.conf`, and sbatch, squeue and scontrol speak to it. Needs root.
set -euo pipefail

usage() {
  sed -n '2,7s/^# //p' "$0" >&2
  exit 2
}

install() {
  if command -v slurmctld slurmd munged >/dev/null; then return; fi
  export DEBIAN_FRONTEND=noninteractive
  # The packages would start services of their own, which nobody here wants.
  export RUNLEVEL=1
  apt-get update --quiet=2
  apt-get install --quiet=2 --yes --no-install-recommends slurm-wlm munge >/dev/null
}

configure() {
  head --bytes=1024 /dev/urandom >munge/key
  chmod 600 munge/key
  for i in {0..7}; do touch "gpu$i"; done
  echo "Name=gpu File=$PWD/gpu[0-7]" >gres.conf
  local port
  port=$(free_ports)
  cat >slurm.conf <<CONF
ClusterName=medsynth
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
# A training's port follows from its job's number: of two clusters on this machine each has numbers of its own.
FirstJobId=${FIRST_JOB:-1}
AuthType=auth/munge
# A requeued job waits this many seconds (by default two minutes) until its old credential has run out.
AuthInfo=socket=$PWD/munge/socket,cred_expire=5
StateSaveLocation=$PWD/state
SlurmdSpoolDir=$PWD/spool-%n
SlurmctldPidFile=$PWD/slurmctld.pid
SlurmdPidFile=$PWD/slurmd-%n.pid
SlurmctldLogFile=$PWD/slurmctld.log
SlurmdLogFile=$PWD/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
SlurmdParameters=config_overrides
SlurmdTimeout=300
# A message that a busy machine answers too late is sent again, a minute later: to end a start it then ends the next one.
MessageTimeout=60
SchedulerParameters=sched_interval=2,sched_min_interval=0,bf_interval=2
InactiveLimit=0
KillWait=20
MinJobAge=3600
ReturnToService=0
GresTypes=gpu
NodeName=n[1-2] NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=$((port + 1))-$((port + 2)) CPUs=16 Gres=gpu:8 State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=gpu Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=n[1-2] MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
CONF
}

# The first of three ports in a row that nobody listens on, below those the kernel deals out.
free_ports() {
  local port
  for port in $(shuf --input-range=17000-31000); do
    if ! (: <"/dev/tcp/127.0.0.1/$port" || : <"/dev/tcp/127.0.0.1/$((port + 1))" ||
      : <"/dev/tcp/127.0.0.1/$((port + 2))") 2>/dev/null; then
      echo "$port"
      return
    fi
  done
}

start() {
  mkdir -p "$1"
  cd "$1"
  mkdir -p munge state spool-n1 spool-n2
  configure
  export SLURM_CONF=$PWD/slurm.conf TEST_SLURM_FOLDER=$PWD # by the second one, stop finds them
  munged --force --key-file="$PWD/munge/key" --socket="$PWD/munge/socket" --pid-file="$PWD/munge/pid" \
    --log-file="$PWD/munge/log" --seed-file="$PWD/munge/seed"
  slurmctld
  slurmd -N n1
  slurmd -N n2
  for _ in {1..60}; do
    if [ "$(sinfo --noheader --states=idle --format=%D 2>/dev/null)" = 2 ]; then return; fi
    sleep 0.5
  done
  tail --lines=20 ./*.log munge/log >&2
  echo "slurm.sh: the nodes did not come up" >&2
  exit 1
}

stop() {
  cd "$1"
  export SLURM_CONF=$PWD/slurm.conf
  scancel --partition=gpu,urgent --full --signal=KILL 2>/dev/null || true
  for _ in {1..20}; do # without slurmd nobody would end what a job has started
    if [ -z "$(squeue --noheader 2>/dev/null)" ]; then break; fi
    sleep 0.5
  done
  signal_daemons TERM || true
  for _ in {1..20}; do
    signal_daemons 0 || return 0
    sleep 0.5
  done
  signal_daemons KILL || true
}

# signal_daemons SIGNAL: to all that `start` has started in this folder and what they have; false where nobody is left.
signal_daemons() {
  local process found=1
  for process in /proc/[0-9]*; do
    if grep --quiet --text --fixed-strings "TEST_SLURM_FOLDER=$PWD" "$process/environ" 2>/dev/null; then
      kill "-$1" "${process#/proc/}" 2>/dev/null && found=0
    fi
  done
  return "$found"
}

case "${1:-}" in
install) install ;;
start | stop) [ $# = 2 ] || usage && "$1" "$2" ;;
*) usage ;;
esac
