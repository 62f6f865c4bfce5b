"""Tensor parallelism × ZeRO × expert parallelism gives what one process gives, and exports, evaluates and resumes.

One launch of two ranks that share everything; with `--slow` one of four ranks, where pairs of ranks share matrices.
"""

import json
import math
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import oracle
import pytest
import torch
from launching import ROOT, run_cases
from safetensors.torch import load_file
from small import NUM_STEPS, deepspeed_json, flags, make_rows, recipe, save_small_model, small_config

from moe_hf import MoEForCausalLM
from moe_hf.parallel.failure import FailureRelay
from moe_hf.training.run import build_trainer, execute

WORKER = Path(__file__).with_name("tensor_parallel_worker.py")
SHIPPED = ROOT / "ds_configs" / "zero2_tp_ep.json"
SIZE = 2  # ranks that share matrices
TOLERANCE = {"fp32": 2e-6, "bf16": 5e-3}
# Parts of a sum are rounded to 16 bits before they are added up over ranks.
NORM_TOLERANCE = {"fp32": 2e-6, "bf16": 1e-2}
FAMILY_TOLERANCE = {"fp32": 1e-6, "bf16": 1e-2}
WEIGHT_TOLERANCE = 1e-5
LEARNING_RATE = {"fp32": 1e-3, "bf16": 3e-5}
# What else attention, head and router can have: a gate and biases that are cut, a bias that is not, a matrix that
# stands in two places, biases that follow the loads of all ranks.
MODELS = {
    "plain": {},
    "gated": {"attention_gate": "headwise", "attention_bias": True, "tie_word_embeddings": True},
    "elementwise": {"attention_gate": "elementwise", "use_qk_norm": False, "shared_expert_gate": False},
    "loss_free": {"scoring_func": "sigmoid", "router_balancing": "loss_free", "router_bias_update_speed": 0.02},
}
# Drawn by every rank of a group for itself.
NOISE = "hidden_dropout=0.1,router_jitter_noise=0.3"


@dataclass(frozen=True)
class Cell:
    """One run; `ep` `None` is AutoEP off."""

    zero: int
    ep: int | None
    accumulation: int = 1
    dtype: str = "fp32"
    model: str = "plain"
    ranks: int = SIZE

    @property
    def name(self) -> str:
        ep = "off" if self.ep is None else self.ep
        return f"zero{self.zero}-ranks{self.ranks}-ep_{ep}-ga{self.accumulation}-{self.dtype}-{self.model}"

    @property
    def recipe(self) -> oracle.Recipe:
        """What the run is given, but for its rows."""
        given = recipe([], self.accumulation, LEARNING_RATE[self.dtype])
        if self.model != "loss_free":
            return given
        return replace(given, aux_coef=0.0, bias_update_speed=MODELS[self.model]["router_bias_update_speed"])


QUICK = [
    Cell(1, None, 2),
    Cell(2, None),
    Cell(3, None, 2),
    Cell(1, 2, 2),
    Cell(2, 2, 2),
    Cell(3, 2),
    Cell(2, 2, dtype="bf16"),
    Cell(2, 2, model="elementwise"),
    Cell(3, 2, model="gated"),
]
SLOW = [Cell(zero, 2, 2, ranks=4) for zero in (1, 2, 3)]
SLOW += [Cell(1, None, ranks=4), Cell(3, None, 2, ranks=4), Cell(2, 4, 2, ranks=4), Cell(3, 4, ranks=4)]
SLOW += [Cell(1, 2, model="loss_free", ranks=4), Cell(2, 4, model="gated", ranks=4)]
# Of each launch some stop at step 3 and go on, and one is evaluated.
RESUMED = {2: [Cell(1, 2, 2), Cell(3, None, 2)], 4: [Cell(zero, 2, 2, ranks=4) for zero in (2, 3)]}
EVALUATED = {2: Cell(3, 2), 4: Cell(3, 4, ranks=4)}


def each(quick: list, slow: list) -> pytest.MarkDecorator:
    """Return what runs a test for cells of the two launches, for slow ones if asked."""
    marked = [pytest.param(c, id=c.name, marks=pytest.mark.slow) for c in slow]
    return pytest.mark.parametrize("cell", [pytest.param(c, id=c.name) for c in quick] + marked)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Folder of the initial weights of each kind of model."""
    folders = {name: tmp_path_factory.mktemp(name) for name in MODELS}
    for name, folder in folders.items():
        save_small_model(folder, **MODELS[name])
    return folders


@pytest.fixture(scope="module")
def oracles(models, rows):
    """Function from a cell to the trajectory of one process."""

    @cache
    def train(like: Cell) -> oracle.Trajectory:
        model = MoEForCausalLM.from_pretrained(models[like.model]).train()
        dtype = torch.bfloat16 if like.dtype == "bf16" else torch.float32
        return oracle.train(model, replace(like.recipe, rows=rows), dtype)

    return lambda cell: train(replace(cell, zero=0, ranks=1, ep=None))


@pytest.fixture(scope="module")
def lab(models, rows_file, tmp_path_factory):
    """Function from a number of ranks to the folder in which their launch has left `results/NAME` and `NAME/hf`."""

    @cache
    def launch(ranks: int) -> Path:
        folder, cases = tmp_path_factory.mktemp(f"tensor_parallel_{ranks}"), []
        evaluation = folder / "evaluation.jsonl"
        evaluation.write_text("".join(json.dumps(row) + "\n" for row in make_rows(7)))

        def add(name: str, cell: Cell, **others) -> None:
            path = SHIPPED
            if (cell.zero, cell.ep) != (2, 2):
                path = folder / f"{name}.json"
                path.write_text(json.dumps(deepspeed_json(cell.zero, cell.ep, tensor_parallel={"autotp_size": SIZE})))
            words = {
                "model_name_or_path": models[cell.model],
                "train_file": rows_file,
                "output_dir": folder / name,
                "deepspeed": path,
                "bf16": cell.dtype == "bf16",
                "gradient_checkpointing": (cell.zero, cell.ep) in ((2, None), (3, 2)),
            }
            cases.append({"name": name, "argv": flags(cell.recipe, ranks // SIZE, **(words | others))})

        for cell in QUICK if ranks == SIZE else SLOW:
            others = {"save_strategy": "steps", "save_steps": 3} if cell in RESUMED[ranks] else {}
            if cell == EVALUATED[ranks]:
                others |= {"validation_file": evaluation, "do_eval": True, "per_device_eval_batch_size": 2}
            add(cell.name, cell, **others)
        for cell in RESUMED[ranks]:
            add(f"resumed_{cell.name}", cell, resume_from_checkpoint=folder / cell.name / "checkpoint-3")
        if ranks == SIZE:
            add("noisy", Cell(2, 2), config_overrides=NOISE)
        run_cases(ranks, cases, folder / "results", worker=WORKER)
        return folder

    return launch


def logged_steps(folder: Path) -> list[dict]:
    """Return the log entries of a run's steps."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


@each(QUICK, SLOW)
def test_trajectory_equals_one_process(cell, lab, oracles):
    folder, expected = lab(cell.ranks) / cell.name, oracles(cell)
    steps = logged_steps(folder)
    assert len(steps) == NUM_STEPS
    assert [e["loss"] for e in steps] == pytest.approx(expected.losses, rel=TOLERANCE[cell.dtype])
    assert [e["grad_norm"] for e in steps] == pytest.approx(expected.grad_norms, rel=NORM_TOLERANCE[cell.dtype])
    for entry, families in zip(steps, expected.family_norms, strict=True):
        logged = {family: entry[f"grad_norm/{family}"] for family in families}
        assert logged == pytest.approx(families, rel=FAMILY_TOLERANCE[cell.dtype])
        # What DeepSpeed has clipped by.
        assert math.sqrt(sum(norm**2 for norm in logged.values())) == pytest.approx(entry["grad_norm"], rel=1e-6)
    if cell.dtype == "fp32":
        for name, tensor in load_file(folder / "hf" / "model.safetensors").items():
            distance = (tensor - expected.weights[name]).norm() / expected.weights[name].norm().clamp(min=1e-3)
            assert distance <= WEIGHT_TOLERANCE, name


@each(*([c for c in cells if c.dtype == "fp32"] for cells in (QUICK, SLOW)))
def test_statistics_count_rows_once(cell, lab, oracles):
    """Ranks that share matrices read the same rows."""
    entries, expected = logged_steps(lab(cell.ranks) / cell.name), oracles(cell)
    assert [entry["num_tokens"] for entry in entries] == expected.num_tokens
    for entry, layers in zip(entries, expected.routing, strict=True):
        aux = small_config().router_aux_loss_coef * entry["aux_loss"] if cell.recipe.aux_coef else 0.0
        parts = entry["ce_loss"] + aux + cell.recipe.z_coef * entry["z_loss"]
        assert parts == pytest.approx(entry["loss"], rel=1e-5)
        assert 0 < entry["attention_sink"] < 1
        for number, layer in zip((1, 3), layers, strict=True):
            assert entry["expert_load"][f"layer_{number}"] == pytest.approx(layer["expert_load"], abs=1e-12)
            assert entry[f"router_entropy/layer_{number}"] == pytest.approx(layer["router_entropy"], rel=1e-4)


@each(QUICK, SLOW)
def test_export_is_the_live_model(cell, lab):
    folder = lab(cell.ranks)
    live = torch.load(folder / "results" / cell.name / "live.pt")
    weights = load_file(folder / cell.name / "hf" / "model.safetensors")
    expected = live["weights"].keys() - ({"lm_head.weight"} if cell.model == "gated" else set())
    assert weights.keys() == expected
    assert all(torch.equal(tensor, live["weights"][name]) for name, tensor in weights.items())
    model, info = MoEForCausalLM.from_pretrained(
        folder / cell.name / "hf", output_loading_info=True, dtype="auto", attn_implementation="sdpa"
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    if cell.dtype == "bf16":
        return  # sums of rounded parts tip tokens from one expert to another
    with torch.no_grad():
        logits = model.eval()(torch.arange(3, 27).reshape(2, 12)).logits
    torch.testing.assert_close(logits, live["logits"], rtol=5e-6, atol=5e-6)


@each(RESUMED[2], RESUMED[4])
def test_resuming_continues_bit_for_bit(cell, lab):
    folder = lab(cell.ranks)
    whole = {entry["step"]: entry for entry in logged_steps(folder / cell.name)}
    resumed = {entry["step"]: entry for entry in logged_steps(folder / f"resumed_{cell.name}")}
    assert list(resumed) == [4, 5, 6]
    for step, entry in resumed.items():
        for key in ("loss", "grad_norm", "learning_rate", "num_tokens", "epoch"):
            assert entry[key] == whole[step][key], (step, key)
    names = (cell.name, f"resumed_{cell.name}", f"{cell.name}/checkpoint-3")
    before, after, at_three = (load_file(folder / name / "hf" / "model.safetensors") for name in names)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    # Whole in every checkpoint, and not yet what it is at the end.
    assert {name: t.shape for name, t in at_three.items()} == {name: t.shape for name, t in after.items()}
    cut = "model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(at_three[cut], after[cut])


@each([EVALUATED[2]], [EVALUATED[4]])
def test_evaluation_counts_every_row_once(cell, lab):
    """Seven rows fill no last batch."""
    folder = lab(cell.ranks)
    model = MoEForCausalLM.from_pretrained(folder / cell.name / "hf").eval()
    total, count = 0.0, 0
    for row in make_rows(7):
        log_probs = model(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        for position, label in enumerate(row["labels"][1:]):
            if label != -100:
                total -= log_probs[position, label].item()
                count += 1
    metrics = json.loads((folder / "results" / cell.name / "result.json").read_text())["metrics"]
    assert metrics["eval_tokens"] == count
    assert metrics["eval_loss"] == pytest.approx(total / count, rel=1e-5)


def test_ranks_of_a_group_draw_the_same(lab, models, rows_file, tmp_path):
    """Dropout and jitter are drawn as in one process without DeepSpeed."""
    words = {"model_name_or_path": models["plain"], "train_file": rows_file, "output_dir": tmp_path}
    execute(build_trainer(flags(recipe([]), 1, config_overrides=NOISE, use_cpu=True, **words), FailureRelay()))
    alone, together = logged_steps(tmp_path), logged_steps(lab(SIZE) / "noisy")
    assert [e["loss"] for e in together] == pytest.approx([e["loss"] for e in alone], rel=TOLERANCE["fp32"])
    assert [e["grad_norm"] for e in together] == pytest.approx([e["grad_norm"] for e in alone], rel=TOLERANCE["fp32"])
