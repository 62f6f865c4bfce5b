#!/usr/bin/env bash
# Train a dense model and a mixture of experts with the same active parameters per token, after nanoGPT: on the same data
# from the same seed, with the same batches and learning rate. Then lay the two side by side: a table on the console, a
# page and figures in runs/compare_dense_moe/SIZE/report.
#
#   bash scripts/compare_dense_moe.sh 5m          gpt-5m and moe-5m; also 40m, 124m and 350m
#   STEPS=150 DATA="--train_file data/*.jsonl" bash scripts/compare_dense_moe.sh 40m --learning_rate 1e-3
#   SMOKE=1 bash scripts/compare_dense_moe.sh 124m        three steps of the scaled-down twins
#
# Runs on all local accelerators, or in two CPU processes where there is none.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

# Sequences per step over all processes, and per process at once; the longest sequence; the learning rate.
size=${1:-}
case "$size" in
    5m) batch=64 at_once=16 block_size=256 learning_rate=1e-3 ;;
    40m) batch=64 at_once=8 block_size=512 learning_rate=6e-4 ;;
    124m) batch=480 at_once=12 block_size=1024 learning_rate=6e-4 ;;
    350m) batch=480 at_once=6 block_size=1024 learning_rate=3e-4 ;;
    *)
        echo "error: there is no size '$size'; choose among: 5m 40m 124m 350m" >&2
        exit 2
        ;;
esac
shift
steps=${STEPS:-5000}
read -ra data <<<"${DATA:-}"
choose_devices

runs=()
for family in gpt moe; do
    preset=$family-$size
    folder=runs/compare_dense_moe/$size/$preset
    flags=(
        --config_name "$preset" --deepspeed ds_configs/zero2_ep.json --output_dir "$folder" --overwrite_output_dir True
        --block_size "$block_size" --per_device_train_batch_size "$at_once" --per_device_eval_batch_size "$at_once"
        --gradient_accumulation_steps $(( (batch + at_once * processes - 1) / (at_once * processes) ))
        --max_steps "$steps" --warmup_steps $((steps / 10)) --learning_rate "$learning_rate"
        --lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs '{"min_lr_rate": 0.1}'
        --weight_decay 0.1 --adam_beta2 0.95 --seed 42 --logging_steps 10 --save_strategy no --disable_tqdm True
        --do_train True --do_eval True --eval_strategy steps --eval_steps $((steps / 10)) --max_eval_samples 256
    )
    if [ -n "${SMOKE:-}" ]; then
        scale_down "$preset"
        folder=runs/smoke/$preset
        flags+=(--save_strategy no --eval_steps 3)
    else
        flags+=("${data[@]}")
    fi
    flags+=("${options[@]}")
    if [ "$family" = gpt ]; then
        flags+=(--expert_parallel_size 0)
    fi
    echo "== $preset"
    launch "${flags[@]}" "$@"
    runs+=("$folder")
done

.venv/bin/moe-hf report "${runs[@]}" --output "$(dirname "${runs[0]}")/report"
