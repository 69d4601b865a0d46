#!/usr/bin/env bash
# Lint and tests:
#   bash scripts/test.sh        everything
#   bash scripts/test.sh fast   only the quick ones, a minute
# Further arguments go to pytest, e.g. bash scripts/test.sh -k replay
set -euo pipefail
source "$(dirname "$0")/venv.sh"

.venv/bin/ruff check .
.venv/bin/ruff format --check --quiet .
if [[ ${1:-} == fast ]]; then
    shift
    set -- -m "not slow" "$@"
fi
# Three, since many tests wait for a process: two cores are busy then.
exec .venv/bin/python -m pytest -n 3 --dist worksteal "$@"
