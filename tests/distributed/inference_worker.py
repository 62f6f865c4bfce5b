"""Load an export over two ranks by Transformers' own tensor and expert parallelism; rank 0 keeps the logits."""

import sys

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import moe_hf  # noqa: F401  (registers the architecture)

WAYS = {
    "tensor": {"tp_plan": "auto"},
    "tensor_and_expert": {"distributed_config": DistributedConfig(tp_size=2, ep_size=2)},
}


def main(export: str, destination: str) -> None:
    dist.init_process_group("gloo")
    tokens = torch.arange(3, 27).reshape(2, 12)
    logits = {}
    for name, options in WAYS.items():
        model = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32, **options).eval()
        with torch.no_grad():
            logits[name] = model(tokens).logits
    if dist.get_rank() == 0:
        torch.save(logits, destination)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
