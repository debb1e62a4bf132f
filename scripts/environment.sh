# Sourced by train.sh and test.sh.  `use_environment EXTRA` goes to the repository root, makes sure that the package and
# its EXTRA are installed there in .venv, and puts .venv/bin first on PATH.  Quick when nothing changed.
#
# PYTHON=python3.12   the interpreter that .venv is made from (default: python3)
# NO_VENV=1           install nothing: use PYTHON as it is, with this checkout on PYTHONPATH

use_environment() {
  local extra=$1 python=${PYTHON:-python3} stamp
  cd "$(dirname "${BASH_SOURCE[0]}")/.."
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10) and "sparse_compile needs Python 3.10 or newer")'

  if [ "${NO_VENV:-0}" = 1 ]; then
    export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
    PYTHON=$python
    return
  fi

  stamp=.venv/installed-$extra
  if [ ! -x .venv/bin/python ]; then
    "$python" -m venv .venv
  fi
  export VIRTUAL_ENV=$PWD/.venv PATH=$PWD/.venv/bin:$PATH
  # Without files of compiled modules each process would compile all of torch that it imports.
  unset PYTHONHOME PYTHONPATH PYTHONDONTWRITEBYTECODE
  PYTHON=.venv/bin/python
  if ! cat constraints.txt pyproject.toml | cmp -s - "$stamp"; then
    echo "installing torch, then sparse_compile[$extra], into .venv (minutes where torch must be downloaded)"
    # torch first and pinned, so that no later requirement can pull in another build of it.  Not compiled: most modules
    # are never imported, and those that are, Python compiles then.
    local install=("$PYTHON" -m pip install --quiet --quiet --no-compile --constraint constraints.txt)
    "${install[@]}" --upgrade pip  # which resolves in half of the time of the one that comes with Python 3.11
    "${install[@]}" torch setuptools
    # Beside pip, which leaves a core idle: what each of the first processes would compile of torch, 10 s each; and, as
    # the tests need them (tests/warm.py), the headers of the code that Inductor generates for CPUs.
    local modules="_inductor.compile_fx, torch._inductor.lowering, torch._inductor.fx_passes.joint_graph"
    modules+=", torch.distributed.fsdp, torch.distributed.checkpoint.state_dict, torch.distributed.run"
    local first="import torch.$modules"
    [ "$extra" != dev ] || first+=$'\n'"torch.compile(torch.sin)(torch.ones(16))"
    OMP_NUM_THREADS=1 TORCHINDUCTOR_VEC_ISA_OK=0 "$PYTHON" -c "$first" > /dev/null 2>&1 &
    local compiled=$!
    "${install[@]}" --no-build-isolation --editable ".[$extra]"
    wait "$compiled" || true  # if it failed, they still do
    cat constraints.txt pyproject.toml > "$stamp"
  fi
}
