#!/usr/bin/env bash
# A Slurm on this machine alone, for the tests: started as root, on the loopback address, all its files in DIR:
#   bash tests/slurm.sh start DIR PORT      uses PORT and PORT + 1; then export SLURM_CONF=DIR/slurm.conf
#   bash tests/slurm.sh stop DIR
set -euo pipefail
dir=$2

if [[ $1 == stop ]]; then
    export SLURM_CONF=$dir/slurm.conf
    scancel --user=root --quiet || true
    for ((i = 0; i < 100; i++)); do
        [[ -n $(squeue --noheader 2> /dev/null) ]] || break
        sleep 0.1
    done
    for file in "$dir"/slurmd.pid "$dir"/slurmctld.pid "$dir"/munge/pid; do
        [[ ! -f $file ]] || kill "$(cat "$file")" || true
    done
    for ((i = 0; i < 100; i++)); do # they remove their pid files last
        [[ -e $dir/slurmd.pid || -e $dir/slurmctld.pid || -e $dir/munge/pid ]] || break
        sleep 0.1
    done
    rm -rf "$dir"
    exit
fi

port=$3
host=$(hostname -s)
mkdir -p "$dir"/{munge,state,spool}
chmod 755 "$dir" # munged trusts no folder that others may write
head -c 1024 /dev/urandom > "$dir/munge/key"
chmod 600 "$dir/munge/key"
chown -R munge "$dir/munge"
runuser -u munge -- munged --key-file="$dir/munge/key" --socket="$dir/munge/socket" --pid-file="$dir/munge/pid" \
    --log-file="$dir/munge/log" --seed-file="$dir/munge/seed"

# Without cgroups; ready to start what is submitted at once.
cat > "$dir/slurm.conf" << END
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmctldPort=$port
SlurmdPort=$((port + 1))
AuthType=auth/munge
AuthInfo=socket=$dir/munge/socket
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=30
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(env -u OMP_NUM_THREADS nproc) $(slurmd -C | grep -o 'RealMemory=[0-9]*') State=UNKNOWN
PartitionName=main Nodes=$host Default=YES State=UP
END
echo IgnoreSystemd=yes > "$dir/cgroup.conf"
export SLURM_CONF=$dir/slurm.conf
slurmctld -i
slurmd
for ((i = 0; i < 150; i++)); do
    [[ $(sinfo --noheader --format=%T 2> /dev/null) != idle ]] || exit 0
    sleep 0.1
done
tail -n 20 "$dir"/slurmctld.log "$dir"/slurmd.log >&2
exit 1
