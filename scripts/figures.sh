#!/usr/bin/env bash
# Every figure on its own, from the run folders:
#   bash scripts/figures.sh [flags of plot_results.py, e.g. --runs-dir runs --out-dir figures --allow-unfinished]
# `python plot_results.py` draws them all at once, with tables and index.html; one line below redraws one figure.
set -euo pipefail
source "$(dirname "$0")/venv.sh"

case ${1-} in
    --help | -h)
        sed -n '2,4s/^# \{0,1\}//p' "$0"
        exit
        ;;
esac
flags=("$@")
draw() { .venv/bin/python plot_results.py "${flags[@]}" --only "$1"; }

draw fig01_dqn_relu_tanh
draw fig04_dqn_densities
draw fig05a_dqn_normalized
draw fig05b_dqn_ablations
draw fig06a_dqn_dead_neurons
draw fig06b_dqn_effective_rank
draw fig07_dqn_variants
draw fig08a_ppo_normalized
draw fig08b_ppo_effective_rank
draw fig10_dqn_factor_densities
draw fig11_dqn_sigmoid_densities
draw fig13_dqn_dying_probability
draw fig14_dqn_relu_lan
draw fig15_dqn_human_normalized
draw fig16_dqn_games
draw fig17_ppo_games
draw tables # results.csv and results.md: Table 2, aggregates, scores by game
