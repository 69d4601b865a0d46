#!/usr/bin/env bash
# Draws every recorded study again, each into its own folder: bash results/draw.sh
# Exit code: how many figures and tables could not be made, because too little is recorded yet.
set -uo pipefail
source "$(dirname "$0")/../scripts/venv.sh"
failed=0

# draw FOLDER FLAGS: the figures and tables of results/FOLDER, of the runs that are recorded there
draw() {
    local folder=results/$1
    shift
    [[ -d $folder/runs ]] || return 0
    .venv/bin/python plot_results.py --out-dir "$folder" --runs-dir "$folder/runs" "$@" || ((failed += 1))
}

draw study
draw pqn --only algorithms study_pqn layers tables
draw collapse --exp-name double no-double --only study_dqn layers_dqn tables
deaths=$(.venv/bin/python experiments/layer_deaths.py results/collapse/runs/* \
    results/study/runs/BreakoutNoFrameskip-v4__dqn_atari_lan__{relu,sigmoid}__*) &&
    printf '%s\n' "$deaths" > results/collapse/deaths.md || ((failed += 1))
draw controls results/study/runs --exp-name ppo_atari_lan --only controls_ppo layers_ppo tables
draw full --allow-unfinished
exit "$failed"
