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
    # nproc counts threads of OpenMP where they are set. Starting processes leaves cores idle half of the time, so two
    # files of tests that start several go side by side, but none beside those of 16 ranks.
    local cores launches=2
    cores=$(env -u OMP_NUM_THREADS nproc)
    [[ " $* " == *" --slow "* ]] && launches=0
    "$python" -m pytest tests/unit tests/browser -n $(( cores < 4 ? cores : 4 )) --dist loadfile "$@" || status=$?
    "$python" -m pytest tests/distributed tests/fault tests/gpu -n "$launches" --dist loadfile "$@" || status=$?
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
