"""When SonicMoE computes the experts, what is said where it cannot, and that our model hands it what it expects."""

from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from small import small_config
from transformers.integrations import sonicmoe

from moe_hf import MoEForCausalLM
from moe_hf.errors import ConfigError
from moe_hf.parallel.failure import FailureRelay
from moe_hf.training import experts_kernel
from moe_hf.training.experts_kernel import choose_experts
from moe_hf.training.run import build_trainer

AMPERE, HOPPER, BLACKWELL = (8, 0), (9, 0), (10, 0)


@pytest.fixture
def machine(monkeypatch):
    """Function that makes this a machine with a GPU of some capability, with or without what SonicMoE needs."""

    def make(capability: tuple[int, int], installed: bool, error: Exception | None = None) -> None:
        def load() -> None:
            if error is not None:
                raise error

        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(experts_kernel, "is_sonicmoe_loadable", lambda: installed)
        monkeypatch.setattr(experts_kernel, "load_sonicmoe_kernel", load)

    return make


@pytest.mark.parametrize(
    ("capability", "installed", "in_bfloat16", "in_autoep", "chosen"),
    [
        (HOPPER, True, True, False, "sonicmoe"),
        (HOPPER, False, True, False, None),
        (HOPPER, True, False, False, None),
        (HOPPER, True, True, True, None),
        (BLACKWELL, True, True, False, None),
        (AMPERE, True, True, False, None),
    ],
)
def test_chosen_on_hopper_where_it_is_installed(capability, installed, in_bfloat16, in_autoep, chosen, machine):
    machine(capability, installed)
    assert choose_experts(None, in_bfloat16=in_bfloat16, in_autoep=in_autoep) == chosen


def test_what_is_asked_for_wins(machine):
    machine(HOPPER, True)
    for asked in ("moe_hf", "eager", "grouped_mm"):
        assert choose_experts(asked, in_bfloat16=True, in_autoep=False) == asked
    machine(BLACKWELL, True)
    assert choose_experts("sonicmoe", in_bfloat16=True, in_autoep=False) == "sonicmoe"


def test_our_kernel_where_nobody_asked_and_it_cannot_be_loaded(machine, monkeypatch, caplog):
    machine(HOPPER, True, OSError("no network"))
    monkeypatch.setattr(experts_kernel.logger, "propagate", True)
    with caplog.at_level("WARNING", logger=experts_kernel.__name__):
        assert choose_experts(None, in_bfloat16=True, in_autoep=False) is None
    assert "SonicMoE cannot be loaded, so our own kernel computes the experts: no network" in caplog.text


def test_what_cannot_work_is_one_sentence_before_the_run(tmp_path):
    words = ["--config_name", "quickstart", "--do_train", "--output_dir", str(tmp_path / "out")]
    asked = ["--experts_implementation", "sonicmoe"]
    with pytest.raises(ConfigError, match="computes in bfloat16 only; add --bf16, or leave the flag away"):
        build_trainer([*words, *asked], FailureRelay())
    sentence = (
        r"sonicmoe cannot be loaded here \(sonic-moe requires .*\); pip install 'moe_hf\[sonicmoe\]' on a machine"
    )
    with pytest.raises(ConfigError, match=sentence):
        build_trainer([*words, *asked, "--bf16"], FailureRelay())


def in_plain_pytorch(x, scores, tokens, experts, gate_up, _, down, __, *, E, activation_type, concat_layout, **___):
    """What `moe_general_routing_inputs` of SonicMoE computes; weights are `(2I, H, E)` and `(H, I, E)`."""
    assert concat_layout and activation_type == "swiglu" and tokens.dtype == experts.dtype == torch.int32
    output = torch.zeros_like(x)
    for row, (token, expert) in enumerate(zip(tokens.tolist(), experts.tolist(), strict=True)):
        gate, up = (gate_up[:, :, expert] @ x[token]).chunk(2)
        output = output.index_add(
            0, tokens[row : row + 1], scores[row] * (down[:, :, expert] @ (F.silu(gate) * up))[None]
        )
    return output, torch.bincount(experts, minlength=E)


def test_our_model_hands_it_what_it_expects(monkeypatch):
    """Transformers' adapter around a kernel in plain PyTorch gives what the loop over experts gives."""

    class Activations:
        SWIGLU = "swiglu"

    kernel = Mock(side_effect=in_plain_pytorch)
    monkeypatch.setattr(sonicmoe, "_SONICMOE", sonicmoe.SonicMoE(Activations, kernel))
    torch.manual_seed(0)
    tokens = torch.arange(12).view(2, 6)
    models = [
        MoEForCausalLM._from_config(small_config(), dtype=torch.float64, experts_implementation=name)
        for name in ("eager", "sonicmoe")
    ]
    models[1].load_state_dict(models[0].state_dict())
    losses = [model(tokens, labels=tokens).loss for model in models]
    assert kernel.call_count == models[1].config.num_sparse_layers
    torch.testing.assert_close(losses[1], losses[0])
    for loss in losses:
        loss.backward()
    for (name, one), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, msg=lambda text, name=name: f"{name}: {text}")
