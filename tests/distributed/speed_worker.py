"""The worker of the other launches; it also keeps how often the compiler ran, and forgets that before the next case."""

import json

import torch
import torch.distributed as dist
import worker
from torch._dynamo.utils import counters


def record(trainer, metrics: dict, error: str | None, folder) -> None:
    """Write `compiler.json` besides: graphs compiled and breaks of them in this rank's training and evaluation."""
    stats = {"unique_graphs": counters["stats"]["unique_graphs"], "graph_breaks": sum(counters["graph_break"].values())}
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, stats)
    kept_record(trainer, metrics, error, folder)
    if dist.get_rank() == 0:
        (folder / "compiler.json").write_text(json.dumps(everyone))
    torch.compiler.reset()
    counters.clear()


kept_record, worker.record = worker.record, record

if __name__ == "__main__":
    worker.main()
