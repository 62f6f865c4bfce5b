"""A Universal Checkpoint goes into an engine: whole at ZeRO 0, where DeepSpeed cannot; elsewhere by its own loader."""

from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from deepspeed_files import (
    STATES,
    Run,
    correction_biases,
    draw_states,
    live_model,
    loss_free,
    on_rank,
    write_checkpoint,
)

from moe_hf import MoEForCausalLM
from moe_hf.checkpoint.sharded import ShardedCheckpoint
from moe_hf.checkpoint.universal import BUFFERS_NAME, TAG, write_universal
from moe_hf.parallel.restore import load_universal

CONFIG = loss_free(num_hidden_layers=2, tie_word_embeddings=True)


@pytest.fixture
def saved():
    """A model that was trained, and its masters and moments."""
    model = live_model(CONFIG)
    return model, draw_states(model)


@pytest.fixture
def folder(tmp_path, saved) -> Path:
    checkpoint = write_checkpoint(tmp_path / "checkpoint-3", Run(2, 2, 2, bf16=True), *saved)
    write_universal(ShardedCheckpoint(checkpoint), tmp_path / "universal", expert_parallel=False)
    return tmp_path / "universal"


def buffers_of(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / TAG / BUFFERS_NAME)


def decay_groups(params: list[torch.Tensor]) -> list[dict]:
    return [
        {"params": [param for param in params if param.dim() > 1], "weight_decay": 0.1},
        {"params": [param for param in params if param.dim() == 1], "weight_decay": 0.0},
    ]


class WholeEngine:
    """As DeepSpeed's at ZeRO 0: the base optimizer itself, or around it one with float32 copies of the parameters."""

    def __init__(self, model: MoEForCausalLM, dtype: torch.dtype) -> None:
        self.module = model.to(dtype)
        self.global_steps = self.global_samples = self.skipped_steps = 0
        groups = decay_groups(list(self.module.parameters()))
        if dtype == torch.float32:
            self.base = self.optimizer = torch.optim.AdamW(groups, lr=1e-2)
            return
        fp16_groups = [group["params"] for group in groups]
        fp32_groups = [[param.clone().float().detach().requires_grad_() for param in group] for group in fp16_groups]
        own = [group | {"params": copies} for group, copies in zip(groups, fp32_groups, strict=True)]
        self.base = torch.optim.AdamW(own, lr=1e-2)
        self.optimizer = SimpleNamespace(
            optimizer=self.base, fp16_groups=fp16_groups, fp32_groups=fp32_groups, param_groups=self.base.param_groups
        )
        for master in chain(*fp32_groups):  # DeepSpeed makes the states by a step with zeros
            master.grad = torch.zeros_like(master)
        self.base.step()

    def zero_optimization_stage(self) -> int:
        return 0

    def masters(self) -> dict[str, torch.Tensor]:
        """Return what the base optimizer updates, by the name of the parameter that it stands for."""
        names = {id(param): name for name, param in self.module.named_parameters()}
        if self.base is self.optimizer:
            own = [param for group in self.base.param_groups for param in group["params"]]
        else:
            own = [param for group in self.optimizer.fp16_groups for param in group]
        updated = [param for group in self.base.param_groups for param in group["params"]]
        return {names[id(param)]: master for param, master in zip(own, updated, strict=True)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_parameters(folder, saved, dtype):
    model, states = saved
    engine = WholeEngine(live_model(CONFIG, seed=9), dtype)
    before = dict(engine.module.named_parameters())
    load_universal(engine, folder, TAG, buffers_of(folder))
    masters = engine.masters()
    assert masters.keys() == states["fp32"].keys()
    for name, param in engine.module.named_parameters():
        assert param is before[name] and param.requires_grad
        assert param.dtype == dtype and torch.equal(param, states["fp32"][name].to(dtype)), name
        assert torch.equal(masters[name], states["fp32"][name])
        held = engine.base.state[masters[name]]
        assert held["step"] == 3 and held.keys() == {"step", "exp_avg", "exp_avg_sq"}
        for state in STATES[1:]:
            assert held[state].dtype == torch.float32 and torch.equal(held[state], states[state][name]), (state, name)
    assert len(engine.base.state) == len(masters)
    biases = correction_biases(model)
    assert biases and all(torch.equal(engine.module.state_dict()[name], bias) for name, bias in biases.items())
    assert (engine.global_steps, engine.global_samples, engine.skipped_steps) == (3, 12, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_next_step_is_that_of_adam(folder, saved, dtype):
    """The optimizer goes on from what was loaded: one update by the formula, and one more counted for each."""
    _, states = saved
    engine = WholeEngine(live_model(CONFIG, seed=9), dtype)
    load_universal(engine, folder, TAG, buffers_of(folder))
    masters = engine.masters()
    gradients = {name: torch.randn(master.shape) for name, master in masters.items()}
    for name, master in masters.items():
        master.grad = gradients[name]
    states["exp_avg_sq"] = {name: moment.abs() for name, moment in states["exp_avg_sq"].items()}
    for master in masters.values():
        engine.base.state[master]["exp_avg_sq"].abs_()
    engine.base.step()
    for name, master in masters.items():
        weight, gradient = states["fp32"][name].double(), gradients[name].double()
        decay = 0.1 if weight.dim() > 1 else 0.0
        mean = 0.9 * states["exp_avg"][name].double() + 0.1 * gradient
        square = 0.999 * states["exp_avg_sq"][name].double() + 0.001 * gradient**2
        update = mean / (1 - 0.9**4) / ((square / (1 - 0.999**4)).sqrt() + 1e-8)
        expected = weight * (1 - 1e-2 * decay) - 1e-2 * update
        assert torch.allclose(master.double(), expected, rtol=1e-4, atol=1e-5), name
        assert engine.base.state[master]["step"] == 4


class SlicedEngine:
    """As DeepSpeed's at ZeRO 1, 2 and 3 as far as loading goes: its loader gives all groups one tensor of the step."""

    def __init__(self, fails: bool = False) -> None:
        self._config = SimpleNamespace(load_universal_checkpoint=False)
        self.module = live_model(CONFIG, seed=9)
        self._fails = fails
        self.calls = []
        states = {index: {"exp_avg": torch.zeros(2), "step": torch.tensor(0.0)} for index in range(3)}
        self.optimizer = SimpleNamespace(optimizer=SimpleNamespace(state=states))

    def zero_optimization_stage(self) -> int:
        return 3

    def load_checkpoint(self, folder: str, **options) -> None:
        self.calls.append((self._config.load_universal_checkpoint, folder, options))
        if self._fails:
            raise RuntimeError("no")
        step = torch.tensor(3.0)
        for state in self.optimizer.optimizer.state.values():
            state["step"] = step


def test_sliced_parameters_are_left_to_deepspeed(folder, saved):
    engine = SlicedEngine()
    load_universal(engine, folder, TAG, buffers_of(folder))
    assert engine.calls == [(True, str(folder), {"tag": TAG, "load_lr_scheduler_states": False})]
    assert engine._config.load_universal_checkpoint is False
    for name, bias in correction_biases(saved[0]).items():
        assert torch.equal(engine.module.state_dict()[name], bias)
    steps = [state["step"] for state in engine.optimizer.optimizer.state.values()]
    steps[0] += 1
    assert steps == [4, 3, 3], "groups share one count, which each of them would increment"


def test_the_engine_is_left_as_it_was_when_loading_fails(folder):
    engine = SlicedEngine(fails=True)
    with pytest.raises(RuntimeError):
        load_universal(engine, folder, TAG, buffers_of(folder))
    assert engine._config.load_universal_checkpoint is False


def test_steps_that_are_numbers_stay(folder):
    """Some optimizers count in plain numbers, which cannot be shared."""
    engine = SlicedEngine()
    engine.load_checkpoint = lambda *arguments, **options: None
    for state in engine.optimizer.optimizer.state.values():
        state["step"] = 3
    engine.optimizer.optimizer.state[1].pop("step")
    load_universal(engine, folder, TAG, {})
    assert [state.get("step") for state in engine.optimizer.optimizer.state.values()] == [3, None, 3]


def test_experts_by_the_names_of_the_engine(folder, saved):
    """The buffers of an engine with AutoEP have its names, and each goes to its own."""
    engine = SlicedEngine()
    routers = {f"model.layers.{index}.mlp.router.e_score_correction_bias": torch.randn(4) for index in (1, 2)}
    engine.module = torch.nn.Module()
    for name in routers:
        parent = engine.module
        *path, last = name.split(".")
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, torch.nn.Module())
            parent = parent._modules[part]
        parent.register_buffer(last, torch.zeros(4))
    load_universal(engine, folder, TAG, on_rank(routers, Run(1, 1, 1), 0))
    assert all(torch.equal(dict(engine.module.named_buffers())[name], bias) for name, bias in routers.items())
