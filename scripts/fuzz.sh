#!/usr/bin/env bash
# Try random models and scripts against an oracle of their own, in parallel, with a summary in
# benchmarks/results/fuzz.json: scripts/fuzz.sh [EXAMPLES [ARGUMENTS]], see benchmarks/fuzzing.py --help.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
use_environment dev
export OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1
exec "$PYTHON" benchmarks/fuzzing.py "${1:-1000}" "${@:2}"
