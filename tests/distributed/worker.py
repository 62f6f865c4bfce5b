"""Run many command lines of run_clm_moe.py one after the other in the processes of one launch.

Each case is `{"name": …, "argv": […]}`. Rank 0 writes the logged losses, the user error that ended it if there was one,
the live model's logits on a probe and an independent assembly of its weights to `FOLDER/NAME/`.
"""

import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from deepspeed import zero
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from moe_hf.errors import UserError
from moe_hf.parallel.failure import FailureRelay
from moe_hf.parallel.processes import leave
from moe_hf.training.run import build_trainer, execute

PROBE = torch.arange(3, 3 + 24).reshape(2, 12)


def main() -> None:
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    cases, folder = json.loads(Path(words[0]).read_text()), Path(words[1])
    relay = FailureRelay()
    for case in cases:
        AcceleratorState._reset_state(reset_partial_state=True)
        unset_hf_deepspeed_config()
        trainer = build_trainer(case["argv"], relay)
        metrics, error = {}, None
        try:
            metrics = execute(trainer)
        except UserError as met:
            error = str(met)
        record(trainer, metrics, error, folder / case["name"])
        del trainer
        gc.collect()
        dist.barrier()
    relay.stop()
    dist.destroy_process_group()
    leave(0)


def record(trainer, metrics: dict, error: str | None, folder: Path) -> None:
    """Keep what the test compares with other runs and with the export."""
    trainer.model.eval()
    with torch.no_grad():
        logits = trainer.model_wrapped(input_ids=PROBE).logits
    weights, dispatched = assemble_weights(trainer.model), count_dispatched(trainer)
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save({"logits": logits, "weights": weights}, folder / "live.pt")
        result = {"log_history": trainer.state.log_history, "metrics": metrics, "error": error}
        rotary = trainer.accelerator.unwrap_model(trainer.model).model.rotary_emb
        result |= {"inv_freq": rotary.inv_freq.tolist(), "inv_freq_dtype": str(rotary.inv_freq.dtype)}
        (folder / "result.json").write_text(json.dumps(result | {"dispatched": dispatched}))


def count_dispatched(trainer) -> list[int]:
    """Return how many rows the experts of each expert-parallel layer get, over all ranks, in training on the probe."""
    rows = []
    hooks = [
        module.register_forward_pre_hook(lambda _, args: rows.append(int(args[-1][-1])))
        for name, module in trainer.model.named_modules()
        if name.endswith(".experts") and hasattr(module, "w1")
    ]
    trainer.model.train()
    with torch.no_grad():
        trainer.model_wrapped(input_ids=PROBE)
    for hook in hooks:
        hook.remove()
    total = torch.tensor(rows)
    dist.all_reduce(total)
    return total.tolist()


def assemble_weights(model) -> dict[str, torch.Tensor] | None:
    """Return all weights and buffers on rank 0, by their Hugging Face names."""

    def read(parameter: torch.nn.Parameter) -> torch.Tensor:
        with zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    return assemble(model, read)


def assemble(model, read: Callable[[torch.nn.Parameter], torch.Tensor]) -> dict[str, torch.Tensor] | None:
    """Put what `read` returns together by pickling everything to everyone: slow, and not the export's way."""
    local, buffers = {}, []
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            local[f"{module_name}.{name}"] = read(parameter)
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                local[f"{module_name}.{name}"] = buffer.clone()
                buffers.append(f"{module_name}.{name}")
    ep_ranks = {name: module.ep_rank for name, module in model.named_modules() if hasattr(module, "ep_rank")}
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (ep_ranks, local))
    for name in buffers:
        assert all(torch.equal(tensors[name], local[name]) for _, tensors in everyone), f"{name} differs over ranks"
    if dist.get_rank() != 0:
        return None
    whole = {}
    for name, tensor in local.items():
        layer = name.split(".experts.")[0]
        if layer not in ep_ranks or ".experts.w" not in name:
            whole[name.replace(".mlp.router.", ".mlp.gate.")] = tensor
            continue
        by_ep_rank = {ranks[layer]: tensors for ranks, tensors in everyone}
        prefix = f"{layer}.experts."
        if name.endswith("w2"):
            whole[prefix + "down_proj"] = torch.cat([by_ep_rank[r][name] for r in sorted(by_ep_rank)])
        elif name.endswith("w1"):
            experts = []
            for r in sorted(by_ep_rank):
                gate, up = by_ep_rank[r][name], by_ep_rank[r][prefix + "w3"]
                experts += [torch.cat([g, u]) for g, u in zip(gate, up, strict=True)]
            whole[prefix + "gate_up_proj"] = torch.stack(experts)
    return whole


if __name__ == "__main__":
    main()
