#!/usr/bin/env bash
# Pretrain `olmoe-1b-7b` on the 8 GPUs of one machine: each holds 8 of the 64 experts of a layer (EP 8), ZeRO 2.
#
#   DATA="--train_file data/*.jsonl --tokenizer_name gpt2" bash scripts/train_olmoe_1b_7b.sh --max_steps 100
#   SMOKE=1 bash scripts/train_olmoe_1b_7b.sh     three steps of its scaled-down twin, on any machine
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

recipe=(
    --block_size 4096 --per_device_train_batch_size 4 --gradient_accumulation_steps 8  # 1 M tokens a step
    --max_steps 250000 --warmup_steps 2000 --learning_rate 4e-4
)
train olmoe-1b-7b 1 8 "$@"
