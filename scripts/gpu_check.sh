#!/usr/bin/env bash
# Test and measure on a GPU, in under nine minutes, also on a machine without a network.
#
#   bash scripts/gpu_check.sh                   tests marked gpu, and the suites layer and step of benchmarks/
#   bash scripts/gpu_check.sh tests             only the former
#   bash scripts/gpu_check.sh benchmarks
#
# Every part has a limit; one that comes to it is stopped and leaves what it has. Results are in benchmarks/results/.
# Uses .venv where there is one, else $PYTHON or python3 with the packages installed there, and besides those of wheels/,
# which scripts/gpu_wheels.sh fills on a machine with a network. Tested with Python 3.12, torch 2.11, Transformers 5.17.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly most_seconds=525 results=benchmarks/results
parts=${1:-all}
python=${PYTHON:-python3}
if [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "error: torch sees no CUDA device here, so there is nothing to check or to measure." >&2
    exit 1
fi
if compgen -G 'wheels/*.whl' >/dev/null; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" wheels/*.whl
    export PYTHONPATH="$site:$PYTHONPATH"
fi

mkdir -p "$results"
"$python" - <<'PY' | tee "$results/machine.txt"
import deepspeed, torch, transformers

device = torch.cuda.get_device_name()
print(f"{device}, torch {torch.__version__}, deepspeed {deepspeed.__version__}, transformers {transformers.__version__}")
PY
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

summary="" failed=0
# part NAME SECONDS COMMAND…: run a command for at most so long, and no longer than is left of all.
part() {
    local name=$1 limit=$2 left=$((most_seconds - SECONDS)) status=0 began=$SECONDS verdict
    shift 2
    if [ "$left" -lt 15 ]; then
        summary+="$name: not begun, no time was left"$'\n'
        return
    fi
    echo "== $name" >&2
    timeout --signal=TERM --kill-after=10 "$((limit < left - 10 ? limit : left - 10))" "$@" || status=$?
    case $status in
        0) verdict=done ;;
        124 | 137) verdict="stopped at its limit" ;;
        *) verdict="FAILED with $status" failed=1 ;;
    esac
    summary+="$name: $verdict, $((SECONDS - began)) s"$'\n'
}

# measure NAME SECONDS WORDS…: run benchmarks; the table goes to a file, and is shown.
measure() {
    local name=$1 limit=$2
    shift 2
    part "$name" "$limit" "$python" -m benchmarks.run --device cuda "$@" --output "$results/$name.json" \
        >"$results/$name.md" 2> >(tee "$results/$name.log" >&2)
    cat "$results/$name.md"
}

# test_files NAME SECONDS FILE…: run tests marked gpu.
test_files() {
    local name=$1 limit=$2
    shift 2
    [ $# -eq 0 ] || part "$name" "$limit" "$python" -m pytest "$@" -m gpu --durations=5 -p no:cacheprovider
}

# Kernels in one process are tested first, what launches training last: it takes longest.
mapfile -t quick < <(grep -rl --include='test_*.py' 'mark\.gpu' tests | grep -v '^tests/gpu/' | sort)
case $parts in
    all)
        test_files kernels 90 "${quick[@]}"
        measure layer 120 --suite layer
        measure step 170 --suite step --peers mixtral/grouped_mm,mixtral/liger,autoep
        test_files training "$most_seconds" tests/gpu
        ;;
    tests)
        test_files kernels 120 "${quick[@]}"
        test_files training "$most_seconds" tests/gpu
        ;;
    benchmarks)
        measure layer 180 --suite layer
        measure step 330 --suite step --peers mixtral/eager,mixtral/grouped_mm,mixtral/liger,autoep,autoep/best
        ;;
    *)
        echo "error: $parts is not a part; there are all, tests and benchmarks." >&2
        exit 2
        ;;
esac
printf '\n%s' "$summary" | tee "$results/summary.txt"
exit "$failed"
