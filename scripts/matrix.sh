#!/usr/bin/env bash
# Run the default tests with every supported Python and PyTorch, on CPUs, and print a table of what came of them, which
# is left in build/matrix/results.md beside what each run said: scripts/matrix.sh [ARGUMENTS OF PYTEST]
#
# PYTHONS="3.10 3.13"   versions; each needs pythonX.Y on PATH, or one of pyenv (default: 3.10 to 3.13)
# TORCHES="2.12.1"      versions of torch (default: 2.11.0 2.12.1 2.13.0)
# TORCH_INDEX=URL       where torch for CPUs is (default: PyTorch's own; "" takes what pip is configured for)
#
# Each pair has its environment in build/matrix, which a second call uses again; where torch must be downloaded for
# CUDA, it takes several GB.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHONS=${PYTHONS:-3.10 3.11 3.12 3.13}
TORCHES=${TORCHES:-2.11.0 2.12.1 2.13.0}
TORCH_INDEX=${TORCH_INDEX-https://download.pytorch.org/whl/cpu}
# What torch for CUDA asks for; torch for CPUs asks for none.
declare -A TRITONS=([2.11]=3.6.0 [2.12]=3.7.1 [2.13]=3.7.1)
MATRIX=$PWD/build/matrix RESULTS=$PWD/build/matrix/results.md
mkdir -p "$MATRIX"
export OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1
unset PYTHONHOME PYTHONPATH PYTHONDONTWRITEBYTECODE

interpreter() { # of a version, the path of one that runs: pyenv puts a "python3.10" on PATH that may not
  local path
  for path in "$(command -v "python$1")" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$1".*/bin/"python$1"; do
    if "$path" -c '' 2> /dev/null; then
      echo "$path"
      return
    fi
  done
}

install() { # into an environment, with an interpreter and a version of torch
  local folder=$1 python=$2 torch=$3
  [ -f "$folder/installed" ] && return
  rm -rf "$folder"
  "$python" -m venv "$folder" || return
  # The other pins hold for every torch, but for setuptools, of which 2.11 asks for an older one.
  grep -v -E '^(torch|triton|setuptools)==' constraints.txt > "$folder/constraints.txt"
  printf 'torch==%s\ntriton==%s\n' "$torch" "${TRITONS[${torch%.*}]}" >> "$folder/constraints.txt"
  local pip=("$folder/bin/python" -m pip install --quiet --no-compile --constraint "$folder/constraints.txt")
  "${pip[@]}" ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch || return
  "${pip[@]}" --upgrade 'setuptools>=77,<82' || return # what our build and torch 2.11 take
  "${pip[@]}" --no-build-isolation --editable '.[dev]' || return
  touch "$folder/installed"
}

STATUS=0
{
  echo "default tests on CPUs, $(date +%F), $(git describe --always --dirty)"
  echo
  echo "| Python | torch | Triton | result | private names that are missing |"
  echo "| --- | --- | --- | --- | --- |"
} | tee "$RESULTS"
for VERSION in $PYTHONS; do
  for TORCH in $TORCHES; do
    NAME=py$VERSION-torch$TORCH
    ENVIRONMENT=$MATRIX/$NAME SAID=$MATRIX/$NAME.txt MISSING=
    TRITON=${TRITONS[${TORCH%.*}]:-unknown}
    PYTHON=$(interpreter "$VERSION")
    if [ -z "$PYTHON" ]; then
      RESULT="there is no python$VERSION"
    elif ! install "$ENVIRONMENT" "$PYTHON" "$TORCH" > "$SAID" 2>&1; then
      RESULT="not installed: $(grep -v '^$' "$SAID" | tail -1 | cut -c1-100 | tr '|' ' ')"
    else
      # One line names the private names of PyTorch that this version lacks: most failures follow from them.
      MISSING=$("$ENVIRONMENT/bin/python" -c \
        'from sparse_compile.torch_internals.private_names import self_test; print(", ".join(self_test()) or "none")' \
        2>> "$SAID" | tail -1)
      "$ENVIRONMENT/bin/python" -m pytest -q -n 2 --dist=worksteal -p no:cacheprovider "$@" >> "$SAID" 2>&1 || STATUS=1
      RESULT=$(tail -1 "$SAID" | tr -d '=' | tr '|' ' ')
    fi
    case $RESULT in *passed*) ;; *) STATUS=1 ;; esac
    echo "| $VERSION | $TORCH | $TRITON | $RESULT | $MISSING |" | tee -a "$RESULTS"
  done
done
exit "$STATUS"
