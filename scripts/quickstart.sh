#!/usr/bin/env bash
# From nothing to generated text: install, train a 5 M mixture of experts with expert parallelism and ZeRO-3 on the
# source of Python's standard library, export it, load the export in a fresh process, check it, let it write.
#
#   bash scripts/quickstart.sh
#
# Runs on all local accelerators, or in two CPU processes where there is none. STEPS=50 makes it shorter, OUTPUT=… names
# another folder for the run.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

output_dir=${OUTPUT:-runs/quickstart}
choose_devices

echo "1/3 Training the preset 'quickstart' in $processes processes: ZeRO-3, expert parallelism."
launch \
    --config_name quickstart \
    --deepspeed ds_configs/zero3_ep.json \
    --output_dir "$output_dir" --overwrite_output_dir \
    --block_size 256 --per_device_train_batch_size 8 --per_device_eval_batch_size 8 \
    --max_steps "${STEPS:-250}" --learning_rate 3e-3 --lr_scheduler_type cosine --warmup_steps 20 \
    --weight_decay 0.1 --adam_beta2 0.95 --logging_steps 10 --save_steps 125 --save_total_limit 1 \
    --do_train --do_eval --max_eval_samples 128 \
    "${options[@]}"

echo
echo "2/3 Loading the export in a fresh process, 3/3 checking and generating."
.venv/bin/python scripts/quickstart_summary.py "$output_dir"
