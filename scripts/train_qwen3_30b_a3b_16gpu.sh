#!/usr/bin/env bash
# Pretrain `qwen3-30b-a3b` on two machines with 8 GPUs each: 16 of the 128 experts of a layer per GPU (EP 8 × DP 2),
# ZeRO 3. Either from one machine that reaches all by ssh, or the same on each of them without:
#
#   HOSTFILE=hosts bash scripts/train_qwen3_30b_a3b_16gpu.sh
#   NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash scripts/train_qwen3_30b_a3b_16gpu.sh    and on the other machine NODE_RANK=1
#   SMOKE=1 bash scripts/train_qwen3_30b_a3b_16gpu.sh   three steps of its scaled-down twin, in 16 processes
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

recipe=(
    --block_size 4096 --per_device_train_batch_size 2 --gradient_accumulation_steps 16  # 2 M tokens a step
    --max_steps 250000 --warmup_steps 2000 --learning_rate 2e-4
)
train qwen3-30b-a3b 2 8 "$@"
