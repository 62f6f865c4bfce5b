#!/usr/bin/env python
"""Train a mixture-of-experts language model, export it in Hugging Face format, evaluate it.

On a laptop, two CPU processes sharing the experts of the 5 M preset:

    deepspeed --num_accelerators 2 run_clm_moe.py --config_name quickstart --deepspeed ds_configs/zero3_ep.json \
        --do_train --do_eval --max_steps 100 --output_dir runs/laptop

On eight GPUs, with expert parallelism over four of them and your own text:

    deepspeed run_clm_moe.py --config_name quickstart --num_experts 16 --deepspeed ds_configs/zero2_ep.json \
        --expert_parallel_size 4 --bf16 --train_file 'data/*.jsonl' --tokenizer_name gpt2 --config_overrides \
        vocab_size=50304 --do_train --output_dir runs/mine

All arguments in one file, with flags that override it:

    deepspeed run_clm_moe.py arguments.yaml --learning_rate 1e-4

Wrong input ends every process with exit code 2 and one sentence.
"""

import sys

from moe_hf.training.launch import main
from moe_hf.training.run import train_and_export

if __name__ == "__main__":
    main(train_and_export, sys.argv[1:], description=__doc__)
