#!/usr/bin/env bash
# Runs a list of jobs on this machine, as many at once as it can hold.
# Called again, it resumes what is unfinished:
#   python scripts/jobs.py > jobs.txt; bash scripts/sweep.sh jobs.txt
#   python scripts/jobs.py | bash scripts/sweep.sh
#   bash scripts/sweep.sh --jobs-per-gpu 3 jobs.txt   3 at once on each GPU, or in all
#                                                     where there is no GPU
#   bash scripts/sweep.sh --dry-run jobs.txt          what would run, and how many at once
#   bash scripts/sweep.sh --status jobs.txt           each run's state, and the time left
# Exit code: the number of failed runs (at most 100), 2 for bad input,
# 128 + n when stopped by signal n.
set -uo pipefail

TRIES=3
CHECKPOINT_SECONDS=120 # for a stopped run to write its checkpoint
WAIT_SECONDS=300 # until a run that found too little memory or disk is tried again
WAITS=48 # at most, for each of the tries
SHORTAGE='not enough memory|No space left|Disk quota exceeded' # in the last line of such a run
RUN_GPU_MEMORY=2000 # MB of a GPU; 1,100 to 1,550 were measured on one (docs/speed.md)
RUN_CUDA_RAM=1400 # MB that CUDA adds to a run's RAM, as checks.py has it

fail() {
    echo "error: $*" >&2
    exit 2
}

# Ends an unfinished line, so that what is written to the log next starts a line.
end_line() { [[ ! -s $1 || -z $(tail -c 1 "$1") ]] || echo >> "$1"; }

# run SLOT THREADS LOG COMMAND: runs one job of the list and returns its exit code. Slot 0: Slurm has set device and
# threads. THREADS: how many an unfinished run began with, or -
run() {
    local slot=$1 threads=$2 log=$3 command=$4 start=$SECONDS
    local name slurm= training= stopped= warned= missing reason needed=0 waits=0 code
    name=$(basename "$log" .log)
    if ((slot == 0)); then
        slurm="as Slurm job ${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID "
    else
        local gpus=($SWEEP_GPUS)
        ((${#gpus[@]} == 0)) || export CUDA_VISIBLE_DEVICES=${gpus[(slot - 1) % ${#gpus[@]}]}
        export OMP_NUM_THREADS=$SWEEP_THREADS
    fi
    if [[ $threads != - && $threads != "$OMP_NUM_THREADS" ]]; then # another count would give other weights
        echo "$(date +%T) resumed with the $threads CPU threads that it began with, not $OMP_NUM_THREADS: $name"
        export OMP_NUM_THREADS=$threads
    fi
    # GNU parallel and Slurm end a job with a SIGTERM to the training as well: only wait for it, since a second SIGTERM
    # would make it leave without a checkpoint. SIGUSR1, Slurm's warning that time is running out, reaches this shell
    # only. What other systems send may reach the training too, which counts two within a second as one.
    trap 'stopped=1' TERM
    trap 'warned=1; [[ -z $training ]] || kill -TERM "$training"' HUP USR1 USR2 XCPU
    while true; do
        missing=$({ end_line "$log" && echo "=== $(date -Is) start in process $$ on $HOSTNAME ${slurm}with" \
            "CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-all} OMP_NUM_THREADS=$OMP_NUM_THREADS: $command" >> "$log"; } 2>&1)
        code=$?
        [[ -z $stopped$warned ]] || return 143
        if ((code)); then
            code=2
            ((waits > 0)) || echo "$missing" >&2
        else
            eval "exec $command" < /dev/null >> "$log" 2>&1 &
            training=$!
            [[ -z $warned ]] || kill -TERM "$training" # the warning came in between
            while kill -0 "$training" 2> /dev/null; do wait "$training" 2> /dev/null; done
            wait "$training" 2> /dev/null
            code=$?
            training= missing=$(tail -n 1 "$log")
        fi
        # A shortage that passes must not make the rest of a list fail within minutes.
        [[ $code =~ ^[12]$ && $missing =~ $SHORTAGE && -z $stopped$warned ]] || break
        reason=${BASH_REMATCH[0]}
        # What needs more than was free when the sweep began does not wait for it; nor does Slurm.
        [[ ! $missing =~ ([0-9]+)\.([0-9])\ GB\ needed ]] || needed=${BASH_REMATCH[1]}${BASH_REMATCH[2]}00
        ((10#$needed <= ${SWEEP_RAM:-0} && waits < WAITS && slot > 0)) || break
        ((waits > 0)) || echo "$(date +%T) waits, ${reason,}: $name"
        ((waits += 1))
        { end_line "$log" && echo "=== $(date -Is) waits" >> "$log"; } 2> /dev/null
        sleep "$WAIT_SECONDS" &
        wait $!
        kill $! 2> /dev/null
        [[ -z $stopped$warned ]] || return 143
    done
    { end_line "$log" && echo "=== $(date -Is) exit $code" >> "$log"; } 2> /dev/null
    case $code in
        0) echo "$(date +%T) finished in $((SECONDS - start)) s: $name" ;;
        129 | 130 | 138 | 140 | 143 | 152) echo "$(date +%T) stopped: $name" ;;
        *) echo "$(date +%T) failed with exit code $code: $name" ;;
    esac
    return $code
}

{ # read to its end before it runs: this file may change during a sweep of weeks

unset CDPATH
[[ -e /dev/fd/0 ]] || exec < /dev/null # it was closed: the next file opened would become standard input
caller=$PWD
project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$project" || exit 2
[[ ! -x .venv/bin/python ]] || export PATH=$project/.venv/bin:$PATH
if [[ ${1-} == --run ]]; then
    run "${@:2}"
    exit
fi

jobs_file= per_gpu= dry_run= status=
while (($#)); do
    case $1 in
        --jobs-per-gpu)
            [[ ${2-} =~ ^[1-9][0-9]{0,3}$ ]] || fail "--jobs-per-gpu takes a number from 1 to 9999"
            per_gpu=$2
            shift
            ;;
        --dry-run) dry_run=1 ;;
        --status) status=1 ;;
        --help | -h)
            sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$project/scripts/sweep.sh"
            exit
            ;;
        -?*) fail "unknown flag $1; try --help" ;;
        *)
            [[ -z $jobs_file ]] || fail "one job list at a time: $jobs_file or $1"
            jobs_file=$1
            ;;
    esac
    shift
done
python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null ||
    fail "no Python from 3.11 on in the PATH; bash scripts/quickstart.sh makes .venv"
[[ -n $jobs_file || ! -t 0 ]] || fail "name a job list: python scripts/jobs.py > jobs.txt; bash scripts/sweep.sh jobs.txt"
case ${jobs_file:=-} in
    - | /*) ;;
    *) jobs_file=$caller/$jobs_file ;;
esac
if [[ -n $status ]]; then
    exec python scripts/status.py "$jobs_file"
fi

# Lines of: line number, state, threads, log, command, MB of RAM, MB of disk.
# No here-strings: a full TMPDIR would make them empty.
plan=$(python scripts/status.py --plan "$jobs_file") || exit
[[ -n $plan ]] || fail "scripts/status.py says nothing about the jobs of $jobs_file; call it with --plan to see why"
in_state() { printf '%s\n' "$plan" | grep -P "^\d+\t($1)\t"; }
count() { in_state "$1" | wc -l; }
TODO='waiting|stopped|failed'
todo=$(in_state "$TODO")
# MB of the most demanding run.
read -r RUN_RAM RUN_DISK < <(printf '%s\n' "${todo:-$plan}" |
    awk -F '\t' '$6 > ram {ram = $6} $7 > disk {disk = $7} END {print ram + 0, disk + 0}')
first_log=$(printf '%s\n' "$plan" | awk -F '\t' 'NR == 1 {print $4}')
runs_dir=$(dirname "$(dirname "$first_log")")

# -- how many at once

if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
    gpus=(${CUDA_VISIBLE_DEVICES//,/ })
    [[ ${gpus[0]-} != -1 ]] || gpus=() # -1: no GPU, as CUDA reads it
else
    gpus=($(nvidia-smi --query-gpu=index --format=csv,noheader 2> /dev/null | grep -x '[0-9]*'))
fi
devices=${#gpus[@]}
((devices > 0)) || devices=1
read -r cores ram < <(python -m lan_utils.machine) || fail "cannot tell cores and memory: python -m lan_utils.machine"
existing=$runs_dir
while [[ ! -e $existing ]]; do existing=$(dirname "$existing"); done
disk=$(df --output=avail -BM "$existing" | tail -n 1 | tr -dc 0-9)
gb() { printf '%d.%d GB' $(($1 / 1000)) $(($1 % 1000 / 100)); }
((${#gpus[@]} == 0)) || RUN_RAM=$((RUN_RAM + RUN_CUDA_RAM))
limits=("$((cores / devices)) by $cores CPU cores"
    "$((ram / RUN_RAM / devices)) by $(gb "$ram") of free RAM at $(gb $RUN_RAM) a run"
    "$((disk / RUN_DISK / devices)) by $(gb "$disk") of free disk at $(gb $RUN_DISK)")
if ((${#gpus[@]})); then
    memory=$(nvidia-smi --query-gpu=memory.free --format=csv,noheader,nounits --id="$(IFS=, && echo "${gpus[*]}")" \
        2> /dev/null | grep -x '[0-9]*' | sort -n | head -n 1)
    [[ -z $memory ]] ||
        limits+=("$((memory / RUN_GPU_MEMORY)) by $(gb "$memory") of free GPU memory at $(gb $RUN_GPU_MEMORY)")
fi
reason="--jobs-per-gpu $per_gpu"
if [[ -z $per_gpu ]]; then
    reason=$(printf '%s\n' "${limits[@]}" | sort -n | paste -sd , | sed 's/,/, /g')
    per_gpu=${reason%% *}
    ((per_gpu > 0)) || per_gpu=1
fi
slots=$((per_gpu * devices))
threads=$((cores / slots > 0 ? cores / slots : 1))
where="on the CPU"
((${#gpus[@]} == 0)) || where="$per_gpu on each of the GPUs ${gpus[*]}"
echo "$(count '\w+') runs: $(count finished) finished, $(count running) running already, $(count "$TODO") to run"
echo "$slots at once, $where, CPU threads of each: $threads ($reason)"

# -- run them

if [[ -n $dry_run ]]; then
    in_state "$TODO" | cut -f 5
    exit 0
fi
unreadable=$(count unreadable)
if (($(count "$TODO") == 0)); then
    exit $((unreadable > 100 ? 100 : unreadable))
fi
parallel --version 2> /dev/null | grep -q GNU || fail "GNU parallel is missing: apt install parallel," \
    "conda install -c conda-forge parallel, or brew install parallel"
while read -r folder; do
    mkdir -p "$folder" 2> /dev/null && [[ -w $folder ]] || fail "cannot write in $folder; name another --runs-dir"
done < <(in_state "$TODO" | cut -f 4 | xargs -d '\n' dirname | sort -u)
export SWEEP_GPUS=${gpus[*]-} SWEEP_THREADS=$threads SWEEP_RAM=$ram PARALLEL_SHELL=$BASH
bar=()
[[ ! -t 2 ]] || bar=(--bar)

# In its own process group, so that Ctrl-C is passed on once, by this shell.
set -m
parallel --plain --will-cite --ungroup "${bar[@]}" --jobs "$slots" --retries "$TRIES" \
    --joblog "$runs_dir/.sweep/joblog-$(date +%Y%m%d-%H%M%S).tsv" --termseq "TERM,${CHECKPOINT_SECONDS}000,KILL,25" \
    --colsep '\t' --trim n --arg-file <(in_state "$TODO" | cut -f 3-5) "exec bash scripts/sweep.sh --run {%} {1} {2} {3}" < /dev/null &
parallel=$!
signum=
stop() {
    if [[ -z $signum ]]; then
        echo "stopping: the runs are writing their checkpoints; a second signal ends them without" >&2
        signum=$1 stopped_at=$SECONDS
        kill -INT "$parallel"
    elif (($1 == 2 || $1 == 15)) && ((SECONDS - stopped_at > 1)); then # `timeout` and others send one signal twice
        kill -TERM "$parallel"
    fi
}
for name in HUP INT TERM USR1 USR2 XCPU; do trap "stop $(kill -l $name)" "$name"; done
while kill -0 "$parallel" 2> /dev/null; do wait "$parallel" 2> /dev/null; done

# -- what has become of them

plan=$(printf '%s\n' "$plan" | cut -f 5 | python scripts/status.py --plan -) || {
    echo "error: cannot tell what has become of the runs; fix this, then see --status" >&2
    exit 1
}
failed=$(count "$TODO|unreadable")
(($(count running) == 0)) || echo "other processes are training $(count running) of the runs: see --status"
if [[ -n $signum ]]; then
    echo "stopped with $failed of $(count '\w+') runs unfinished; the same command resumes them"
    exit $((128 + signum))
fi
while IFS=$'\t' read -r _ _ _ log command _; do
    printf '\nfailed: %s\n%s ends with\n' "$command" "$log"
    tail -n 6 "$log" | sed 's/^/    /'
done < <(in_state "$TODO")
echo "$(count finished) of $(count '\w+') runs have finished, $failed failed"
exit $((failed > 100 ? 100 : failed))
}
