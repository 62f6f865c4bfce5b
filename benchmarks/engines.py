"""Training steps of a model in a DeepSpeed engine of one process, the same settings for all."""

import gc
import os
from dataclasses import dataclass
from unittest import mock

import deepspeed
import torch

from .cases import StepCase
from .peers.autoep import join_alone
from .peers.models import ModelPeer
from .timing import Sample, clock_of

# Large for so few steps, on the same tokens each time: the loss falls at once if gradients are right, and only then.
LEARNING_RATE = 1e-3
ADAM_EPSILON = 1e-8
MAX_GRAD_NORM = 1.0


@dataclass
class Training:
    """A model in training.

    Args:
        peer: whose it is.
        engine: of DeepSpeed.
        tokens: of every step, `(A * B, S)`.
        batch: sequences of each of the A micro-batches, B.
    """

    peer: ModelPeer
    engine: "deepspeed.DeepSpeedEngine"
    tokens: torch.Tensor
    batch: int

    def step(self) -> tuple[Sample, torch.Tensor]:
        """Make one optimizer step; return the times, those of all micro-batches, and the cross-entropy before it."""
        micro_batches = self.tokens.split(self.batch)
        clock = clock_of(self.tokens.device.type)
        cross_entropies = []
        for tokens in micro_batches:
            loss, cross_entropy = self.peer.cross_entropy(self.engine, tokens)
            cross_entropies.append(cross_entropy.detach())
            clock.mark()
            self.engine.backward(loss)
            clock.mark()
            self.engine.step()  # of the last one only; before, it counts
        clock.mark()
        *passes, step = clock.milliseconds()
        ends = passes[1::2]
        forward = sum(end - begin for begin, end in zip([0.0, *ends], passes[0::2], strict=False))
        times = {"forward_ms": forward, "forward_backward_ms": ends[-1], "step_ms": step}
        return times, torch.stack(cross_entropies).mean()

    def end(self) -> None:
        """Let go of what the engine holds."""
        self.engine.destroy()
        del self.engine


def clean(device: str) -> None:
    """Give back what nobody refers to any more."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def start(peer: ModelPeer, case: StepCase, weights: dict[str, torch.Tensor], tokens: torch.Tensor) -> Training:
    """Put a peer's model with the given weights into an engine with ZeRO 1.

    Args:
        peer: builds the model and its optimizer.
        case: the model.
        weights: of the model, by their names in Transformers.
        tokens: of every step, `(A * B, S)`, on the device.
    """
    join_alone()
    model = peer.load(case, weights, tokens.device)
    model.train()
    optimizer = peer.optimizer(model, learning_rate=LEARNING_RATE, adam_epsilon=ADAM_EPSILON)
    config = {
        "train_micro_batch_size_per_gpu": case.batch,
        "gradient_accumulation_steps": case.accumulation,
        "gradient_clipping": MAX_GRAD_NORM,
        "bf16": {"enabled": case.dtype == "bf16"},
        "zero_optimization": {"stage": 1},
        # A user's optimizer is taken as it is.
        "zero_allow_untested_optimizer": True,
        **peer.deepspeed_section(),
    }
    # What the launcher sets; Accelerate would take it for a launch of several processes.
    with mock.patch.dict(os.environ, LOCAL_RANK="0"):
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    return Training(peer, peer.prepare(engine), tokens, case.batch)
