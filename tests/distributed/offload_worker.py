"""As `worker.py`, and count the bytes that each rank's optimizer and weights have in memory and on NVMe.

They are left in `OUTPUT_DIR/bytes.json`, one entry for each rank, as they are at rest after the last step.
"""

import json
from pathlib import Path

import torch.distributed as dist
import worker
from transformers import TrainerCallback


class ByteCounter(TrainerCallback):
    """Counts when training has ended."""

    def __init__(self, trainer) -> None:
        self._trainer = trainer

    def on_train_end(self, args, state, control, **kwargs) -> None:
        counts = [None] * dist.get_world_size()
        dist.all_gather_object(counts, bytes_at_rest(self._trainer.model_wrapped))
        if dist.get_rank() == 0:
            (Path(args.output_dir) / "bytes.json").write_text(json.dumps(counts))


def bytes_at_rest(engine) -> dict[str, int]:
    """Return the bytes of one rank, by what and where."""
    zero = engine._config.zero_config
    sections = [section for section in (zero.offload_optimizer, zero.offload_param) if section is not None]
    folders = {section.nvme_path for section in sections if section.nvme_path is not None}
    files = [path for folder in folders for path in folder.rglob("*.swp")]
    counts = {"files": len(files)}
    for name in ("optimizer", "params"):
        counts[f"{name}_on_nvme"] = sum(
            path.stat().st_size for path in files if name in str(path.parent) and "gradient" not in path.name
        )
    if engine.zero_optimization_stage() == 3:
        engine.optimizer._partition_all_parameters()
        states = [value for state in engine.optimizer.optimizer.state.values() for value in state.values()]
        vectors = [*engine.optimizer.fp32_partitioned_groups_flat, *(v for v in states if hasattr(v, "nbytes"))]
        counts["optimizer_in_memory"] = sum(vector.nbytes for vector in vectors if not in_buffer(vector, engine))
        counts["params_in_memory"] = sum(
            param.ds_tensor.nbytes for param in engine.module.parameters() if param.ds_tensor.status.name == "AVAILABLE"
        )
    return counts


def in_buffer(vector, engine) -> bool:
    """Return whether a vector lies in a buffer through which all of them are swapped, in turn."""
    swapper = engine.optimizer.optimizer_swapper
    buffers = [] if swapper is None else swapper.swap_buffer_manager.all_buffers
    return any(buffer.data_ptr() <= vector.data_ptr() < buffer.data_ptr() + buffer.nbytes for buffer in buffers)


def main() -> None:
    build = worker.build_trainer

    def build_counted(argv, relay):
        trainer = build(argv, relay)
        trainer.add_callback(ByteCounter(trainer))
        return trainer

    worker.build_trainer = build_counted
    worker.main()


if __name__ == "__main__":
    main()
