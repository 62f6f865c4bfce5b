"""Train as `worker.py` does, and write down what every rank holds and sends: `FOLDER/NAME/rank_N.json`."""

import gc
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import deepspeed.comm
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from deepspeed.runtime.tensor_parallel import init_utils
from transformers import TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from moe_hf.parallel.failure import FailureRelay
from moe_hf.parallel.processes import leave
from moe_hf.training.run import build_trainer


class Measuring(TrainerCallback):
    """Measures the last step: gradients between its micro-batches, the rest behind it, and messages."""

    def __init__(self, trainer) -> None:
        self.trainer, self.held, self.messages = trainer, {}, {}

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        """Forget the messages of earlier steps."""
        deepspeed.comm.comms_logger.reset_data()

    def on_substep_end(self, args, state, control, **kwargs) -> None:
        """Behind a micro-batch that is not the last of its step."""
        self.held["gradients"] = sum(storages(gradients_of(self.trainer.deepspeed)).values())

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Behind the optimizer's step."""
        engine = self.trainer.deepspeed
        weights = storages(weights_of(engine))
        optimizer = storages(optimizer_states_of(engine))
        self.held["weights"] = sum(weights.values())
        self.held["optimizer"] = sum(size for place, size in optimizer.items() if place not in weights)
        self.messages = {
            operation: sum(size * counted[0] for size, counted in sizes.items())
            for operation, sizes in deepspeed.comm.comms_logger.comms_dict.items()
        }


def storages(tensors: Iterable[torch.Tensor | None]) -> dict[int, int]:
    """Return the bytes of every storage that one of the tensors is a view of, by its address."""
    found = (tensor.untyped_storage() for tensor in tensors if tensor is not None)
    return {storage.data_ptr(): storage.nbytes() for storage in found if storage.nbytes()}


def weights_of(engine) -> Iterator[torch.Tensor | None]:
    for parameter in engine.module.parameters():
        yield parameter.data
        yield getattr(parameter, "ds_tensor", None)


def gradients_of(engine) -> Iterator[torch.Tensor | None]:
    for parameter in engine.module.parameters():
        yield parameter.grad
        yield getattr(parameter, "grad_accum", None)
    for name in ("all_grad_tensors", "averaged_gradients"):
        for tensors in getattr(engine.optimizer, name, {}).values():
            yield from tensors or ()
    yield getattr(engine.optimizer, "grad_partitions_flat_buffer", None)


def optimizer_states_of(engine) -> Iterator[torch.Tensor]:
    for state in engine.basic_optimizer.state.values():
        # The number of steps is not worth counting.
        yield from (value for value in state.values() if torch.is_tensor(value) and value.numel() > 1)
    for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups"):
        for group in getattr(engine.optimizer, name, ()):
            yield from group if isinstance(group, list) else [group]


def main() -> None:
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    cases, folder = json.loads(Path(words[0]).read_text()), Path(words[1])
    relay = FailureRelay()
    for case in cases:
        AcceleratorState._reset_state(reset_partial_state=True)
        unset_hf_deepspeed_config()
        init_utils._TP_MODEL_INIT_ARGS = None  # DeepSpeed remembers the dtype of the first
        trainer = build_trainer(case["argv"], relay)
        measuring = Measuring(trainer)
        trainer.add_callback(measuring)
        trainer.train()
        path = folder / case["name"] / f"rank_{dist.get_rank()}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"held": measuring.held, "messages": Counter(measuring.messages)}))
        trainer.deepspeed.destroy()
        del trainer, measuring
        gc.collect()
        dist.barrier()
    relay.stop()
    dist.destroy_process_group()
    leave(0)


if __name__ == "__main__":
    main()
