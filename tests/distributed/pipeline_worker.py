"""As `worker.py`, for pipelines: no process has a whole model, so what is recorded is what all stages hold.

Rank 0 writes the logged entries, the names that each rank holds, and the weights of all stages, put together by
pickling everything to everyone: not the export's way.
"""

import json
from pathlib import Path

import torch
import torch.distributed as dist
import worker


def record(trainer, metrics: dict, error: str | None, folder: Path) -> None:
    """Keep what the test compares with one process and with the export."""
    held = {name: tensor.detach().clone() for name, tensor in trainer.model.state_dict().items()}
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, held)
    if dist.get_rank() != 0:
        return
    whole: dict[str, torch.Tensor] = {}
    for tensors in everyone:
        for name, tensor in tensors.items():
            is_shared = ".experts.w" in name  # between the ranks of an expert-parallel group
            assert is_shared or name not in whole or torch.equal(whole[name], tensor), f"{name} differs over ranks"
            whole[name] = tensor
    folder.mkdir(parents=True, exist_ok=True)
    result = {"log_history": trainer.state.log_history, "metrics": metrics, "error": error}
    result["held"] = [sorted(tensors) for tensors in everyone]
    (folder / "result.json").write_text(json.dumps(result))
    torch.save(whole, folder / "live.pt")


if __name__ == "__main__":
    worker.record = record
    worker.main()
