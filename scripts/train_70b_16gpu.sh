#!/usr/bin/env bash
# Pretrain `xlarge-70b` on two machines with 8 GPUs each: the experts over the GPUs of a machine (EP 8 × DP 2), ZeRO 3,
# the optimizer in host memory. Either from one machine that reaches all by ssh, or the same on each of them without:
#
#   HOSTFILE=hosts bash scripts/train_70b_16gpu.sh
#   NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash scripts/train_70b_16gpu.sh    and on the other machine NODE_RANK=1
#   SMOKE=1 bash scripts/train_70b_16gpu.sh       three steps of its scaled-down twin, in 16 processes of any machine
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

recipe=(
    --block_size 4096 --per_device_train_batch_size 2 --gradient_accumulation_steps 16  # 2 M tokens a step
    --max_steps 250000 --warmup_steps 2000 --learning_rate 1.5e-4
)
train xlarge-70b 2 8 "$@"
