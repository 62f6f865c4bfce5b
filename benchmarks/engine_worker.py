"""Train as run_clm_moe.py does, and write down what every rank holds and sends: `FOLDER/NAME/rank_N.json`.

    deepspeed --num_accelerators 2 --module benchmarks.engine_worker CASES.json FOLDER

Each case is `{"name": …, "argv": […]}`; all run one after the other in the same processes.
"""

import gc
import json
import sys
from collections import Counter
from pathlib import Path

import deepspeed.comm
import psutil
import torch.distributed as dist
from accelerate.state import AcceleratorState
from deepspeed.runtime.tensor_parallel import init_utils
from transformers import TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from moe_hf.parallel.failure import FailureRelay
from moe_hf.parallel.processes import leave
from moe_hf.training.run import build_trainer

from .engine_states import gradients_of, optimizer_states_of, storages, weights_of


class Measuring(TrainerCallback):
    """Measures the last step: gradients between its micro-batches, the rest behind it, and messages."""

    def __init__(self, trainer) -> None:
        self.trainer, self.held, self.messages = trainer, {}, {}
        self.sent_before = self.sent = 0

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        """Forget the messages of earlier steps."""
        deepspeed.comm.comms_logger.reset_data()
        self.sent_before = _bytes_sent()

    def on_substep_end(self, args, state, control, **kwargs) -> None:
        """Behind a micro-batch that is not the last of its step."""
        self.held["gradients"] = sum(storages(gradients_of(self.trainer.deepspeed)).values())

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Behind the optimizer's step."""
        self.sent = _bytes_sent() - self.sent_before
        engine = self.trainer.deepspeed
        weights = storages(weights_of(engine))
        optimizer = storages(optimizer_states_of(engine))
        self.held["weights"] = sum(weights.values())
        self.held["optimizer"] = sum(size for place, size in optimizer.items() if place not in weights)
        self.messages = {
            operation: sum(size * counted[0] for size, counted in sizes.items())
            for operation, sizes in deepspeed.comm.comms_logger.comms_dict.items()
        }


def _bytes_sent() -> int:
    """Return what this process has written, to sockets too: over gloo nearly all of it are messages."""
    return psutil.Process().io_counters().write_chars


def main() -> None:
    """Run the cases of the file that the command line names."""
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
        path.write_text(
            json.dumps({"held": measuring.held, "messages": Counter(measuring.messages), "sent": measuring.sent})
        )
        trainer.deepspeed.destroy()
        del trainer, measuring
        gc.collect()
        dist.barrier()
    relay.stop()
    dist.destroy_process_group()
    leave(0)


if __name__ == "__main__":
    main()
