#!/usr/bin/env bash
# Test and measure on a GPU, in under nine minutes, also on a machine without a network.
#
#   bash scripts/gpu_check.sh                   tests of kernels, the suites layer and step of benchmarks/, some training
#   bash scripts/gpu_check.sh tests             all tests marked gpu: the same, and training with every shipped JSON
#   bash scripts/gpu_check.sh benchmarks        the two suites beside more peers, and the suite scaling
#
# Every part has a limit; one that comes to it is stopped and leaves what it has. Results are in benchmarks/results/. The
# exit status is 1 where a test or a benchmark failed, or tests were left over: what was not run has not passed.
# Uses .venv where there is one, else $PYTHON or python3 with the packages installed there, and besides those of wheels/,
# which scripts/gpu_wheels.sh fills on a machine with a network. Written for Python 3.12, torch 2.11, Transformers 5.17.
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

summary="" failed=0 whole=yes
# part NAME SECONDS SIGNAL COMMAND…: run a command for at most so long, and no longer than is left of all, then send it
# the signal; `whole` says whether it came to its end.
part() {
    local name=$1 limit=$2 signal=$3 left=$((most_seconds - SECONDS - 10)) status=0 began=$SECONDS verdict
    shift 3
    whole=no
    if [ "$left" -lt 5 ]; then
        summary+="$name: not begun, no time was left"$'\n'
        return
    fi
    echo "== $name" >&2
    limit=$((limit < left ? limit : left))
    timeout --signal="$signal" --kill-after=10 "$limit" "$@" || status=$?
    # Killed before its limit, it took too much memory.
    if [ "$status" -eq 124 ] || { [ "$status" -eq 137 ] && [ "$((SECONDS - began))" -ge "$limit" ]; }; then
        verdict="stopped at its limit"
    else
        whole=yes verdict=done
        [ "$status" -eq 0 ] || verdict="FAILED with $status" failed=1
    fi
    summary+="$name: $verdict, $((SECONDS - began)) s"$'\n'
}

# measure NAME SECONDS WORDS…: run benchmarks; the table goes to a file, and is shown.
measure() {
    local name=$1 limit=$2
    shift 2
    part "$name" "$limit" TERM "$python" -m benchmarks.run --device cuda "$@" --output "$results/$name.json" \
        >"$results/$name.md" 2> >(tee "$results/$name.log" >&2)
    cat "$results/$name.md"
}

# test_files NAME SECONDS FILE…: run the tests marked gpu.
test_files() {
    local name=$1 limit=$2
    shift 2
    # Interrupted, pytest still tells which tests have failed.
    part "$name" "$limit" INT "$python" -m pytest "$@" -m gpu --verbose --durations=5 -p no:cacheprovider
    [ "$whole" = yes ] && return
    summary+="$name: FAILED, because not all of its tests were run; with more time: $python -m pytest -m gpu ${*@Q}"$'\n'
    failed=1
}

# Of each suite who matters most comes first, and the least important is what time cuts off. All families have the same
# kernel of Liger in a layer, which would be tuned once for each.
readonly layer_peers=scattermoe,sonicmoe,mixtral/grouped_mm,mixtral/liger,autoep,autoep/best,mixtral/sonicmoe
readonly more_layer_peers=$layer_peers,megablocks,tutel,mixtral/eager
readonly step_peers=mixtral/grouped_mm,olmoe/grouped_mm,qwen3_moe/grouped_mm,ours/liger,mixtral/liger,qwen3_moe/liger
readonly more_step_peers=autoep,autoep/best,ours/sonicmoe,ours/compiled,mixtral/eager

# Nothing is measured before it is known to be right, so kernels are tested first. Each of the trainings is a launch of
# its own, of some 20 seconds: there is time for all of them only where nothing is measured.
readonly training=tests/gpu/test_gpu.py
readonly trained="$training::test_a_shipped_json_trains_exports_and_generates"
quick=(tests/gpu/test_experts_triton.py tests/gpu/test_liger.py "$training::test_cuda_gives_the_losses_of_the_cpu")
case $parts in
    all)
        test_files kernels 140 "${quick[@]}"
        measure layer 90 --suite layer --peers "$layer_peers"
        measure step 210 --suite step --rounds 6 --peers "$step_peers"
        test_files training "$most_seconds" "$trained[zero3_ep.json-sdpa]" "$trained[zero2_ep.json-sdpa]"
        ;;
    tests)
        test_files kernels 140 "${quick[@]}"
        test_files training "$most_seconds" "$training"
        ;;
    benchmarks)
        measure step 240 --suite step --peers "$step_peers"
        measure layer 120 --suite layer --peers "$more_layer_peers"
        measure more_steps 110 --suite step --rounds 6 --peers "$more_step_peers"
        measure scaling "$most_seconds" --suite scaling
        ;;
    *)
        echo "error: $parts is not a part; there are all, tests and benchmarks." >&2
        exit 2
        ;;
esac
printf '\n%s' "$summary" | tee "$results/summary.txt"
exit "$failed"
