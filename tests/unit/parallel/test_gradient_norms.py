"""Squared gradient norms by family, from every layout in which DeepSpeed keeps a gradient.

The engines here are laid out by hand; `distributed/test_parity.py` compares those of DeepSpeed with one process.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from deepspeed.module_inject.auto_ep import AutoEP
from deepspeed.module_inject.auto_ep_config import parse_autoep_config
from deepspeed.module_inject.auto_ep_presets import registry
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from small import small_config
from torch import nn

from moe_hf import MoEForCausalLM
from moe_hf.parallel.autoep import autoep_layers, register_preset
from moe_hf.parallel.gradient_norms import GradientNorms
from moe_hf.parameter_families import FAMILIES, family_of

CLIP = 0.01


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@pytest.fixture
def model() -> MoEForCausalLM:
    """A model with a random gradient, larger in one parameter than in the one before."""
    model = MoEForCausalLM(small_config())
    for number, param in enumerate(model.parameters()):
        param.grad = torch.randn(param.shape) * (1 + number)
    return model


def expected(model: nn.Module) -> list[float]:
    """Return the squared norms in the order of `FAMILIES`, element by element."""
    sums = dict.fromkeys(FAMILIES, 0.0)
    for name, param in model.named_parameters():
        if param.grad is not None:
            sums[family_of(name)] += math.fsum(value**2 for value in param.grad.flatten().tolist())
    return [sums[family] for family in FAMILIES]


def total(ranks: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(ranks).sum(dim=0)


def assert_squares(squares: torch.Tensor, wanted: list[float], rtol: float = 1e-12) -> None:
    assert squares.dtype == torch.float64 and squares.shape == (len(FAMILIES),)
    torch.testing.assert_close(squares, torch.tensor(wanted, dtype=torch.float64), rtol=rtol, atol=0.0)


class Engine(nn.Module):
    """What all engines have in common: a step that begins by clipping in place."""

    device = torch.device("cpu")

    def __init__(self, module: nn.Module, stage: int, optimizer=None, applies: bool = True, clips: bool = True) -> None:
        super().__init__()
        self.module, self.stage, self.optimizer, self.applies, self.clips = module, stage, optimizer, applies, clips
        self.lr_kwargs = []

    def zero_optimization_stage(self) -> int:
        return self.stage

    def was_step_applied(self) -> bool:
        return self.applies

    def _take_model_step(self, lr_kwargs) -> None:
        self.lr_kwargs.append(lr_kwargs)
        if self.clips:
            nn.utils.clip_grad_norm_(self.module.parameters(), CLIP)


def measured(engine: Engine) -> torch.Tensor | None:
    norms = GradientNorms(engine)
    norms.measure_next_step()
    engine._take_model_step(None)
    return norms.squared_sums()


# --------------------------------------------------------------------------------------------------------------------
# Without DeepSpeed


@pytest.mark.parametrize("loss_scale", [1.0, 256.0])
def test_plain_model(model, loss_scale):
    wanted = expected(model)
    for param in model.parameters():
        param.grad *= loss_scale
    norms = GradientNorms(model)
    norms.measure_next_step()
    norms.measure(loss_scale)
    assert_squares(norms.squared_sums(), wanted)


def test_replicas_add_up_to_one(model, monkeypatch):
    """As DistributedDataParallel leaves them: the same gradient on every rank."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    wrapped = nn.Module()
    wrapped.module = model
    norms = GradientNorms(wrapped)
    norms.measure_next_step()
    norms.measure()
    assert_squares(total([norms.squared_sums()] * 4), expected(model))


def test_only_what_was_asked_for_is_measured_and_only_once(model):
    norms = GradientNorms(model)
    norms.measure()
    assert norms.squared_sums() is None
    norms.measure_next_step()
    assert norms.squared_sums() is None
    norms.measure()
    first = expected(model)
    for param in model.parameters():
        param.grad *= 2
    norms.measure()
    assert_squares(norms.squared_sums(), first)
    assert norms.squared_sums() is None


def test_a_new_measurement_forgets_the_last(model):
    norms = GradientNorms(model)
    norms.measure_next_step()
    norms.measure()
    norms.measure_next_step()
    assert norms.squared_sums() is None


def test_parameters_without_a_gradient_count_nothing(model):
    for name, param in model.named_parameters():
        if ".mlp.gate." in name:
            param.requires_grad, param.grad = False, None
    norms = GradientNorms(model)
    norms.measure_next_step()
    norms.measure()
    squares = norms.squared_sums()
    assert squares[FAMILIES.index("router")] == 0
    assert_squares(squares, expected(model))


def test_nan_stays_in_its_family(model):
    model.lm_head.weight.grad[3, 4] = math.nan
    norms = GradientNorms(model)
    norms.measure_next_step()
    norms.measure()
    assert [family for family, nan in zip(FAMILIES, norms.squared_sums().isnan(), strict=True) if nan] == ["embeddings"]


def test_large_gradients_are_added_exactly():
    """A float32 sum of as many elements is off by 1e-3."""
    model = nn.Module()
    model.lm_head = nn.Linear(5, 5_000_000, bias=False, device="meta").to_empty(device="cpu")
    model.lm_head.weight.grad = torch.full_like(model.lm_head.weight, 0.1)
    norms = GradientNorms(model)
    norms.measure_next_step()
    norms.measure()
    assert norms.squared_sums()[FAMILIES.index("embeddings")].item() == pytest.approx(
        25_000_000 * torch.tensor(0.1).item() ** 2, rel=1e-12
    )


# --------------------------------------------------------------------------------------------------------------------
# The engine's step


def test_engine_is_measured_before_it_clips_and_left_as_it_was(model):
    engine, wanted = Engine(model, stage=0, optimizer=torch.optim.SGD(model.parameters(), 0.1)), expected(model)
    norms = GradientNorms(engine)
    attached = set(vars(engine))
    norms.measure_next_step()
    norms.measure_next_step()
    norms.measure()
    assert norms.squared_sums() is None
    engine._take_model_step({"epoch": 1})
    assert set(vars(engine)) == attached
    assert engine.lr_kwargs == [{"epoch": 1}]
    assert_squares(norms.squared_sums(), wanted)
    assert sum(expected(model)) == pytest.approx(CLIP**2, rel=1e-4)
    engine._take_model_step(None)
    assert len(engine.lr_kwargs) == 2 and norms.squared_sums() is None


def test_a_skipped_step_has_no_norms(model):
    assert measured(Engine(model, stage=0, applies=False)) is None


def test_a_scale_that_no_loss_was_multiplied_by_is_not_taken_out(model):
    """Without ZeRO, DeepSpeed's 16-bit optimizers have a scale (`None` or a number), but the loss is not scaled."""
    for loss_scale in (None, 256.0):
        wanted = expected(model)
        assert_squares(measured(Engine(model, 0, SimpleNamespace(loss_scale=loss_scale))), wanted)


def test_experts_are_counted_by_their_replicas(model, monkeypatch):
    """Four ranks, two of which share one set of experts: each set lies on two ranks, everything else on four."""
    monkeypatch.setattr(registry, "PRESET_MODELS", dict(registry.PRESET_MODELS))
    monkeypatch.setattr(registry, "_PRESET_ADAPTERS", dict(registry._PRESET_ADAPTERS))
    monkeypatch.setenv("WORLD_SIZE", "4")
    register_preset()
    parser = AutoEP(model, parse_autoep_config({"enabled": True, "autoep_size": 1}))
    parser.replace_moe_layers(parser.ep_parser(), ep_size=1, ep_rank=0)
    for _, layer in autoep_layers(model):
        layer.ep_size = 2
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    wanted = [
        square / (2 if family == "experts" else 4) for family, square in zip(FAMILIES, expected(model), strict=True)
    ]
    assert wanted[FAMILIES.index("experts")] > 0
    assert_squares(measured(Engine(model, stage=0)), wanted)


# --------------------------------------------------------------------------------------------------------------------
# Layouts


class FlatOptimizer:
    """One group's gradients as at stages 1 and 2: one after the other, padded, and cut evenly over the ranks."""

    cpu_offload = False
    custom_loss_scaler, torch_autocast_gradscaler = False, None
    scale_if_loss = DeepSpeedZeroOptimizer.scale_if_loss

    def __init__(self, params: list[nn.Parameter], rank: int, ranks: int, marks_padding: bool, scale: float) -> None:
        whole = sum(param.numel() for param in params)
        self.size = math.ceil((whole + 1) / ranks)
        start, end, offset = rank * self.size, (rank + 1) * self.size, 0
        self.params_in_partition, self.averaged_gradients = [[]], {0: []}
        for param in params:
            first, last = max(start - offset, 0), min(end - offset, param.numel())
            if first < last:
                self.params_in_partition[0].append(param)
                piece = scale * param.grad.flatten()[first:last]
                self.averaged_gradients[0].append(piece.view(param.shape) if last - first == param.numel() else piece)
            offset += param.numel()
            if marks_padding and first < last:  # where parameters are aligned, padding may come after any of them
                padding = torch.zeros(3)
                padding._zero_padding = True
                self.averaged_gradients[0].append(padding)
        if not marks_padding:
            self.averaged_gradients[0].append(torch.zeros(1))
        self.loss_scaler = SimpleNamespace(scale_loss=lambda loss: loss * scale)

    def offload(self) -> None:
        pieces = zip(self.averaged_gradients[0], self.params_in_partition[0], strict=False)
        self.offload_gradient_dict = {0: [piece for piece, _ in pieces]}
        self.cpu_offload, self.averaged_gradients = True, {}


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize(
    ("stage", "scale", "marks_padding", "offload"),
    [(1, 1.0, False, False), (2, 256.0, False, False), (2, 256.0, True, False), (2, 1.0, False, True)],
)
def test_flat_partitions(model, ranks, stage, scale, marks_padding, offload, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    shares = []
    for rank in range(ranks):
        optimizer = FlatOptimizer(list(model.parameters()), rank, ranks, marks_padding, scale)
        if offload:
            optimizer.offload()
        shares.append(measured(Engine(model, stage, optimizer, clips=False)))
    assert_squares(total(shares), expected(model))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_parameters_cut_one_by_one(model, ranks, monkeypatch):
    """As at stage 3: every rank has an equal piece of each parameter, the last ones padded. One family is frozen."""
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    scale, gradients, shares = 128.0, {}, []
    for name, param in model.named_parameters():
        gradients[name] = param.grad.flatten()
        param.requires_grad = family_of(name) != "router"
        param.grad = None
        param.ds_id = name
    for rank in range(ranks):

        def local(param, rank=rank):
            size = math.ceil(param.numel() / ranks)
            return nn.functional.pad(scale * gradients[param.ds_id], (0, size * ranks - param.numel())).split(size)[
                rank
            ]

        for param in model.parameters():
            if param.requires_grad:  # DeepSpeed links no others
                param._z3_optimizer = SimpleNamespace(get_local_fp32_grad_for_param=local)
        optimizer = SimpleNamespace(averaged_gradients={}, scale_if_loss=lambda loss: loss * scale)
        shares.append(measured(Engine(model, 3, optimizer, clips=False)))
    for name, param in model.named_parameters():
        param.grad = gradients[name].view(param.shape) if param.requires_grad else None
    assert_squares(total(shares), expected(model))


def test_gradients_beside_the_parameters(model, monkeypatch):
    """As DeepSpeed accumulates float32 gradients of BF16 parameters at stage 1: whole on every rank."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    wanted = expected(model)
    params = list(model.parameters())
    gradients = [param.grad for param in params]
    for param in params:
        param.grad = None
    optimizer = SimpleNamespace(
        bf16_groups=[params[:7], params[7:]], fp32_groups_gradients=[gradients[:7], gradients[7:]]
    )
    shares = [measured(Engine(model, 1, optimizer, clips=False)) for _ in range(2)]
    assert_squares(total(shares), wanted)


def test_weight_tied_to_one_on_another_stage_is_left_to_that(model):
    """DeepSpeed marks those of a pipeline that another rank counts."""
    whole = expected(model)
    tied = model.model.embed_tokens.weight
    tied.ds_pipe_replicated = True
    norms = GradientNorms(model)
    norms.measure_next_step()
    norms.measure()
    whole[FAMILIES.index("embeddings")] -= tied.grad.double().square().sum().item()
    assert_squares(norms.squared_sums(), whole, rtol=1e-9)
