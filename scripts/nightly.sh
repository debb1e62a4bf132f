#!/usr/bin/env bash
# Set up .venv and run what takes long: every architecture of the zoo, then the other tests marked nightly.  Prints a table
# of the zoo, and writes it where docs/limits.md has its numbers from.  Arguments go to pytest, both times; PYTHON and NO_VENV
# are described in environment.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
use_environment dev
export OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1
status=0
"$PYTHON" -m pytest tests/test_zoo.py --nightly --zoo-results benchmarks/results/zoo.json "$@" || status=$?
"$PYTHON" -m pytest tests --ignore=tests/test_zoo.py --nightly -m nightly "$@" || status=$?
exit "$status"
