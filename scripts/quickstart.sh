#!/usr/bin/env bash
# The paper's idea in a few minutes on two CPU cores: PPO learns Breakout twice,
# side by side, with ReLU and with a tanh LaN as its last hidden layer; then it
# compares their neurons in a table and in one picture.
#   bash scripts/quickstart.sh             makes .venv first if it is missing
#   bash scripts/quickstart.sh --seed 2    passes flags of ppo_atari_lan.py to both
# Everything goes into the folder quickstart/ (another one: --runs-dir DIR).
# Ctrl-C stops both agents, and the same command continues them. Once they have
# finished, it only shows the result again.
set -euo pipefail

dir=quickstart
flags=("$@")
while (($#)); do
    case $1 in
        -h | --help)
            sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
            exit 0
            ;;
        --runs-dir=*) dir=${1#*=} ;;
        --runs-dir) dir=${2-} ;;
    esac
    shift
done
source "$(dirname "$0")/venv.sh"

agents=(relu tanh-lan)
words="bash scripts/quickstart.sh"
for flag in ${flags[@]+"${flags[@]}"}; do
    [[ $flag == --overwrite ]] || words+=" $(printf %q "$flag")"
done
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT

# A signal reaches both agents as SIGTERM, on which they save: bash starts background jobs with Ctrl-C ignored.
stopped=
stop() {
    stopped=${stopped:-$1}
    trap '' "${signals[@]}"
    for agent in "${agents[@]}"; do kill -TERM "${pids[$agent]}" 2> /dev/null || true; done
    { end_line && echo "stopping: both agents save first, which takes a few seconds"; } || true # a closed terminal
}
declare -A pids
signals=(HUP INT TERM USR1 USR2 XCPU)
for name in "${signals[@]}"; do trap "stop $((128 + $(kill -l "$name")))" "$name"; done

for agent in "${agents[@]}"; do
    .venv/bin/python ppo_atari_lan.py --runs-dir "$dir" --env-id BreakoutNoFrameskip-v4 --total-timesteps 25000 \
        --metrics-frequency 2000 --checkpoint-frequency 5000 --num-threads 1 --no-async-envs \
        ${flags[@]+"${flags[@]}"} --activation "$agent" < /dev/null > "$logs/$agent" 2>&1 &
    pids[$agent]=$!
done

# The run's folder, as the training script prints it at its start, or for a run that had finished before.
folder() { sed -n 's/^  run folder  //p; s/ has finished; --overwrite trains it anew$//p' "$logs/$1" | head -n 1; }
# A number from its status.json.
number() { sed -n "s/.*\"$2\": \([0-9]*\).*/\1/p" "$(folder "$1")/status.json" 2> /dev/null || true; }
progress() { # what precedes the line, what ends it
    local line= agent step total=
    for agent in "${agents[@]}"; do
        step=$(number "$agent" step)
        total=$(number "$agent" total_timesteps)
        line+=$(printf '%s %3d %%' "$agent" $((100 * ${step:-0} / ${total:-25000})))"   "
    done
    printf "$1  %sof %d agent steps   %d:%02d$2" "$line" "${total:-25000}" $((SECONDS / 60)) $((SECONDS % 60))
}
on_line= # does the cursor stand at the end of a progress line?
end_line() { [[ -z $on_line ]] || echo; on_line=; }

echo "PPO learns Breakout twice: with ReLU (relu) and with a LaN (tanh-lan) as its last hidden layer."
echo "  agents      $dir"
shown=$SECONDS
while [[ -n $(jobs -rp) ]]; do
    sleep 1
    [[ -z $stopped ]] || continue
    if [[ -t 1 ]]; then
        progress '\r' ''
        on_line=yes
    elif ((SECONDS - shown >= 15)); then
        progress '' '\n'
        shown=$SECONDS
    fi
done
end_line || true # a closed terminal

failed=0
for agent in "${agents[@]}"; do
    code=0
    wait "${pids[$agent]}" || code=$?
    ((code == 0)) || failed=${stopped:-$code}
done
if [[ -n $stopped ]] && ((failed)); then
    echo "stopped; the same command continues: $words" >&2 || true
    exit "$stopped"
fi
if ((failed)); then
    # A bad flag gives the same error twice; anything but a one-line error is shown whole.
    { grep -h '^error: ' "$logs"/* || cat "$logs/${agents[0]}"; } | sort -u >&2
    exit "$failed"
fi

lan=$(folder tanh-lan)
steps=$(number tanh-lan step)
share=$(awk "BEGIN { printf \"%.2g\", $steps / 1e5 }") # percent of 10,000,000
picture=$dir/quickstart.png
echo
.venv/bin/python scripts/compare.py "$(folder relu)" "$lan" --out "$picture"
cat << END

A dead neuron outputs (almost) the same value whatever the observation. Most of the ReLU's were dead from the start.
So short a training says nothing about returns: $steps agent steps are $share % of the paper's.

  the picture       open $(printf %q "$picture")
  an agent's game   .venv/bin/python scripts/enjoy.py $(printf %q "$lan") --episodes 1 --video
  the paper's run   .venv/bin/python ppo_atari_lan.py --activation tanh-lan
  the sweep         .venv/bin/python scripts/jobs.py | bash scripts/sweep.sh
  its plots         .venv/bin/python plot_results.py
END
