"""Break one thing in the processes of the doctor's self-test; Python imports this by itself from PYTHONPATH.

`DOCTOR_FAULT` names the function below that is called with the module that it names, as soon as that is imported.
"""

import importlib.abc
import importlib.machinery
import os
import sys
import time


def upstreams_router(autoep):
    """AutoEP routes with a router of its own, and nothing of what it computes reaches the router's losses."""
    import torch

    original = autoep._install_router

    def install(layer, config):
        theirs = layer.router
        original(layer, config)
        ours = layer.router  # fetches the weight, which both have, at ZeRO 3

        def forward(hidden_states, expert_bias=None):
            routed = theirs(hidden_states, expert_bias)
            ours.tap(torch.zeros(len(hidden_states), config.num_experts), routed[1], None)
            return routed

        ours.forward = forward

    autoep._install_router = install


def averaged_norm(stage3):
    """The norm of the experts is divided as if both ranks held the same ones."""
    optimizer = stage3.DeepSpeedZeroOptimizer_Stage3
    original = optimizer._get_norm_groups

    def norms_of_groups(self):
        *others, experts = original(self)
        return [*others, experts / 2**0.5]

    optimizer._get_norm_groups = norms_of_groups


def _with_experts(gather, change):
    original = gather.FullTensorReader._read_experts

    def read(self, layer, parts):
        whole = original(self, layer, parts)
        return whole if whole is None else change(whole)

    gather.FullTensorReader._read_experts = read


def half_of_the_experts(gather):
    """An export holds the experts of one rank only."""
    _with_experts(gather, lambda whole: whole[: len(whole) // 2])


def experts_twice(gather):
    """An export has the right shapes, with the experts of one rank in the place of all."""
    _with_experts(gather, lambda whole: whole[: len(whole) // 2].repeat(2, 1, 1))


def forgotten_moments(engine):
    """A resumed run has lost what Adam knew."""
    original = engine.DeepSpeedEngine.load_checkpoint

    def load(self, *args, **kwargs):
        loaded = original(self, *args, **kwargs)
        for state in self.optimizer.optimizer.state.values():
            state["exp_avg"].zero_()
        return loaded

    engine.DeepSpeedEngine.load_checkpoint = load


def _at_third_step(pipeline, what):
    from transformers import TrainerCallback

    class Fault(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2 and os.environ["RANK"] == "1":
                what()

    original = pipeline.execute

    def execute(trainer):
        trainer.add_callback(Fault())
        return original(trainer)

    pipeline.execute = execute


def a_rank_hangs(pipeline):
    """Rank 1 never begins its third step."""
    _at_third_step(pipeline, lambda: time.sleep(3600))


def a_rank_dies(pipeline):
    """Rank 1 meets an error in its third step."""

    def die():
        raise RuntimeError("the card has fallen off the bus")

    _at_third_step(pipeline, die)


FAULTS = {
    "moe_hf.parallel.autoep": upstreams_router,
    "deepspeed.runtime.zero.stage3": averaged_norm,
    "moe_hf.parallel.gather": (half_of_the_experts, experts_twice),
    "deepspeed.runtime.engine": forgotten_moments,
    "moe_hf.training.run": (a_rank_hangs, a_rank_dies),
}


class _Breaker(importlib.abc.MetaPathFinder):
    """Finds the module as usual, and breaks it when it has been executed."""

    def __init__(self, module: str, fault) -> None:
        self._module, self._fault = module, fault

    def find_spec(self, name, path=None, target=None):
        if name != self._module:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            self._fault(module)

        spec.loader.exec_module = exec_module
        return spec


def _install() -> None:
    wanted = os.environ.get("DOCTOR_FAULT")
    for module, faults in FAULTS.items():
        for fault in faults if isinstance(faults, tuple) else (faults,):
            if fault.__name__ == wanted:
                sys.meta_path.insert(0, _Breaker(module, fault))


if any("moe_hf.doctor.worker" in word for word in sys.orig_argv) and "RANK" in os.environ:
    _install()
