#!/usr/bin/env bash
# Run the whole test suite: style, then pytest. Arguments are passed on to pytest:
#
#   bash scripts/test.sh                     everything that is not marked slow
#   bash scripts/test.sh --slow              everything
#   bash scripts/test.sh tests/unit -k rope  a part
#   bash scripts/test.sh --matrix            the suite on the oldest and newest Transformers and the oldest DeepSpeed;
#                                            words after it are passed on as well
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
source scripts/test_matrix.sh

# Run what the words after the first, the Python to use, name.
run_suite() {
    local python=$1 word status=0
    shift
    for word in "$@"; do
        if [ -e "${word%%::*}" ]; then
            "$python" -m pytest "$@"
            return
        fi
    done
    # Tests of one process share the cores; those that start several processes have them for themselves.
    local workers=$(( $(nproc) < 4 ? $(nproc) : 4 ))
    "$python" -m pytest tests/unit tests/browser --numprocesses "$workers" --dist loadfile "$@" || status=$?
    "$python" -m pytest tests/distributed tests/fault tests/gpu "$@" || status=$?
    return "$status"
}

setup_venv test
setup_browser
if [[ " $* " == *" --slow "* ]]; then
    setup_ssh
    setup_libaio
fi
.venv/bin/ruff check .
.venv/bin/ruff format --check .
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
if [ "${1:-}" = --matrix ]; then
    shift
    run_matrix "$@"
else
    run_suite .venv/bin/python "$@"
fi
