#!/usr/bin/env bash
# Pretrain `small-1.3b` on one GPU. docs/recipes.md says what the variables mean.
#
#   DATA="--train_file data/*.jsonl --tokenizer_name gpt2" bash scripts/train_single_gpu.sh --max_steps 100
#   SMOKE=1 bash scripts/train_single_gpu.sh      three steps of its scaled-down twin, on any machine
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

recipe=(
    --block_size 2048 --per_device_train_batch_size 8 --gradient_accumulation_steps 16  # 0.26 M tokens a step
    --max_steps 100000 --warmup_steps 2000 --learning_rate 4e-4
)
train small-1.3b 1 1 "$@"
