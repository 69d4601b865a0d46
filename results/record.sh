#!/usr/bin/env bash
# Copies what is recorded of a list's runs (points, flags, status) into its folder, e.g.
#   bash scripts/sweep.sh results/controls/jobs.txt; bash results/record.sh controls runs; bash results/draw.sh
#   bash results/record.sh full runs 'finished|stopped'     also what has not finished
set -euo pipefail
source "$(dirname "$0")/../scripts/venv.sh"

folder=results/$1 runs=$2 states=${3:-finished}
.venv/bin/python scripts/status.py --plan "$folder/jobs.txt" | cut -f 4 | while read -r log; do
    name=$(basename "$log" .log)
    if grep -qsE "\"state\": \"($states)\"" "$runs/$name/status.json"; then
        rm -rf "$folder/runs/$name"
        mkdir -p "$folder/runs/$name"
        cp "$runs/$name"/config.json "$runs/$name"/status.json "$runs/$name"/events.* "$folder/runs/$name"
    fi
done
echo "$folder/runs: $(ls "$folder/runs" 2> /dev/null | wc -l) runs"
