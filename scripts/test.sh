#!/usr/bin/env bash
# Set up .venv and run all checks and tests.
# Arguments go to pytest; PYTHON and NO_VENV are described in environment.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
use_environment dev
WORKERS=() CHECKS=
if [ "${NO_VENV:-0}" = 1 ]; then
  echo "NO_VENV=1: tests only; ruff, mypy and codespell run where .venv is set up"
else
  # Beside the tests, since each of them leaves a core idle; what they say is shown at the end.
  SAID=$(mktemp)
  pre-commit run --all-files --show-diff-on-failure > "$SAID" 2>&1 &
  CHECKS=$!
  # Two tests at a time, as many wait for processes that they start; of one thread each, or two cores have four to run.
  # A worker that has none left takes half of the other's.  Inductor would start a pool of processes in each process.
  WORKERS=(-n 2 --dist=worksteal)
  export OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1
fi
STATUS=0
"$PYTHON" -m pytest "${WORKERS[@]}" "$@" || STATUS=$?
if [ -n "$CHECKS" ]; then
  wait "$CHECKS" || STATUS=1
  cat "$SAID"
  rm "$SAID"
fi
exit "$STATUS"
