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

# print_into FILE COMMAND...: what this Python program prints; the old file stays if it fails
print_into() {
    local file=$1 text
    shift
    text=$(.venv/bin/python "$@") && printf '%s\n' "$text" > "$file" || ((failed += 1))
}

draw study
draw pqn --only algorithms study_pqn layers tables
draw collapse --exp-name double no-double --only study_dqn layers_dqn tables
print_into results/collapse/deaths.md experiments/layer_deaths.py results/collapse/runs/* \
    results/study/runs/BreakoutNoFrameskip-v4__dqn_atari_lan__{relu,sigmoid}__*
draw controls results/study/runs --exp-name ppo_atari_lan --only controls_ppo layers_ppo tables
draw full --allow-unfinished --only study_ppo layers_ppo study_pqn layers_pqn fig17 tables
print_into results/full/over_training.md experiments/over_training.py results/full/runs/*
draw full/xeon --allow-unfinished --only study_ppo
print_into results/full/xeon/over_training.md experiments/over_training.py results/full/xeon/runs/*
exit "$failed"
