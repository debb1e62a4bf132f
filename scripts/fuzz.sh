#!/usr/bin/env bash
# Try random models against an oracle of their own: scripts/fuzz.sh [EXAMPLES [ARGUMENTS OF PYTEST]]
# FUZZ_SHRINK=1 looks for the smallest example that fails, which takes minutes.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
use_environment dev
export FUZZ_EXAMPLES=${1:-1000} OMP_NUM_THREADS=1
exec "$PYTHON" -m pytest --nightly -n 2 --timeout 0 --show-capture no tests/fuzz "${@:2}"
