"""Train three steps at ZeRO 3 in one process, and print what was used and gathered in the last one.

A line of JSON for each case, `{"config", "ep", "checkpointing", "zero"}`: `uses`, the parameters of each module in the
order in which they begin, and `times`, how often each parameter was gathered.
"""

import json
import os
import sys
from collections import Counter

import torch

os.environ |= {
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": sys.argv[1],
}

import deepspeed
from deepspeed.runtime.zero.partitioned_param_coordinator import (
    PartitionedParameterCoordinator,
    ZeroParamStatus,
    iter_params,
)

from moe_hf import MoEConfig, MoEForCausalLM
from moe_hf.parallel.autoep import split_expert_groups
from moe_hf.parallel.engine import prepare_for_training

NAMES: dict[int, str] = {}
USES: list[list[str]] = []
TIMES: Counter = Counter()


def watch() -> None:
    gather = PartitionedParameterCoordinator._PartitionedParameterCoordinator__all_gather_params_
    fetch = PartitionedParameterCoordinator._fetch_sub_module_impl

    def gathered(self, params, forward, quantize=False):
        TIMES.update(NAMES[p.ds_id] for p in params if p.ds_status == ZeroParamStatus.NOT_AVAILABLE)
        return gather(self, params, forward, quantize)

    def fetched(self, module, forward, is_leaf):
        USES.append(sorted(NAMES[p.ds_id] for p in iter_params(module, recurse=is_leaf)))
        return fetch(self, module, forward, is_leaf)

    PartitionedParameterCoordinator._PartitionedParameterCoordinator__all_gather_params_ = gathered
    PartitionedParameterCoordinator._fetch_sub_module_impl = fetched


def run(case: dict) -> dict:
    torch.manual_seed(0)
    model = MoEForCausalLM(MoEConfig(**case["config"]))
    if case["checkpointing"]:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    config = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}}
    config["zero_optimization"] = {"stage": 3, "reduce_bucket_size": 50_000} | case["zero"]
    optimizer = torch.optim.AdamW(model.parameters())
    if case["ep"]:
        config["expert_parallel"] = {"enabled": True, "autoep_size": 1}
        split_expert_groups(optimizer, model, 1)
    prepare_for_training(model, config)
    engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=optimizer)
    NAMES.clear()
    NAMES.update({p.ds_id: name.replace(".router.", ".gate.") for name, p in engine.module.named_parameters()})
    ids = torch.randint(3, 100, (1, 24))
    for _ in range(3):
        USES.clear()
        TIMES.clear()
        engine.backward(engine(input_ids=ids, labels=ids, skip_logits=True, use_cache=False).loss)
        found = {"uses": list(USES), "times": dict(TIMES)}
        engine.step()
    engine.destroy()
    return found


def main() -> None:
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    watch()
    for case in json.loads(sys.argv[2]):
        print("found " + json.dumps(run(case)), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
