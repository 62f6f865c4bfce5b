"""Run many command lines one after the other, and keep what each process of each has trained on.

Each rank writes the `input_ids` of its micro-batches, the logged losses and the error that ended it, if there was one,
to `FOLDER/NAME/rank_R.json`.
"""

import gc
import json
import sys
from pathlib import Path

import torch.distributed as dist
from accelerate.state import AcceleratorState
from deepspeed.utils import groups
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from moe_hf.errors import UserError
from moe_hf.parallel.failure import FailureRelay
from moe_hf.parallel.processes import leave
from moe_hf.training.run import build_trainer, execute


def main() -> None:
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    cases, folder = json.loads(Path(words[0]).read_text()), Path(words[1])
    relay = FailureRelay()
    for case in cases:
        AcceleratorState._reset_state(reset_partial_state=True)
        unset_hf_deepspeed_config()
        # DeepSpeed slices a Universal Checkpoint by the largest expert-parallel group that the process ever had.
        groups._EXPERT_PARALLEL_GROUP.clear()
        groups._EXPERT_DATA_PARALLEL_GROUP.clear()
        result = run(case["argv"], relay)
        place = folder / case["name"]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"rank_{dist.get_rank()}.json").write_text(json.dumps(result))
        gc.collect()
        dist.barrier()
    relay.stop()
    dist.destroy_process_group()
    leave(0)


def run(argv: list[str], relay: FailureRelay) -> dict:
    batches = []
    try:
        trainer = build_trainer(argv, relay)
        training_step = trainer.training_step

        def recorded(model, inputs, num_items_in_batch=None):
            batches.append(inputs["input_ids"].tolist())
            return training_step(model, inputs, num_items_in_batch)

        trainer.training_step = recorded
        execute(trainer)
    except UserError as error:  # of all ranks
        return {"error": str(error), "batches": batches}
    losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    return {"batches": batches, "losses": losses, "error": None}


if __name__ == "__main__":
    main()
