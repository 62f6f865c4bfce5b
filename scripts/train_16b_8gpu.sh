#!/usr/bin/env bash
# Pretrain `large-16b` on the 8 GPUs of one machine: two replicas of the experts, each over 4 GPUs (EP 4 × DP 2), ZeRO 3.
#
#   DATA="--train_file data/*.jsonl --tokenizer_name gpt2" bash scripts/train_16b_8gpu.sh --max_steps 100
#   SMOKE=1 bash scripts/train_16b_8gpu.sh        three steps of its scaled-down twin, on any machine
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

recipe=(
    --block_size 4096 --per_device_train_batch_size 2 --gradient_accumulation_steps 16  # 1 M tokens a step
    --max_steps 100000 --warmup_steps 2000 --learning_rate 2.5e-4
)
train large-16b 1 8 "$@"
