"""What the model announces to Transformers' kernels interface: its norm, and the rotation of queries and keys."""

import sys
from importlib.util import module_from_spec, spec_from_file_location

import pytest
import torch
import transformers.integrations
from helpers_model import tiny_config

import moe_hf.modeling_moe


class Announced:
    """In the place of a function, as the `kernels` package has it: its forward can be exchanged."""

    def __init__(self, forward, name: str) -> None:
        self.forward, self.kernel_layer_name = forward, name

    def __call__(self, *args, **kwargs):
        return self.forward(*args, **kwargs)


@pytest.fixture
def modeling(monkeypatch):
    """The modeling file, imported once more where `kernels` is there."""

    def announce(name: str):
        def decorate(kind):
            if not isinstance(kind, type):
                return Announced(kind, name)
            kind.kernel_layer_name = name
            return kind

        return decorate

    def attach(function: Announced):
        def decorate(kind):
            kind.kernel_functions = {function.kernel_layer_name: function}
            return kind

        return decorate

    monkeypatch.setattr(transformers.integrations, "use_kernel_forward_from_hub", announce)
    monkeypatch.setattr(transformers.integrations, "use_kernelized_func", attach)
    spec = spec_from_file_location("moe_hf.modeling_again", moe_hf.modeling_moe.__file__)
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "moe_hf.modeling_again", module)
    spec.loader.exec_module(module)
    return module


def test_norm_and_rotation_can_be_found(modeling):
    assert modeling.MoERMSNorm.kernel_layer_name == "RMSNorm"
    assert modeling.apply_rotary_pos_emb.kernel_layer_name == "rotary_pos_emb"
    assert modeling.MoEAttention.kernel_functions == {"rotary_pos_emb": modeling.apply_rotary_pos_emb}


@pytest.mark.parametrize("partial", [0.5, 1.0])
def test_a_kernel_rotates_whole_heads_of_the_width_that_is_rotated(modeling, partial):
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": partial}
    torch.manual_seed(0)
    model = modeling.MoEForCausalLM(tiny_config(rope_parameters=rope)).eval()
    ids = torch.randint(61, (2, 9))
    expected, shapes = model(ids).logits, []

    def kernel(q, k, cos, sin, unsqueeze_dim=1):
        """Turn pairs of channels as complex numbers."""
        shapes.append([tuple(x.shape) for x in (q, k, cos, sin)])
        half = cos.shape[-1] // 2
        turn = torch.complex(cos[..., :half], sin[..., :half]).unsqueeze(unsqueeze_dim)
        turned = [torch.complex(x[..., :half], x[..., half:]) * turn for x in (q, k)]
        return tuple(torch.cat((x.real, x.imag), dim=-1) for x in turned)

    modeling.apply_rotary_pos_emb.forward = kernel
    torch.testing.assert_close(model(ids).logits, expected)
    width = int(8 * partial)
    assert shapes == 2 * [[(2, 4, 9, width), (2, 2, 9, width), (1, 9, width), (1, 9, width)]]


def test_a_norm_from_the_hub_finds_what_it_reads(modeling):
    """Layers of the hub bring a forward pass only: weight and epsilon are named as in Transformers."""
    norm = modeling.MoERMSNorm(16, 1e-5)
    assert set(dict(norm.named_parameters())) == {"weight"} and norm.variance_epsilon == 1e-5
