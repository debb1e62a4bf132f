#!/usr/bin/env bash
# Set up .venv and run what takes long: every architecture of the zoo.  Prints a table, and writes it where README.md's
# numbers come from.  Arguments go to pytest; PYTHON and NO_VENV are described in environment.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
use_environment dev
export OMP_NUM_THREADS=1
exec "$PYTHON" -m pytest tests/test_zoo.py --nightly --zoo-results benchmarks/results/zoo.json "$@"
