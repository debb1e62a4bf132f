#!/usr/bin/env bash
# Let compute-sanitizer watch every kernel on a Hopper GPU: memcheck, racecheck and initcheck, or the tools that are
# named.  What each says is left in build/sanitizer/TOOL.txt; ARGUMENTS of benchmarks/all_kernels.py follow "--".
#     scripts/sanitize.sh [TOOL ...] [-- --all]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
use_environment dev
if ! command -v compute-sanitizer > /dev/null; then
  echo "there is no compute-sanitizer on PATH: it comes with the CUDA toolkit (cuda-sanitizer)" >&2
  exit 2
fi
TOOLS=()
while [ $# -gt 0 ] && [ "$1" != "--" ]; do
  TOOLS+=("$1")
  shift
done
[ $# -gt 0 ] && shift
[ ${#TOOLS[@]} -gt 0 ] || TOOLS=(memcheck racecheck initcheck)
mkdir -p build/sanitizer
# Kernels are compiled before: what is watched is slow.  PyTorch's allocator would hide what lies between two tensors.
"$PYTHON" benchmarks/all_kernels.py "$@"
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
STATUS=0
for TOOL in "${TOOLS[@]}"; do
  SAID=build/sanitizer/$TOOL.txt
  compute-sanitizer --tool "$TOOL" --error-exitcode 1 --print-limit 1000 \
    "$PYTHON" benchmarks/all_kernels.py "$@" > "$SAID" 2>&1 || STATUS=1
  echo "== $TOOL: $(grep -E 'SUMMARY' "$SAID" | tail -1 || true)"
  # Each kind of report once, with how often it came and the kernel.
  grep -E '^========= (Error|Warning|Invalid|Uninitialized|Race)' "$SAID" | sed -E 's/0x[0-9a-f]+/0x…/g' | sort | uniq -c || true
done
exit "$STATUS"
