#!/usr/bin/env bash
# How the other scripts start `deepspeed run_clm_moe.py`: which processes, on which devices, of which machines. Sourced.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

export TOKENIZERS_PARALLELISM=false
# DeepSpeed still calls some collectives by names that torch renames.
export PYTHONWARNINGS="ignore::FutureWarning"

# launch FLAGS…: run run_clm_moe.py in the processes that `where` names, with another environment's Python if
# LAUNCH_PYTHON names one.
launch() {
    local python=${LAUNCH_PYTHON:-$PWD/.venv/bin/python}
    PATH="$(dirname "$python"):$PATH" "$python" -m deepspeed.launcher.runner --log_level warning \
        --master_port "${MASTER_PORT:-29500}" "${where[@]}" run_clm_moe.py "$@"
}

# use_cpu PROCESSES: train without accelerators, in processes that share the cores of this machine.
use_cpu() {
    export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=
    # More threads than cores only get into each other's way.
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( $(nproc) / $1 > 0 ? $(nproc) / $1 : 1 ))}
}

# Set `where`, `processes` and `options` for a small run on this machine: an even number of accelerators, one, or two
# CPU processes.
choose_devices() {
    local accelerators
    accelerators=$(count_accelerators)
    processes=2
    options=()
    if [ "$accelerators" -ge 1 ]; then
        processes=$(( accelerators == 1 ? 1 : accelerators - accelerators % 2 ))
        options=(--bf16 True --expert_parallel_size $(( processes == 1 ? 1 : 2 )))
    else
        use_cpu "$processes"
    fi
    where=(--num_accelerators "$processes")
}

# choose_machines NODES PROCESSES: set `where` for a recipe that takes so many machines with so many processes each.
choose_machines() {
    local nodes=$1 processes=$2 accelerators hostfile node
    if [ -n "${NODE_RANK:-}" ]; then
        hostfile=$(mktemp)
        trap "rm -f '$hostfile'" EXIT
        for ((node = 0; node < nodes; node++)); do
            echo "node$node slots=$processes"
        done >"$hostfile"
        where=(--hostfile "$hostfile" --no_ssh --node_rank "$NODE_RANK"
            --master_addr "${MASTER_ADDR:?is the address of the machine with NODE_RANK=0; set it on all machines}")
    elif [ -n "${HOSTFILE:-}" ]; then
        where=(--hostfile "$HOSTFILE" --num_nodes "$nodes" --num_accelerators "$processes"
            ${MASTER_ADDR:+--master_addr "$MASTER_ADDR"})
        return  # this machine need not be one of those that train
    elif [ "$nodes" -eq 1 ] || [ -n "${SMOKE:-}" ]; then
        processes=$((nodes * processes))
        where=(--num_accelerators "$processes")
    else
        echo "error: this takes $nodes machines with $processes accelerators each; give HOSTFILE=…, or on every" \
            "machine NODE_RANK=… MASTER_ADDR=…, or try it scaled down with SMOKE=1." >&2
        exit 2
    fi
    accelerators=$(count_accelerators)
    if [ "$accelerators" -lt "$processes" ]; then
        if [ -z "${SMOKE:-}" ]; then
            echo "error: this takes $processes accelerators and there are $accelerators here;" \
                "try it scaled down with SMOKE=1." >&2
            exit 2
        fi
        use_cpu "$processes"
    fi
}

# scale_down PRESET: add to `flags` what makes a trial of the twin: three short steps on the embedded corpus.
scale_down() {
    local twin=runs/smoke/$1.json
    mkdir -p runs/smoke
    # Renamed into place, because other machines may be reading it.
    .venv/bin/moe-hf presets --scaled_down "$1" >"$twin.$$"
    mv "$twin.$$" "$twin"
    flags+=(
        --config_name "$twin" --output_dir "runs/smoke/$1" --overwrite_output_dir True
        --block_size 64 --max_train_samples 128 --per_device_train_batch_size 2 --gradient_accumulation_steps 1
        --max_steps 3 --learning_rate 1e-2 --warmup_steps 0 --logging_steps 1 --save_steps 3
    )
}

# train PRESET NODES PROCESSES FLAGS…: pretrain a preset with its own DeepSpeed JSON, the script's `recipe`, and FLAGS.
train() {
    local preset=$1 nodes=${NODES:-$2} processes=${GPUS_PER_NODE:-$3} data
    shift 3
    flags=(
        --config_name "$preset" --deepspeed "ds_configs/$preset.json" --output_dir "runs/$preset"
        --do_train True --bf16 True --gradient_checkpointing True
        --lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs '{"min_lr_rate": 0.1}'
        --weight_decay 0.1 --adam_beta2 0.95 --max_grad_norm 1.0
        --logging_steps 10 --save_steps 1000 --save_total_limit 2 --disable_tqdm True
        "${recipe[@]}"
    )
    if [ -n "${SMOKE:-}" ]; then
        scale_down "$preset"
    else
        read -ra data <<<"${DATA:-}"
        flags+=("${data[@]}")
    fi
    choose_machines "$nodes" "$processes"
    launch "${flags[@]}" "$@"
}
