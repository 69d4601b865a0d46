#!/usr/bin/env bash
# Copies what is recorded of a list's finished runs (points, flags, status) into its folder, e.g.
#   bash scripts/sweep.sh results/controls/jobs.txt; bash results/record.sh controls runs; bash results/draw.sh
set -euo pipefail
source "$(dirname "$0")/../scripts/venv.sh"

folder=results/$1 runs=$2
.venv/bin/python scripts/status.py --plan "$folder/jobs.txt" | cut -f 4 | while read -r log; do
    run=$runs/$(basename "$log" .log)
    if grep -qs '"finished"' "$run/status.json"; then
        mkdir -p "$folder/runs/$(basename "$run")"
        cp "$run"/config.json "$run"/status.json "$run"/events.* "$folder/runs/$(basename "$run")"
    fi
done
echo "$folder/runs: $(ls "$folder/runs" 2> /dev/null | wc -l) finished runs"
