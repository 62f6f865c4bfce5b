"""8 bits, other optimizers and their states: what two processes do with them is what one process does.

One launch of two ranks runs all cells; with --slow there are more, and a second one resumes three of them.
"""

import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path

import oracle
import pytest
import torch
from deepspeed.runtime.zero.muon.original_muon import ns_compute_dtype
from launching import ROOT, run_cases
from safetensors.torch import load_file
from small import NUM_STEPS, deepspeed_json, flags, recipe, small_config

from moe_hf import MoEConfig, MoEForCausalLM
from moe_hf.modeling_moe import MoERotaryEmbedding
from moe_hf.parallel.float8 import convert_to_float8

LAYOUTS = {"zero1_ep": (1, 2), "zero2": (2, None), "zero2_ep": (2, 2), "zero3": (3, None), "zero3_ep": (3, 2)}
OF_FLOAT8, OF_8BIT = ("zero2_ep", "zero3", "zero3_ep"), ("zero2_ep", "zero3_ep")
OF_MUON = ("zero1_ep", "zero2", "zero2_ep", "zero3_ep")
# Rounding to 8 bits carries the last bit of 16 into the losses, and tips tokens from one expert to another.
FLOAT8_TOLERANCE = 8e-3
FLOAT8_RATE, MUON_RATE, ADAM_RATE = 3e-5, 0.01, 1e-3
# Newton-Schulz enlarges what is small in a gradient several hundred times, rounding errors included; they are larger
# where DeepSpeed iterates in 16 bits. Of losses, and of the way that a weight has gone.
MUON_TOLERANCE = (3e-4, 0.02) if ns_compute_dtype("gram") == torch.float32 else (1e-2, 0.1)
FP16_STEPS = 10
DECAY = {
    "lr_scheduler_type": "warmup_stable_decay",
    "lr_scheduler_kwargs": '{"num_decay_steps": 2, "min_lr_ratio": 0.2}',
    "warmup_steps": 2,
}
# Frequencies that no 16 bits hold, divided by factors that none hold either.
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.01, 1.37, 1.91, 3.03],
    "long_factor": [1.03, 2.01, 5.07, 9.11],
    "original_max_position_embeddings": 64,
    "factor": 1.0,
}
WORKER = ROOT / "tests" / "distributed" / "precision_worker.py"
RESUMED = ("8bit_zero2_ep", "8bit_zero3_ep", "muon_zero2_ep")
# What others show as well, and Muon, for whose other half DeepSpeed compiles its Adam first, which takes longer than
# everything else here; run with --slow, as what is resumed is.
SLOW = {
    "fp8_zero2_ep",
    "fp8_zero3",
    "fp8_checkpointing",
    "8bit_zero2_ep",
    "muon_zero1_ep",
    "muon_zero2",
    "muon_zero2_ep",
    "muon_zero3_ep",
}


def each(prefix: str, layouts: tuple[str, ...]) -> pytest.MarkDecorator:
    """Return what runs a test for every one of these layouts, for slow ones if asked."""
    marks = {True: pytest.mark.slow, False: ()}
    return pytest.mark.parametrize("layout", [pytest.param(x, marks=marks[f"{prefix}_{x}" in SLOW]) for x in layouts])


def muon_json(zero: int, ep: int | None) -> dict:
    """Return the shipped configuration at another stage, with an Adam that makes visible steps."""
    config = json.loads((ROOT / "ds_configs" / "zero2_muon.json").read_text())
    config["optimizer"]["params"]["adam_lr"] = ADAM_RATE
    config["zero_optimization"]["stage"] = zero
    if zero == 3:
        config["zero_optimization"]["reduce_scatter"] = False
    config["expert_parallel"] = {"enabled": ep is not None} | ({} if ep is None else {"autoep_size": ep})
    return config


@pytest.fixture(scope="module")
def lab(request, small_model, rows_file, tmp_path_factory) -> Path:
    """Folder with the output of every cell, and in `results` what the worker has recorded of it."""
    folder, cases = tmp_path_factory.mktemp("precision"), []
    all_cells = request.config.getoption("--slow")

    def add(name: str, config: dict, **changes) -> None:
        if name in SLOW and not all_cells:
            return
        path = folder / f"{name}.json"
        path.write_text(json.dumps(config))
        words = {"model_name_or_path": small_model, "train_file": rows_file, "output_dir": folder / name}
        cases.append({"name": name, "argv": flags(recipe([], 2), 2, deepspeed=path, **(words | changes))})

    float8 = {"bf16": True, "fp8": True, "learning_rate": FLOAT8_RATE}
    eight_bit = {"optim": "adamw_bnb_8bit", "save_strategy": "steps", "save_steps": 3}
    muon = {"learning_rate": MUON_RATE, "max_grad_norm": 0, "save_strategy": "steps", "save_steps": 3}
    for name in OF_FLOAT8:
        add(f"fp8_{name}", deepspeed_json(*LAYOUTS[name]), **float8)
    for name in OF_8BIT:
        add(f"8bit_{name}", deepspeed_json(*LAYOUTS[name]), **eight_bit)
    for name in OF_MUON:
        add(f"muon_{name}", muon_json(*LAYOUTS[name]), **muon)
    add("fp8_checkpointing", deepspeed_json(3, 2), gradient_checkpointing=True, **float8)
    # A scale at which gradients soon overflow, and that grows again after three steps without.
    scaling = {"enabled": "auto", "initial_scale_power": 18, "loss_scale_window": 3, "hysteresis": 1}
    fp16 = {"fp16": True, "max_steps": FP16_STEPS, "gradient_accumulation_steps": 1}
    add("fp16", deepspeed_json(3, 2, fp16=scaling), **fp16)
    add("decay", deepspeed_json(2, 2), **DECAY)
    config = small_config(rope_parameters=LONG_ROPE)
    config.save_pretrained(folder / "long")
    words = {"config_name": folder / "long" / "config.json", "tokenizer_name": small_model, "train_file": rows_file}
    path = folder / "long.json"
    path.write_text(json.dumps(deepspeed_json(3, None)))
    words |= {"deepspeed": path, "output_dir": folder / "long_rope", "bf16": True, "max_steps": 1}
    cases.append({"name": "long_rope", "argv": flags(recipe([], 2), 2, **words)})
    with pytest.MonkeyPatch.context() as patch:
        # Compiling Muon's few matrix products would take longer than everything else here.
        patch.setenv("TORCHDYNAMO_DISABLE", "1")
        run_cases(2, cases, folder / "results", worker=WORKER)
        if all_cells:
            again = [resumed(folder, case) for case in cases if case["name"] in RESUMED]
            run_cases(2, again, folder / "results", worker=WORKER)
    return folder


def resumed(folder: Path, case: dict) -> dict:
    """Return the command line that goes on from a copy of the folder as the run had left it after its third step."""
    name = case["name"]
    shutil.copytree(folder / name / "checkpoint-3", folder / f"resumed_{name}" / "checkpoint-3")
    words = list(case["argv"])
    words[words.index("--output_dir") + 1] = str(folder / f"resumed_{name}")
    return {"name": f"resumed_{name}", "argv": [*words, "--resume_from_checkpoint", "true"]}


def losses(lab: Path, name: str) -> list[float]:
    history = json.loads((lab / "results" / name / "result.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def exported(lab: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(lab / name / "hf" / "model.safetensors")


@pytest.fixture(scope="module")
def reference(small_model, rows) -> Callable[..., oracle.Trajectory]:
    """Function that trains in one process: with float8 layers, with another optimizer, or with AdamW in float32."""

    @cache
    def train(what: str, *args) -> oracle.Trajectory:
        model = MoEForCausalLM.from_pretrained(small_model).train()
        if what == "fp8":
            convert_to_float8(model)
            return oracle.train(model, recipe(rows, 2, FLOAT8_RATE), torch.bfloat16, pieces=2)
        if what == "muon":
            muon = partial(MuonWithAdam, experts_are_split=args[0])
            return oracle.train(model, unclipped(recipe(rows, 2, MUON_RATE)), make_optimizer=muon)
        return oracle.train(model, recipe(rows, 2))

    return train


def unclipped(recipe: oracle.Recipe) -> oracle.Recipe:
    recipe.max_grad_norm = float("inf")
    return recipe


class MuonWithAdam(torch.optim.Optimizer):
    """Muon on hidden matrices, AdamW on everything else, from their definitions, in double precision.

    Args:
        model: whose parameters are to be trained.
        experts_are_split: whether gate and up of an expert are two matrices, as AutoEP has them, or one.
    """

    def __init__(self, model: MoEForCausalLM, experts_are_split: bool) -> None:
        hidden = (".self_attn.", ".mlp.")
        not_hidden = ("norm.", ".mlp.gate.", "shared_experts_gate")
        groups = {True: [], False: []}
        self.split = set()
        for name, param in model.named_parameters():
            groups[any(w in name for w in hidden) and not any(w in name for w in not_hidden)].append(param)
            if name.endswith("gate_up_proj") and experts_are_split:
                self.split.add(param)
        assert len(groups[True]) == 4 * 4 + 2 * 3 + 2 * (2 + 3), "attention, dense MLPs, experts with shared ones"
        super().__init__(
            [{"params": groups[True], "lr": MUON_RATE}, {"params": groups[False], "lr": ADAM_RATE}],
            {"weight_decay": 0.1},
        )

    @torch.no_grad()
    def step(self) -> None:
        """Make one step of each."""
        muon, adam = self.param_groups
        for param in muon["params"]:
            momentum = self.state[param].setdefault("momentum", torch.zeros_like(param, dtype=torch.double))
            gradient = param.grad.double()
            momentum.mul_(0.95).add_(0.05 * gradient)
            nesterov = 0.05 * gradient + 0.95 * momentum
            update = torch.stack([self._orthogonal(param, m) for m in nesterov]) if param.ndim == 3 else None
            update = orthogonalized(nesterov) if update is None else update
            param.mul_(1 - muon["lr"] * muon["weight_decay"]).sub_((muon["lr"] * update).float())
        for param in adam["params"]:
            state, gradient = self.state[param], param.grad.double()
            state["t"] = t = state.get("t", 0) + 1
            state["m"] = 0.9 * state.get("m", 0.0) + 0.1 * gradient
            state["v"] = 0.999 * state.get("v", 0.0) + 0.001 * gradient**2
            update = (state["m"] / (1 - 0.9**t)) / ((state["v"] / (1 - 0.999**t)).sqrt() + 1e-5)
            param.mul_(1 - adam["lr"] * adam["weight_decay"]).sub_((adam["lr"] * update).float())

    def _orthogonal(self, param: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
        if param not in self.split:
            return orthogonalized(expert)
        return torch.cat([orthogonalized(half) for half in expert.chunk(2)])


def orthogonalized(matrix: torch.Tensor) -> torch.Tensor:
    """Return five quintic Newton-Schulz steps from the normalised matrix, times sqrt(max(1, rows / columns))."""
    rows, columns = matrix.shape
    x = matrix / (matrix.norm() + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x - 4.7750 * a @ x + 2.0315 * a @ a @ x
    return x * max(1.0, rows / columns) ** 0.5


def largest_error(values: Iterable[float], expected: Iterable[float]) -> float:
    return max(abs(value / wanted - 1) for value, wanted in zip(values, expected, strict=True))


@pytest.mark.parametrize("name", ["fp8_zero3_ep", "long_rope"])
def test_angles_are_of_32_bits_in_a_model_that_was_made_in_16(lab, name):
    """Read and made anew under ZeRO-3, which rounds tensors as they are made."""
    result = json.loads((lab / "results" / name / "result.json").read_text())
    config = MoEConfig.from_pretrained(lab / name / "hf")
    assert result["inv_freq_dtype"] == "torch.float32"
    assert result["inv_freq"] == MoERotaryEmbedding(config).inv_freq.tolist()


@each("fp8", OF_FLOAT8)
def test_float8_under_zero_and_expert_parallelism_is_that_of_one_process(lab, reference, layout):
    """The converted layers themselves are compared with their formula in `unit/training/test_float8.py`."""
    assert largest_error(losses(lab, f"fp8_{layout}"), reference("fp8").losses) < FLOAT8_TOLERANCE


def test_float8_makes_other_losses_than_16_bits(lab, small_model, rows, reference):
    """Nearer to the float8 run of one process than to its BF16 run: nobody has converted the layers back."""
    model = MoEForCausalLM.from_pretrained(small_model).train()
    bf16 = oracle.train(model, recipe(rows, 2, FLOAT8_RATE), torch.bfloat16, pieces=2)
    first = losses(lab, "fp8_zero3_ep")[0]
    assert first == pytest.approx(reference("fp8").losses[0], rel=1e-5)
    assert abs(first / bf16.losses[0] - 1) > 1e-4


@pytest.mark.slow
def test_float8_recomputes_what_it_has_computed(lab):
    assert losses(lab, "fp8_checkpointing") == losses(lab, "fp8_zero3_ep")


def test_float8_exports_an_ordinary_model(lab, small_model):
    ours, initial = exported(lab, "fp8_zero3_ep"), load_file(small_model / "model.safetensors")
    assert {name: tensor.shape for name, tensor in ours.items()} == {n: t.shape for n, t in initial.items()}
    _, info = MoEForCausalLM.from_pretrained(lab / "fp8_zero3_ep" / "hf", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


@each("8bit", OF_8BIT)
def test_8bit_adamw_learns_like_adamw(lab, reference, layout):
    name = f"8bit_{layout}"
    assert largest_error(losses(lab, name), reference("adamw").losses) < 1e-3
    assert losses(lab, name) != pytest.approx(reference("adamw").losses, rel=1e-7)


@each("muon", OF_MUON)
def test_muon_makes_the_steps_of_its_definition(lab, reference, small_model, layout):
    expected, (of_losses, of_way) = reference("muon", layout.endswith("ep")), MUON_TOLERANCE
    assert largest_error(losses(lab, f"muon_{layout}"), expected.losses) < of_losses
    initial = load_file(small_model / "model.safetensors")
    for name, tensor in exported(lab, f"muon_{layout}").items():
        way = expected.weights[name] - initial[name]
        assert (tensor - expected.weights[name]).norm() < of_way * way.norm(), name


@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_ends_as_the_whole_one(lab, name):
    assert losses(lab, f"resumed_{name}") == losses(lab, name)
    whole, ended = exported(lab, name), exported(lab, f"resumed_{name}")
    assert len(losses(lab, name)) == NUM_STEPS
    for key, tensor in whole.items():
        assert torch.equal(tensor, ended[key]), key


def test_fp16_halves_its_loss_scale_when_gradients_overflow_and_goes_on(lab):
    folder = lab / "results" / "fp16"
    record = json.loads((folder / "scales.json").read_text())
    scales, counts = record["scales"], record["skipped"]
    overflowed = [after > before for before, after in itertools.pairwise(counts)]
    assert len(overflowed) == FP16_STEPS and any(overflowed) and not all(overflowed)
    for (scale, following), skipped in zip(itertools.pairwise(scales), overflowed[:-1], strict=True):
        assert following in ([scale / 2] if skipped else [scale, 2 * scale])
    assert any(following > scale for scale, following in itertools.pairwise(scales))

    history = json.loads((folder / "result.json").read_text())["log_history"]
    steps = [entry for entry in history if "loss" in entry]
    assert [math.isinf(entry["grad_norm"]) for entry in steps] == overflowed
    assert all(math.isfinite(entry["loss"]) for entry in steps) and steps[-1]["loss"] < 5.7


def test_schedules_go_the_same_way_under_deepspeed(lab):
    """Warm-up from 0.2 to 1, two steps at 1, a cosine down to 0.2; `unit/training/test_schedules.py` has the others."""
    history = json.loads((lab / "results" / "decay" / "result.json").read_text())["log_history"]
    rates = [entry["learning_rate"] for entry in history if "loss" in entry]
    assert rates == pytest.approx([1e-3 * share for share in (0.2, 0.6, 1.0, 1.0, 1.0, 0.6)])


@pytest.mark.slow
def test_deepspeeds_cpu_adam_makes_the_steps_of_adamw(small_model, rows_file, rows, tmp_path):
    """Slow, because DeepSpeed compiles it first. It decays all parameters, norms too."""
    plan, shipped = recipe([], 2), ROOT / "ds_configs" / "zero2_ep_cpu_adam.json"
    words = flags(
        plan, 2, model_name_or_path=small_model, train_file=rows_file, deepspeed=shipped, output_dir=tmp_path / "run"
    )
    run_cases(2, [{"name": "run", "argv": words}], tmp_path / "results")

    def decaying_all(model: MoEForCausalLM) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            model.parameters(), lr=plan.learning_rate, weight_decay=plan.weight_decay, eps=plan.adam_epsilon
        )

    model = MoEForCausalLM.from_pretrained(small_model).train()
    expected = oracle.train(model, recipe(rows, 2), make_optimizer=decaying_all)
    history = json.loads((tmp_path / "results" / "run" / "result.json").read_text())["log_history"]
    steps = [entry for entry in history if "loss" in entry]
    assert [entry["loss"] for entry in steps] == pytest.approx(expected.losses, rel=2e-6)
    assert [entry["grad_norm"] for entry in steps] == pytest.approx(expected.grad_norms, rel=2e-6)
    for name, tensor in load_file(tmp_path / "run" / "hf" / "model.safetensors").items():
        assert (tensor - expected.weights[name]).norm() <= 1e-5 * expected.weights[name].norm(), name
