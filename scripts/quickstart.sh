#!/usr/bin/env bash
# From nothing to a DQN with a LaN that has trained on real Breakout, and its curves, in some three minutes on two CPU
# cores:
#   bash scripts/quickstart.sh [flags of dqn_atari_lan.py]
# The schedule is the paper's, scaled down; run again, it resumes or says that the run has finished.
set -euo pipefail
source "$(dirname "$0")/venv.sh"

.venv/bin/python dqn_atari_lan.py \
    --env-id BreakoutNoFrameskip-v4 --activation tanh-lan --seed 1 --exp-name quickstart \
    --total-timesteps 20000 --buffer-size 20000 --learning-starts 2000 --exploration-fraction 0.5 \
    --metrics-frequency 3000 --checkpoint-frequency 6000 "$@"

runs=runs
while (($#)); do
    case $1 in
        -h | --help) exit 0 ;;
        --runs-dir=*) runs=${1#*=} ;;
        --runs-dir) runs=$2 ;;
    esac
    shift
done
echo "drawing; most figures compare activations, a single run gives its own curves:"
.venv/bin/python plot_results.py --runs-dir "$runs" --out-dir figures --allow-unfinished
echo "  curves          open figures/index.html"
