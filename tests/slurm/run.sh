#!/usr/bin/env bash
# A one-node SLURM on this machine, and runs on it that are preempted or out of time, requeued and resumed. Not part of CI: it installs
# Debian packages and starts daemons, so it wants root and a container of its own.
#
#     PYTHON=.venv/bin/python tests/slurm/run.sh      LONG=...: steps of the run that has to outlast its minute, more on a faster machine
#
# Needs hydra-submitit-launcher in that Python. Exit code 0: every run finished with the results of an undisturbed sweep.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=$(realpath -s "${PYTHON:-.venv/bin/python}")
WORK=$(mktemp -d)
NODE=$(hostname -s)

command -v slurmctld > /dev/null || { apt-get update -q; apt-get install -q -y --no-install-recommends slurm-wlm munge; }
mkdir -p /run/munge /etc/slurm "$WORK/state" "$WORK/spool"
chown munge: /run/munge
[ -s /etc/munge/munge.key ] || { dd if=/dev/urandom of=/etc/munge/munge.key bs=1024 count=1 status=none; chown munge: /etc/munge/munge.key; chmod 400 /etc/munge/munge.key; }
cat > /etc/slurm/slurm.conf << CONF
ClusterName=moabench
SlurmctldHost=$NODE
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
StateSaveLocation=$WORK/state
SlurmdSpoolDir=$WORK/spool
SlurmctldLogFile=$WORK/slurmctld.log
SlurmdLogFile=$WORK/slurmd.log
ReturnToService=2
JobRequeue=1
NodeName=$NODE CPUs=$(getconf _NPROCESSORS_ONLN) RealMemory=4000 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
pgrep munged > /dev/null || runuser -u munge -- munged
pgrep slurmctld > /dev/null || slurmctld
pgrep slurmd > /dev/null || slurmd
for _ in $(seq 30); do sinfo -h -t idle 2> /dev/null | grep -q all && break; sleep 1; done
sinfo

SWEEP=(method=lora,moe_lora_topk model=random_tiny task=arc_easy train.steps=400 train.save_every=20 train.batch_size=2 data.eval_limit=8
    forgetting=none logger=none device=cpu quiet=true threads=1 probe.times=2)
export OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore

echo "an undisturbed sweep in one process"
"$PYTHON" run.py -m "${SWEEP[@]}" runs_dir="$WORK/alone"

echo "the same sweep on SLURM"
"$PYTHON" run.py -m hydra/launcher=slurm hydra.launcher.cpus_per_task=1 hydra.launcher.mem_gb=1 "${SWEEP[@]}" runs_dir="$WORK/slurm" > "$WORK/sweep.log" 2>&1 &
SWEEP_PID=$!
for _ in $(seq 600); do ls "$WORK"/slurm/arc_easy-*/checkpoints/checkpoint-*/trainer_state.json > /dev/null 2>&1 && break; sleep 0.2; done
squeue
JOB=$(squeue -h -t R -o %A | head -n 1)
echo "preempting job $JOB in the midst of training: $(cd "$WORK/slurm" && ls -d arc_easy-*/checkpoints/checkpoint-* | tr '\n' ' ')"
scancel --signal=USR2 "$JOB"
sleep 3
squeue -o "%A %t %r"
scontrol show job "$JOB" | grep -o "Restarts=[0-9]*" || true
wait "$SWEEP_PID" || { cat "$WORK/sweep.log"; exit 1; }

echo "a run that takes longer than its job may: a minute, with a warning 20 seconds before the end"
"$PYTHON" run.py "${SWEEP[@]:1}" method=lora train.steps="${LONG:-1500}" seed=1 runs_dir="$WORK/alone"
"$PYTHON" run.py -m hydra/launcher=slurm hydra.launcher.cpus_per_task=1 hydra.launcher.mem_gb=1 hydra.launcher.timeout_min=1 \
    hydra.launcher.signal_delay_s=20 "${SWEEP[@]:1}" method=lora train.steps="${LONG:-1500}" seed=1 runs_dir="$WORK/slurm" > "$WORK/sweep.log" 2>&1 ||
    { cat "$WORK/sweep.log"; exit 1; }

"$PYTHON" run.py runs ls "$WORK/slurm"
"$PYTHON" - "$WORK" << 'CHECK'
import sys
from pathlib import Path

from moabench.benchmarks.machine.files import read_json
from moabench.benchmarks.command.runs import unequal
from moabench.benchmarks.run.folder import find

work = Path(sys.argv[1])
alone, slurm = find(work / "alone"), find(work / "slurm")
assert [p.name for p in alone] == [p.name for p in slurm], (alone, slurm)
resumed = 0
for a, b in zip(alone, slurm, strict=True):
    status = read_json(b / "status.json")
    states = [entry["state"] for entry in status.get("before", [])]
    print(b.name, status["state"], "attempt", status["attempt"], "before:", states or "nothing")
    resumed += "interrupted" in states
    assert status["state"] == "finished" and not list(unequal(a, b)), list(unequal(a, b))
assert resumed == 2, f"{resumed} runs were interrupted, expected one by preemption and one by its time limit"
print(f"{len(slurm)} runs on SLURM, {resumed} of them requeued and resumed: equal to the undisturbed ones in every metric and table")
CHECK
