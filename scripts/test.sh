#!/usr/bin/env bash
# Run the whole test suite: style, then pytest. Arguments are passed on to pytest:
#
#   bash scripts/test.sh                     everything that is not marked slow
#   bash scripts/test.sh --slow              everything
#   bash scripts/test.sh tests/unit -k rope  a part
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup_browser

.venv/bin/ruff check .
.venv/bin/ruff format --check .
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
for word in "$@"; do
    if [ -e "${word%%::*}" ]; then
        exec .venv/bin/python -m pytest "$@"
    fi
done
# Tests of one process share the cores; those that start several processes have them for themselves.
workers=$(( $(nproc) < 4 ? $(nproc) : 4 ))
status=0
.venv/bin/python -m pytest tests/unit tests/browser --numprocesses "$workers" --dist loadfile "$@" || status=$?
.venv/bin/python -m pytest tests/distributed tests/fault tests/gpu "$@" || status=$?
exit "$status"
