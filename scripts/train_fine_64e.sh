#!/usr/bin/env bash
# Pretrain `fine-64e` on the 8 GPUs of one machine: each holds 8 of the 64 small experts of a layer (EP 8), ZeRO 2.
#
#   DATA="--train_file data/*.jsonl --tokenizer_name gpt2" bash scripts/train_fine_64e.sh --max_steps 100
#   bash scripts/train_fine_64e.sh --config_overrides expert_capacity_factor=1.0    drops what an expert cannot hold
#   SMOKE=1 bash scripts/train_fine_64e.sh        three steps of its scaled-down twin, on any machine
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

recipe=(
    --block_size 2048 --per_device_train_batch_size 8 --gradient_accumulation_steps 4  # 0.5 M tokens a step
    --max_steps 100000 --warmup_steps 2000 --learning_rate 4e-4
)
train fine-64e 1 8 "$@"
