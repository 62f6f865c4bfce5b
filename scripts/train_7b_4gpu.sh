#!/usr/bin/env bash
# Pretrain `medium-7b` on the 4 GPUs of one machine: each holds 2 of the 8 experts (EP 4), ZeRO 2.
#
#   DATA="--train_file data/*.jsonl --tokenizer_name gpt2" bash scripts/train_7b_4gpu.sh --max_steps 100
#   SMOKE=1 bash scripts/train_7b_4gpu.sh         three steps of its scaled-down twin, on any machine
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

recipe=(
    --block_size 2048 --per_device_train_batch_size 4 --gradient_accumulation_steps 32  # 1 M tokens a step
    --max_steps 50000 --warmup_steps 2000 --learning_rate 3e-4
)
train medium-7b 1 4 "$@"
