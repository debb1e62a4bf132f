#!/usr/bin/env bash
# Set up .venv and run the main job: train a small GPT dense and with backend="sste", and compare.
# Arguments go to examples/train_gpt.py; PYTHON and NO_VENV are described in environment.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
use_environment train
exec "$PYTHON" examples/train_gpt.py "$@"
