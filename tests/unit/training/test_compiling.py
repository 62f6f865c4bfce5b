"""Compiled parts compute what they did, are compiled once, and leave names, hooks and checkpointing alone."""

import json
from dataclasses import replace

import oracle
import pytest
import torch
from safetensors.torch import load_file
from small import flags, make_rows, recipe, save_small_model, small_config
from torch._dynamo.utils import counters

from moe_hf import MoEForCausalLM
from moe_hf.errors import ConfigError
from moe_hf.parallel.failure import FailureRelay
from moe_hf.training.compiling import check_compilation, compile_dense_parts
from moe_hf.training.run import build_trainer, execute

# Norms, dense MLPs, shared experts (the same code on tokens without a batch) and the projections of attention.
NUM_REGIONS = 4


@pytest.fixture(autouse=True)
def nothing_compiled():
    """Forget what other tests have compiled, before and after."""
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()
    counters.clear()


def num_graphs() -> int:
    """Return how many graphs were compiled, after making sure that none of them was cut into pieces."""
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


def twins(backend: str = "eager", **changes) -> tuple[MoEForCausalLM, MoEForCausalLM]:
    """Return two equal models in training, the second of them compiled; the backend `"eager"` only takes it apart."""
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(MoEForCausalLM(small_config(**changes)).train())
    compile_dense_parts(models[1], backend=backend)
    return models[0], models[1]


def batch(length: int, num_rows: int = 2) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 128, (num_rows, length))
    mask = torch.ones_like(ids)
    mask[0, length - 3 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def assert_same_step(plain: MoEForCausalLM, compiled: MoEForCausalLM, inputs: dict) -> None:
    """Compare loss and every gradient."""
    losses = []
    for model in (plain, compiled):
        model.zero_grad()
        loss = model(**inputs, use_cache=False).loss
        loss.backward()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    for (name, parameter), (_, other) in zip(plain.named_parameters(), compiled.named_parameters(), strict=True):
        assert (other.grad - parameter.grad).norm() <= 1e-5 * parameter.grad.norm(), name


def test_lengths_and_layers_share_what_is_compiled():
    plain, compiled = twins(num_hidden_layers=10)  # more than the versions of one function that torch allows
    for length in (12, 12, 19, 7, 31):
        assert_same_step(plain, compiled, batch(length))
    assert num_graphs() == NUM_REGIONS
    for model in (plain.eval(), compiled.eval()):
        with torch.no_grad():
            model(**batch(9, num_rows=3))
    # Evaluation has versions of its own, which need no backward pass; again not by layer.
    assert num_graphs() == 2 * NUM_REGIONS


@pytest.mark.parametrize(
    "changes",
    [
        {"qk_norm_scope": "full", "attention_gate": "elementwise", "attention_bias": True},
        {"use_qk_norm": False, "num_experts": 0, "shared_expert_intermediate_size": 0, "shared_expert_gate": False},
        {"router_balancing": "expert_choice", "shared_expert_gate": False},
    ],
    ids=["gated", "dense", "expert_choice"],
)
def test_variants_of_the_model_compute_the_same(changes):
    plain, compiled = twins(**changes)
    assert_same_step(plain, compiled, batch(14))
    assert num_graphs() >= 3


def test_works_with_gradient_checkpointing():
    plain, compiled = twins("aot_eager", router_jitter_noise=0.2)
    compiled.gradient_checkpointing_enable({"use_reentrant": False})
    for length in (12, 19):
        inputs = batch(length)
        torch.manual_seed(1)
        plain.zero_grad()
        plain(**inputs, use_cache=False).loss.backward()
        torch.manual_seed(1)
        compiled.zero_grad()
        compiled(**inputs, use_cache=False).loss.backward()
        for (name, parameter), (_, other) in zip(plain.named_parameters(), compiled.named_parameters(), strict=True):
            assert (other.grad - parameter.grad).norm() <= 1e-5 * parameter.grad.norm(), name
    assert num_graphs() == NUM_REGIONS


def test_hooks_see_what_they_did():
    plain, compiled = twins()
    assert_same_step(plain, compiled, batch(12))  # compiled before there are hooks
    seen = {}

    def watch(model: MoEForCausalLM, into: list) -> None:
        for layer in model.model.layers:
            layer.self_attn.tap.register_forward_hook(lambda _, inputs, output: into.append(output[0].detach()))
            layer.input_layernorm.register_forward_hook(lambda _, inputs, output: into.append(output.detach()))
            layer.mlp.register_forward_hook(lambda _, inputs, output: into.append(output.detach()))

    inputs = batch(12)
    for name, model in (("plain", plain), ("compiled", compiled)):
        watch(model, seen.setdefault(name, []))
        outputs = model(**inputs, output_hidden_states=True, output_router_logits=True, use_cache=False)
        seen[name] += [*outputs.hidden_states, *outputs.router_logits]
    assert len(seen["plain"]) == 3 * 4 + 5 + 2
    for expected, found in zip(seen["plain"], seen["compiled"], strict=True):
        torch.testing.assert_close(found, expected)


def test_names_saving_and_generating_stay_as_they_are(tmp_path):
    plain, compiled = twins()
    assert list(compiled.state_dict()) == list(plain.state_dict())
    prompt = torch.tensor([[5, 6, 7]])
    words = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    expected = plain.eval().generate(prompt, **words)
    assert torch.equal(compiled.eval().generate(prompt, **words), expected)
    compiled.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert not any("_orig_mod" in name for name in saved)
    assert torch.equal(MoEForCausalLM.from_pretrained(tmp_path).generate(prompt, **words), expected)


def test_fewer_tensors_are_kept_for_the_backward_pass():
    """Norms and activations are computed again from their inputs, which costs less than keeping each of their steps."""

    def kept_bytes(model: MoEForCausalLM) -> int:
        inputs = batch(24)
        model(**inputs, use_cache=False)
        storages = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = model(**inputs, use_cache=False)
        assert outputs.loss.requires_grad
        return sum(storages.values())

    plain, compiled = twins("aot_eager")
    assert kept_bytes(compiled) < 0.95 * kept_bytes(plain)


@pytest.fixture
def compiled_run(tmp_path, no_state_of_earlier_runs):
    """Function that trains through the command line and returns the oracle's trajectory, the log and the weights."""

    def run(*words: str):
        save_small_model(tmp_path / "model")
        given = recipe(make_rows(48), accumulation=2)
        rows = tmp_path / "rows.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in given.rows))
        paths = {"model_name_or_path": tmp_path / "model", "train_file": rows, "output_dir": tmp_path / "out"}
        execute(build_trainer([*flags(given, 1, **paths), *words], FailureRelay()))
        lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
        expected = oracle.train(MoEForCausalLM.from_pretrained(tmp_path / "model").train(), replace(given))
        return expected, [x for x in lines if "loss" in x], load_file(tmp_path / "out" / "hf" / "model.safetensors")

    return run


@pytest.mark.parametrize(
    "words",
    [
        ("--torch_compile_backend", "aot_eager"),
        # C++ has to be compiled: half a minute.
        pytest.param(("--torch_compile",), marks=pytest.mark.slow),
        pytest.param(("--torch_compile", "--gradient_checkpointing"), marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_a_compiled_run_equals_one_that_compiles_nothing(words, compiled_run):
    expected, steps, weights = compiled_run(*words)
    # Accelerate has compiled nothing besides.
    assert num_graphs() == NUM_REGIONS
    assert [step["loss"] for step in steps] == pytest.approx(expected.losses, rel=2e-6)
    assert [step["grad_norm"] for step in steps] == pytest.approx(expected.grad_norms, rel=2e-6)
    assert all(0 < step["attention_sink"] < 1 for step in steps)
    for name, tensor in weights.items():
        assert (tensor - expected.weights[name]).norm() <= 1e-5 * expected.weights[name].norm(), name


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--torch_compile_backend", "fast"], "torch_compile_backend fast is unknown"),
        (["--torch_compile_backend", "cudagraphs"], "records CUDA graphs"),
        (["--torch_compile_mode", "reduce-overhead"], "torch_compile_mode reduce-overhead records CUDA graphs"),
        (["--torch_compile", "--torch_compile_mode", "fastest"], "torch_compile_mode fastest is unknown"),
        (["--torch_compile_backend", "eager", "--torch_compile_mode", "default"], "is one of inductor's"),
    ],
)
def test_what_cannot_be_compiled_is_said_before_the_run(words, sentence, tmp_path):
    given = ["--config_name", "quickstart", "--do_train", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ConfigError, match=sentence):
        build_trainer([*given, *words], FailureRelay())


def test_a_missing_compiler_is_one_sentence():
    check_compilation(None, None)
    check_compilation(None, "max-autotune-no-cudagraphs")
    with torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        check_compilation("aot_eager", None)
        with pytest.raises(ConfigError, match="needs a C\\+\\+ compiler and finds none"):
            check_compilation(None, None)
