"""Build an engine as one of many ranks that need not exist, and print what this rank has and with whom it shares.

    placement_worker.py RANK WORLD_SIZE CONFIG…

Collectives do nothing here (torch's `fake` backend), but DeepSpeed and AutoEP make their groups and partitions as in a
real run. Each CONFIG is a DeepSpeed JSON; the last line is one list of `Share` for each.
"""

import json
import os
import sys
from dataclasses import asdict, dataclass

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import groups
from small import small_config
from torch.testing._internal.distributed.fake_pg import FakeStore

from moe_hf import MoEForCausalLM
from moe_hf.parallel.autoep import autoep_layers, split_expert_groups
from moe_hf.parallel.engine import prepare_for_training
from moe_hf.parallel.processes import leave


def main(rank: int, world_size: int, configs: list[dict]) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank % 8), "LOCAL_SIZE": "8"}
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    print(json.dumps([asdict(share(config)) for config in configs]))
    dist.destroy_process_group()


@dataclass
class Share:
    """What one rank has.

    Attributes:
        experts_with: ranks that share one set of experts, this one included.
        same_experts: ranks that hold the same experts as this one.
        weights: elements of parameters at rest.
        optimizer: elements of the optimizer's FP32 copy of parameters.
        dense, experts: parameters of the whole model, outside and inside of experts.
    """

    experts_with: list[int]
    same_experts: list[int]
    weights: int
    optimizer: int
    dense: int
    experts: int


def share(config: dict) -> Share:
    model = MoEForCausalLM(small_config(num_experts=16))
    experts = sum(p.numel() for name, p in model.named_parameters() if ".mlp.experts." in name)
    dense = model.num_parameters() - experts
    prepare_for_training(model, config)
    optimizer = torch.optim.AdamW(model.parameters())
    split_expert_groups(optimizer, model, config["expert_parallel"]["autoep_size"])
    engine, zero, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    ranks = {
        (
            tuple(dist.get_process_group_ranks(layer.ep_group)),
            tuple(dist.get_process_group_ranks(groups._get_expert_data_parallel_group(layer.ep_group_name))),
        )
        for _, layer in autoep_layers(engine.module)
    }
    ((experts_with, same_experts),) = ranks  # all layers alike
    if config["zero_optimization"]["stage"] == 3:
        weights, masters = [p.ds_tensor for p in engine.module.parameters()], zero.fp32_partitioned_groups_flat
    else:
        weights, masters = engine.module.parameters(), zero.single_partition_of_fp32_groups
    sizes = [sum(tensor.numel() for tensor in tensors) for tensors in (weights, masters)]
    return Share(list(experts_with), list(same_experts), *sizes, dense, experts)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), [json.loads(word) for word in sys.argv[3:]])
    leave(0)
