#!/usr/bin/env bash
# From nothing to generated text: install, train a 5 M mixture of experts with expert parallelism and ZeRO-3 on the
# source of Python's standard library, export it, load the export in a fresh process, check it, let it write.
#
#   bash scripts/quickstart.sh
#
# Runs on all local accelerators, or in two CPU processes where there is none. STEPS=50 makes it shorter.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

output_dir=runs/quickstart
accelerators=$(count_accelerators)
options=()
if [ "$accelerators" -ge 2 ]; then
    processes=$((accelerators - accelerators % 2))
    options+=(--bf16 True)
elif [ "$accelerators" -eq 1 ]; then
    processes=1
    options+=(--bf16 True --expert_parallel_size 1)
else
    processes=2
    export DS_ACCELERATOR=cpu
    # Two processes on the cores of one machine: more threads than cores only get into each other's way.
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( $(nproc) / 2 > 0 ? $(nproc) / 2 : 1 ))}
fi
export TOKENIZERS_PARALLELISM=false
# DeepSpeed still calls some collectives by names that torch renames.
export PYTHONWARNINGS="ignore::FutureWarning"

echo "1/3 Training the preset 'quickstart' in $processes processes: ZeRO-3, expert parallelism."
PATH="$PWD/.venv/bin:$PATH" .venv/bin/deepspeed --log_level warning --num_accelerators "$processes" \
    run_clm_moe.py \
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
