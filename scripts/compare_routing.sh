#!/usr/bin/env bash
# Train the same small mixture of experts with several ways of balancing, on the same data from the same seed, and lay
# the runs side by side: a table on the console, a page and figures in runs/compare_routing/report.
#
#   bash scripts/compare_routing.sh                          six methods
#   bash scripts/compare_routing.sh aux_loss_sequence none   those that are named
#
# Runs on all local accelerators, or in two CPU processes where there is none. STEPS=50 makes it shorter, OUTPUT=… names
# another folder.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

declare -A overrides=(
    [aux_loss_global]="router_balancing=aux_loss,router_aux_loss_scope=global"
    [aux_loss_local]="router_balancing=aux_loss,router_aux_loss_scope=local"
    [aux_loss_sequence]="router_balancing=aux_loss,router_aux_loss_scope=sequence"
    [loss_free]="router_balancing=loss_free"
    [sinkhorn]="router_balancing=sinkhorn"
    [dropping]="router_balancing=aux_loss,expert_capacity_factor=1.0"
    [none]="router_balancing=none"
)
methods=("$@")
if [ $# -eq 0 ]; then
    methods=(aux_loss_global aux_loss_local loss_free sinkhorn dropping none)
fi
for method in "${methods[@]}"; do
    if [ -z "${overrides[$method]:-}" ]; then
        echo "error: there is no method '$method'; choose among: ${!overrides[*]}" >&2
        exit 2
    fi
done

folder=${OUTPUT:-runs/compare_routing}
choose_devices

runs=()
for method in "${methods[@]}"; do
    echo "== $method: ${overrides[$method]}"
    launch \
        --config_name quickstart --config_overrides "${overrides[$method]}" \
        --deepspeed ds_configs/zero3_ep.json \
        --output_dir "$folder/$method" --overwrite_output_dir \
        --block_size 256 --per_device_train_batch_size 4 --per_device_eval_batch_size 8 \
        --max_steps "${STEPS:-120}" --learning_rate 3e-3 --lr_scheduler_type cosine --warmup_steps 20 \
        --weight_decay 0.1 --adam_beta2 0.95 --seed 42 --logging_steps 10 --dead_expert_steps 20 --save_strategy no --disable_tqdm True \
        --do_train --do_eval --max_eval_samples 128 \
        "${options[@]}"
    runs+=("$folder/$method")
done

.venv/bin/moe-hf report "${runs[@]}" --output "$folder/report"
