"""The matrix: every ZeRO stage × number of ranks × expert parallelism × kind of routing gives what one process gives.

One launch for 2 ranks and one for 4 run all cells through run_clm_moe.py's own code; the tests then look at what each
cell has left: losses, gradient norms and exported weights against the oracle, and the export against the live model.
"""

import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import median

import oracle
import pytest
import torch
from launching import run_cases
from safetensors.torch import load_file
from small import NUM_STEPS, deepspeed_json, flags, recipe, save_small_model, small_config

from moe_hf import MoEConfig, MoEForCausalLM

TOLERANCE = {"fp32": 2e-6, "bf16": 5e-3, "fp16": 5e-3}
WEIGHT_TOLERANCE = 1e-5
# Sigmoid scores of clear experts all lie near 1, so that rounding tips a few tokens: even in one process the norm moves
# by up to 2e-2 when the micro-batches are cut into other pieces.
NORM_TOLERANCE = {"sigmoid": TOLERANCE | {"bf16": 2e-2}}
# One family's norm is noisier in 16 bits: in one process, a token that another kernel of the experts or other pieces of
# a micro-batch tip to another expert moves the experts' norm of that step by 7e-3, two by 1.8e-2, and more with sigmoid
# scores. So half of the steps have to agree better than all of them. None tips at the first step, on equal weights.
FAMILY_TOLERANCE = {"fp32": 1e-6, "bf16": 2e-2, "fp16": 5e-3}
FAMILY_TOLERANCE_OF_SIGMOID = FAMILY_TOLERANCE | {"bf16": 3e-2}
FAMILY_TOLERANCE_OF_HALF = {"fp32": 1e-6, "bf16": 6e-3, "fp16": 5e-3}
FAMILY_TOLERANCE_AT_FIRST = {"fp32": 1e-6, "bf16": 4e-3, "fp16": 4e-3}
# Adam's first steps follow the sign of every gradient. In 16 bits many signs are rounding noise, so two runs part by
# the size of their steps; small steps leave what is to be compared.
LEARNING_RATE = {"fp32": 1e-3, "bf16": 3e-5, "fp16": 3e-5}
# What each kind of routing changes in the small model. Biases begin unequal and make large steps, so that they matter.
ROUTING = {
    "softmax": {},
    "sigmoid": {
        "scoring_func": "sigmoid",
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 1.5,
        "shared_expert_gate": False,
        "router_balancing": "loss_free",
        "router_bias_update_speed": 0.02,
    },
    "sequence": {"router_aux_loss_scope": "sequence", "topk_before_softmax": True},
    "local": {"router_aux_loss_scope": "local"},
    "none": {"router_balancing": "none"},
    "sinkhorn": {"router_balancing": "sinkhorn"},
    "position": {"expert_capacity_factor": 0.8, "token_drop_policy": "position"},
    "probability": {"expert_capacity_factor": 0.8, "token_drop_policy": "probability"},
    "expert_choice": {"router_balancing": "expert_choice"},
    "noise": {"router_jitter_noise": 0.3, "expert_capacity_factor": 1.0},
}
ROUTING["deepseek"] = ROUTING["sigmoid"] | {"router_aux_loss_scope": "sequence"}
HAS_BIASES = ("sigmoid", "deepseek")
# These look at the tokens that one rank routes together.
BY_RANK = ("local", "sinkhorn", "position", "probability", "expert_choice", "noise")
# The oracle takes their outputs from the model, but knows only plain choices.
UNEXPLAINED = ("sinkhorn", "expert_choice")
# Recomputation must not choose, drop or draw anew.
CHECKPOINTED = ("sinkhorn", "probability", "noise")
TORCH_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Cell:
    """One run of the matrix; `ep` `None` is AutoEP off."""

    zero: int
    ranks: int
    ep: int | None
    accumulation: int
    dtype: str = "fp32"
    routing: str = "softmax"

    @property
    def name(self) -> str:
        ep = "off" if self.ep is None else self.ep
        return f"zero{self.zero}-ranks{self.ranks}-ep_{ep}-ga{self.accumulation}-{self.dtype}-{self.routing}"

    @property
    def is_slow(self) -> bool:
        """Always run what no other cell shows; of four processes, replicas of experts and experts over four."""
        if self.ranks == 2:
            if self.routing in ("sequence", "local", "none") and (self.zero, self.ep) == (3, 2):
                return True
            plain = self.routing == "softmax" and self.zero in (1, 2) and self.ep != 2
            return plain and (self.accumulation == 1 or (self.dtype == "bf16" and self.zero == 1))
        shown_by_four = self.accumulation == 2 and self.zero >= 2 and self.ep != 1
        return self.ranks == 4 and (not shown_by_four or (self.dtype == "bf16" and (self.zero, self.ep) != (3, 4)))

    @property
    def recipe(self) -> oracle.Recipe:
        """What the cell's run is given, but for its rows."""
        given = recipe([], self.accumulation, LEARNING_RATE[self.dtype])
        if not self.config.has_balancing_loss:
            given = replace(given, aux_coef=0.0)
        if self.routing in HAS_BIASES:
            given = replace(given, bias_update_speed=self.config.router_bias_update_speed)
        return given

    @property
    def config(self) -> MoEConfig:
        """The model's configuration."""
        return small_config(**ROUTING[self.routing])


def cells(ranks: int) -> list[Cell]:
    """Return all cells of one launch."""
    sizes = [None, *(size for size in (1, 2, 4) if ranks % size == 0)]
    matrix = [Cell(zero, ranks, ep, ga) for zero in (1, 2, 3) for ep in sizes for ga in (1, 2)]
    matrix += [Cell(0, ranks, None, ga) for ga in (1, 2)]
    matrix += [Cell(zero, ranks, ep, 2, "bf16") for zero in (1, 2, 3) for ep in (None, ranks)]
    if ranks == 2 and torch.ops.mkldnn._is_mkldnn_fp16_supported():
        matrix += [Cell(2, ranks, 2, 1, "fp16")]
    if ranks == 2:
        matrix += [Cell(zero, ranks, ep, 2, routing="sigmoid") for zero in (2, 3) for ep in (None, 2)]
        matrix += [Cell(zero, ranks, 2, 1, dtype, "sigmoid") for zero in (2, 3) for dtype in ("fp32", "bf16")]
        for routing in ("sequence", "local", "none", "sinkhorn", "position", "probability"):
            layouts = [(2, 2, 2), (3, None, 1), (3, 2, 1)]
            matrix += [Cell(zero, ranks, ep, ga, routing=routing) for zero, ep, ga in layouts]
        matrix += [Cell(zero, ranks, None, 2, routing="expert_choice") for zero in (1, 2, 3)]
        matrix += [Cell(3, ranks, 2, 2, routing="deepseek")]
        matrix += [Cell(zero, ranks, ep, 2, routing="noise") for zero, ep in ((2, None), (2, 2), (3, 2))]
    return matrix


ALL_CELLS = [cell for ranks in (2, 4) for cell in cells(ranks)]


def each(cells: list[Cell]) -> pytest.MarkDecorator:
    """Return what runs a test for every one of these cells, for slow ones if asked."""
    marks = {True: pytest.mark.slow, False: ()}
    return pytest.mark.parametrize("cell", [pytest.param(c, id=c.name, marks=marks[c.is_slow]) for c in cells])


# Noise is drawn in the order of a rank's own work, which one process cannot follow.
REPRODUCED = [cell for cell in ALL_CELLS if cell.routing != "noise"]


def command_line(cell: Cell, model: Path, rows_file: Path, folder: Path) -> list[str]:
    """Return the words after `run_clm_moe.py`."""
    path = folder / f"{cell.name}.json"
    path.write_text(json.dumps(deepspeed_json(cell.zero, cell.ep)))
    return flags(
        cell.recipe,
        cell.ranks,
        model_name_or_path=model,
        train_file=rows_file,
        output_dir=folder / cell.name,
        deepspeed=path,
        bf16=cell.dtype == "bf16",
        fp16=cell.dtype == "fp16",
        gradient_checkpointing=cell.routing in CHECKPOINTED,
        dead_expert_steps=1,
    )


@pytest.fixture(scope="session")
def initial_models(small_model, tmp_path_factory) -> dict[str, Path]:
    """Folder of the initial weights for each kind of routing."""
    folders = {"softmax": small_model}
    for routing in ROUTING.keys() - folders.keys():
        folder = folders[routing] = tmp_path_factory.mktemp(f"{routing}_model")
        save_small_model(folder, **ROUTING[routing])
        if routing in HAS_BIASES:
            model = MoEForCausalLM.from_pretrained(folder)
            for number, layer in enumerate(model.model.layers[1::2]):
                size = len(layer.mlp.gate.e_score_correction_bias)
                layer.mlp.gate.e_score_correction_bias.copy_(0.05 * torch.arange(size).roll(3 * number) - 0.2)
            model.save_pretrained(folder)
    return folders


@pytest.fixture(scope="session")
def oracles(initial_models, rows):
    """Function from a cell to the trajectory of one process; cells that differ in nothing else share one."""

    @cache
    def train(like: Cell, pieces: int) -> oracle.Trajectory:
        model = MoEForCausalLM.from_pretrained(initial_models[like.routing]).train()
        return oracle.train(model, replace(like.recipe, rows=rows), TORCH_DTYPE[like.dtype], pieces)

    def of(cell: Cell) -> oracle.Trajectory:
        pieces = 1 if cell.dtype == "fp32" and cell.routing not in BY_RANK else cell.ranks
        return train(replace(cell, zero=0, ranks=1, ep=None), pieces)

    return of


@pytest.fixture(scope="session")
def runs(initial_models, rows_file, tmp_path_factory):
    """Function from a cell to the folder of its results and the folder of its export; launches many cells at once."""
    folder = tmp_path_factory.mktemp("parity")
    launched = set()

    def of(cell: Cell) -> tuple[Path, Path]:
        if (cell.ranks, cell.is_slow) not in launched:
            launched.add((cell.ranks, cell.is_slow))
            lines = [
                {"name": c.name, "argv": command_line(c, initial_models[c.routing], rows_file, folder)}
                for c in cells(cell.ranks)
                if c.is_slow == cell.is_slow
            ]
            run_cases(cell.ranks, lines, folder / "results")
        return folder / "results" / cell.name, folder / cell.name / "hf"

    return of


def logged_steps(cell: Cell, runs) -> list[dict]:
    """Return the log entries of a cell's steps."""
    _, export = runs(cell)
    lines = [json.loads(line) for line in (export.parent / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def test_routing_is_unbalanced(oracles):
    """Otherwise a wrong count of tokens would not show."""
    assert max(oracles(ALL_CELLS[0]).largest_loads) > 1.5


@each(REPRODUCED)
def test_trajectory_equals_one_process(cell, runs, oracles, parity_table):
    _, export = runs(cell)
    steps, expected = logged_steps(cell, runs), oracles(cell)
    assert len(steps) == NUM_STEPS

    loss = max(abs(entry["loss"] / value - 1) for entry, value in zip(steps, expected.losses, strict=True))
    norm = max(abs(entry["grad_norm"] / value - 1) for entry, value in zip(steps, expected.grad_norms, strict=True))
    weights = load_file(export / "model.safetensors")
    distances = {
        name: ((tensor.float() - expected.weights[name]).norm() / expected.weights[name].norm()).item()
        for name, tensor in weights.items()
    }
    worst = max(distances, key=distances.get)
    parity_table.append((cell, loss, norm, distances[worst]))

    assert loss <= TOLERANCE[cell.dtype]
    assert norm <= NORM_TOLERANCE.get(cell.routing, TOLERANCE)[cell.dtype]
    if cell.dtype == "fp32":
        assert distances[worst] <= WEIGHT_TOLERANCE, worst


@each(REPRODUCED)
def test_gradient_norms_by_family_equal_one_process(cell, runs, oracles):
    """Each family's norm, and their root of the sum of squares, which is what the engine clips by."""
    tolerance = (FAMILY_TOLERANCE_OF_SIGMOID if cell.routing == "sigmoid" else FAMILY_TOLERANCE)[cell.dtype]
    pairs = list(zip(logged_steps(cell, runs), oracles(cell).family_norms, strict=True))
    for family in pairs[0][1]:
        errors = [abs(entry[f"grad_norm/{family}"] / expected[family] - 1) for entry, expected in pairs]
        assert errors[0] <= FAMILY_TOLERANCE_AT_FIRST[cell.dtype], (family, errors)
        assert median(errors) <= FAMILY_TOLERANCE_OF_HALF[cell.dtype], (family, errors)
        assert max(errors) <= tolerance, (family, errors)


@each([c for c in REPRODUCED if c.dtype == "fp32" and c.routing not in UNEXPLAINED])
def test_logged_routing_equals_one_process(cell, runs, oracles):
    """Over ranks, expert parallelism and accumulation; every step is an entry."""
    entries, expected = logged_steps(cell, runs), oracles(cell)
    assert [entry["num_tokens"] for entry in entries] == expected.num_tokens
    for entry, layers in zip(entries, expected.routing, strict=True):
        for number, layer in zip((1, 3), layers, strict=True):
            # Whole numbers of assignments over their sum: not a single one may differ.
            assert entry["expert_load"][f"layer_{number}"] == pytest.approx(layer["expert_load"], abs=1e-12)
            assert entry[f"dead_experts/layer_{number}"] == layer["dead_experts"]
            for name in ("max_vio", "router_entropy", "router_logit_max"):
                assert entry[f"{name}/layer_{number}"] == pytest.approx(layer[name], rel=1e-4), name
        assert entry["max_vio"] == pytest.approx(sum(layer["max_vio"] for layer in layers) / 2, rel=1e-6)


@each([c for c in ALL_CELLS if c.routing == "noise"])
def test_noise_does_not_depend_on_the_layout(cell, runs):
    """The same numbers are drawn with expert parallelism as without, and by recomputation as before."""

    def losses(of: Cell) -> list[float]:
        return [entry["loss"] for entry in logged_steps(of, runs)]

    assert losses(cell) == pytest.approx(losses(Cell(2, 2, None, 2, routing="noise")), rel=TOLERANCE["fp32"])


@each([c for c in ALL_CELLS if c.routing in HAS_BIASES])
def test_biases_move_as_in_one_process(cell, runs, oracles, initial_models):
    _, export = runs(cell)
    weights, start = (load_file(folder / "model.safetensors") for folder in (export, initial_models[cell.routing]))
    biases = [name for name in weights if name.endswith(".mlp.gate.e_score_correction_bias")]
    assert len(biases) == 2
    for name in biases:
        assert weights[name].dtype == torch.float32
        if cell.dtype == "fp32":
            # Steps differ in nothing but their sign, and one that is wrong would be seen.
            torch.testing.assert_close(weights[name], oracles(cell).weights[name], rtol=0.0, atol=1e-6)
        assert (weights[name] - start[name]).abs().max() > 0.05


@each(ALL_CELLS)
def test_loss_is_the_sum_of_its_logged_parts(cell, runs):
    config = cell.config
    aux_coef = config.router_aux_loss_coef if config.has_balancing_loss else 0.0
    for entry in logged_steps(cell, runs):
        parts = (
            entry["ce_loss"]
            + aux_coef * (entry["aux_loss/layer_1"] + entry["aux_loss/layer_3"])
            + config.router_z_loss_coef * (entry["z_loss/layer_1"] + entry["z_loss/layer_3"])
        )
        assert parts == pytest.approx(entry["loss"], rel=1e-5)


@each([c for c in ALL_CELLS if c.ep is not None])
def test_dropped_assignments_are_still_dispatched(cell, runs):
    """A capacity changes weights to 0, not what AutoEP sends: every token goes to as many experts as without."""
    dispatched = json.loads((runs(cell)[0] / "result.json").read_text())["dispatched"]
    num_tokens = 2 * 12 * cell.ranks  # the probe
    least = num_tokens * cell.config.num_experts_per_tok
    # DeepSpeed rounds the rows of each expert up to a multiple of 8.
    assert all(least <= rows < least + 8 * cell.config.num_experts * cell.ranks for rows in dispatched)


@each(ALL_CELLS)
def test_export_is_the_live_model(cell, runs):
    results, export = runs(cell)
    live = torch.load(results / "live.pt")
    model, info = MoEForCausalLM.from_pretrained(export, output_loading_info=True, dtype="auto")
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]

    weights = load_file(export / "model.safetensors")
    assert weights.keys() == live["weights"].keys()
    for name, tensor in weights.items():
        assert tensor.dtype == live["weights"][name].dtype
        assert torch.equal(tensor, live["weights"][name]), name
    experts = weights["model.layers.1.mlp.experts.down_proj"]
    assert len({expert.float().sum().item() for expert in experts}) == len(experts)

    with torch.no_grad():
        logits = model.eval()(torch.arange(3, 27).reshape(2, 12)).logits
    if cell.ep is None:
        assert torch.equal(logits, live["logits"])
    else:
        # AutoEP multiplies gate and up separately and sums in another order than the model it has replaced.
        tolerance = 5e-6 if cell.dtype == "fp32" else 1e-2
        torch.testing.assert_close(logits.float(), live["logits"].float(), rtol=tolerance, atol=tolerance)


@each(ALL_CELLS)
def test_export_generates(cell, runs):
    _, export = runs(cell)
    if cell.routing == "expert_choice":
        with pytest.raises(ValueError, match="cannot generate"):
            MoEForCausalLM.from_pretrained(export).generate(torch.tensor([[5, 6, 7]]))
        return
    model = MoEForCausalLM.from_pretrained(export)
    tokens = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert tokens.shape == (1, 9)
