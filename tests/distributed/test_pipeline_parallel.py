"""Pipelines give what one process gives: losses, gradient norms, weights, routing, evaluation, resuming, export.

One launch of 2 ranks for the default suite, one each of 4, 8 and 16 ranks for `--slow`.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import oracle
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from launching import ROOT, run_cases
from safetensors.torch import load_file
from small import (
    GLOBAL_MICRO_BATCH,
    NUM_STEPS,
    deepspeed_json,
    flags,
    make_rows,
    recipe,
    save_small_model,
    small_config,
)

from moe_hf import MoEConfig, MoEForCausalLM
from moe_hf.checkpoint.manifest import is_whole, read_manifest
from moe_hf.checkpoint.model_card import active_parameters
from moe_hf.checkpoint.offline import open_exportable
from moe_hf.errors import CheckpointError
from moe_hf.parallel.failure import FailureRelay
from moe_hf.training.run import train_and_export

WORKER = ROOT / "tests" / "distributed" / "pipeline_worker.py"
TOLERANCE = {"fp32": 2e-6, "bf16": 5e-3}
FAMILY_TOLERANCE = {"fp32": 2e-6, "bf16": 1e-2}
WEIGHT_TOLERANCE = 1e-5
LEARNING_RATE = {"fp32": 1e-3, "bf16": 3e-5}
TORCH_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16}

TIED = {"tie_word_embeddings": True}
# Biases that move, groups of experts, and a balancing loss of each sequence besides.
DEEPSEEK = {
    "scoring_func": "sigmoid",
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
    "shared_expert_gate": False,
    "router_balancing": "loss_free",
    "router_bias_update_speed": 0.02,
    "router_aux_loss_scope": "sequence",
}
KINDS = {
    "softmax": {},
    "tied": TIED,
    "deepseek": DEEPSEEK,
    "local": {"router_aux_loss_scope": "local"},
    "expert_choice": {"router_balancing": "expert_choice"},
    "dense": {"num_experts": 0, "shared_expert_intermediate_size": 0, "shared_expert_gate": False},
}
# These look at the tokens that one rank routes together.
BY_RANK = ("local", "expert_choice")


@dataclass(frozen=True)
class Cell:
    """One run; `ep` `None` is AutoEP off."""

    ranks: int
    stages: int
    kind: str = "softmax"
    dtype: str = "fp32"
    micro_batches: int = 2
    ep: int | None = None
    recomputes: bool = False
    # Run again from a checkpoint in the middle, and evaluated.
    resumes: bool = False

    @property
    def name(self) -> str:
        ep = "" if self.ep is None else f"-ep{self.ep}"
        return f"ranks{self.ranks}-pp{self.stages}{ep}-mb{self.micro_batches}-{self.dtype}-{self.kind}"

    @property
    def num_pipelines(self) -> int:
        return self.ranks // self.stages

    @property
    def rows_per_micro_batch(self) -> int:
        """Rows that all pipelines see together."""
        return max(GLOBAL_MICRO_BATCH, self.num_pipelines)

    @property
    def config(self) -> MoEConfig:
        return small_config(**KINDS[self.kind])

    @property
    def recipe(self) -> oracle.Recipe:
        given = recipe([], self.micro_batches, LEARNING_RATE[self.dtype])
        given = replace(given, rows_per_micro_batch=self.rows_per_micro_batch)
        config = self.config
        if not config.has_balancing_loss:
            given = replace(given, aux_coef=0.0)
        if config.router_balancing == "loss_free" and config.num_sparse_layers:
            given = replace(given, bias_update_speed=config.router_bias_update_speed)
        return given


TWO = [
    Cell(2, 2, "tied"),
    Cell(2, 2, "tied", "bf16"),
    Cell(2, 2, "deepseek", recomputes=True, resumes=True),
]
FOUR = [
    Cell(4, 2),
    Cell(4, 2, "tied", micro_batches=1),
    Cell(4, 2, dtype="bf16"),
    Cell(4, 2, "deepseek", resumes=True),
    Cell(4, 2, "local"),
    Cell(4, 2, "expert_choice"),
    Cell(4, 2, "dense"),
    Cell(4, 4, "tied"),
    Cell(4, 4, "deepseek"),
    Cell(4, 4, "tied", "bf16", resumes=True),
    Cell(4, 2, ep=1),
    Cell(4, 2, ep=2),
    Cell(4, 2, "tied", ep=2),
    Cell(4, 2, "deepseek", ep=2, resumes=True),
    Cell(4, 2, dtype="bf16", ep=2),
]
# Two replicas of experts on each of two stages, of two ranks each and of four.
MORE = [Cell(8, 2, ep=2), Cell(16, 2, micro_batches=1, ep=4)]
ALL = TWO + FOUR + MORE
RESUMED = [cell for cell in ALL if cell.resumes]


def each(cells: list[Cell]) -> pytest.MarkDecorator:
    """Return what runs a test for every one of these cells, those of more than two ranks if asked."""
    marks = {True: pytest.mark.slow, False: ()}
    return pytest.mark.parametrize("cell", [pytest.param(c, id=c.name, marks=marks[c.ranks > 2]) for c in cells])


def command_line(cell: Cell, model: Path, rows_file: Path, folder: Path, name: str = "", **others) -> list[str]:
    """Return the words after `run_clm_moe.py`; the sizes are on the command line, and in no file."""
    path = folder / f"{cell.name}.json"
    path.write_text(json.dumps(deepspeed_json(1, cell.ep)))
    given = {"pipeline_parallel_size": cell.stages, "num_microbatches": cell.micro_batches, "dead_expert_steps": 1}
    given |= {"model_name_or_path": model, "train_file": rows_file, "output_dir": folder / (name or cell.name)}
    given |= {"deepspeed": path, "bf16": cell.dtype == "bf16", "gradient_checkpointing": cell.recomputes, **others}
    # The number of micro-batches is not said twice.
    return flags(replace(cell.recipe, micro_batches_per_step=1), cell.num_pipelines, **given)


@pytest.fixture(scope="session")
def models(small_model, tmp_path_factory) -> dict[str, Path]:
    """Folder of the initial weights for each kind of model."""
    folders = {"softmax": small_model}
    for kind in KINDS.keys() - folders.keys():
        folder = folders[kind] = tmp_path_factory.mktemp(f"{kind}_model")
        if kind == "dense":
            torch.manual_seed(11)
            MoEForCausalLM(small_config(**KINDS[kind])).save_pretrained(folder)
            for file in small_model.glob("tokenizer*"):
                (folder / file.name).write_bytes(file.read_bytes())
            continue
        save_small_model(folder, **KINDS[kind])
        if kind == "deepseek":
            model = MoEForCausalLM.from_pretrained(folder)
            for number, layer in enumerate(model.model.layers[1::2]):
                size = len(layer.mlp.gate.e_score_correction_bias)
                layer.mlp.gate.e_score_correction_bias.copy_(0.05 * torch.arange(size).roll(3 * number) - 0.2)
            model.save_pretrained(folder)
    return folders


@pytest.fixture(scope="session")
def oracles(models, rows):
    """Function from a cell to the trajectory of one process."""

    @cache
    def train(kind: str, dtype: str, micro_batches: int, rows_at_once: int, pieces: int) -> oracle.Trajectory:
        model = MoEForCausalLM.from_pretrained(models[kind]).train()
        given = Cell(1, 1, kind, dtype, micro_batches).recipe
        given = replace(given, rows=rows, rows_per_micro_batch=rows_at_once)
        return oracle.train(model, given, TORCH_DTYPE[dtype], pieces)

    def of(cell: Cell) -> oracle.Trajectory:
        pieces = 1 if cell.dtype == "fp32" and cell.kind not in BY_RANK else cell.num_pipelines
        return train(cell.kind, cell.dtype, cell.micro_batches, cell.rows_per_micro_batch, pieces)

    return of


@pytest.fixture(scope="session")
def runs(models, rows_file, tmp_path_factory):
    """Function from a cell to the folder of its results and its output folder; launches all of its number of ranks."""
    folder = tmp_path_factory.mktemp("pipelines")
    validation = folder / "validation.jsonl"
    # Seven rows: the last batch is filled up, with two pipelines on one of them only.
    validation.write_text("".join(json.dumps(row) + "\n" for row in make_rows(7)))
    launched = set()

    # Twelve rows are a step of two micro-batches and one of one.
    few_rows = folder / "few_rows.jsonl"
    few_rows.write_text("".join(json.dumps(row) + "\n" for row in make_rows(12)))
    saving = {"save_strategy": "steps", "save_steps": 3, "do_eval": True, "validation_file": validation}
    saving |= {"per_device_eval_batch_size": 2}

    def lines_of(cell: Cell) -> Iterator[dict]:
        others = saving if cell.resumes else {}
        yield {"name": cell.name, "argv": command_line(cell, models[cell.kind], rows_file, folder, **others)}
        if cell.resumes:
            others = saving | {"resume_from_checkpoint": folder / cell.name / "checkpoint-3"}
            again = command_line(cell, models[cell.kind], rows_file, folder, f"resumed-{cell.name}", **others)
            yield {"name": f"resumed-{cell.name}", "argv": again}

    def of(cell: Cell, name: str = "") -> tuple[Path, Path]:
        if cell.ranks not in launched:
            launched.add(cell.ranks)
            lines = [line for other in ALL if other.ranks == cell.ranks for line in lines_of(other)]
            if cell.ranks == 2:
                others = from_scratch(folder, models["tied"]) | {"train_file": few_rows}
                epochs = command_line(cell, None, rows_file, folder, "epochs", **others)
                lines.append({"name": "epochs", "argv": without_none(epochs)})
            run_cases(cell.ranks, lines, folder / "results", worker=WORKER)
        return folder / "results" / (name or cell.name), folder / (name or cell.name)

    return of


def from_scratch(folder: Path, tokenizer: Path) -> dict:
    """Return the flags of a run from random weights, over two epochs of two steps."""
    small_config(**TIED).save_pretrained(folder / "config")
    config = {"config_name": folder / "config" / "config.json", "tokenizer_name": tokenizer}
    return config | {"max_steps": 4, "seed": 7}


def without_none(words: list[str]) -> list[str]:
    pairs = zip(words[::2], words[1::2], strict=True)
    return [word for flag, value in pairs if value != "None" for word in (flag, value)]


def logged_steps(output: Path) -> list[dict]:
    """Return the log entries of a run's steps."""
    entries = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [entry for entry in entries if "loss" in entry]


@each(ALL)
def test_trajectory_equals_one_process(cell, runs, oracles):
    _, output = runs(cell)
    steps, expected = logged_steps(output), oracles(cell)
    assert len(steps) == NUM_STEPS
    assert [e["loss"] for e in steps] == pytest.approx(expected.losses, rel=TOLERANCE[cell.dtype])
    tolerance = 2e-2 if (cell.dtype, cell.kind) == ("bf16", "deepseek") else TOLERANCE[cell.dtype]
    assert [e["grad_norm"] for e in steps] == pytest.approx(expected.grad_norms, rel=tolerance)
    if cell.dtype == "fp32":
        for name, tensor in load_file(output / "hf" / "model.safetensors").items():
            wanted = expected.weights[name]
            assert (tensor - wanted).norm() <= WEIGHT_TOLERANCE * wanted.norm(), name


def test_random_start_and_ends_of_epochs_are_those_of_one_process(runs, models, tmp_path):
    """The last step of an epoch has fewer micro-batches than the others."""
    cell = TWO[0]
    _, output = runs(cell, "epochs")
    AcceleratorState._reset_state(reset_partial_state=True)
    others = from_scratch(tmp_path, models["tied"]) | {"train_file": output.parent / "few_rows.jsonl"}
    words = flags(cell.recipe, 1, output_dir=tmp_path / "alone", use_cpu=True, **others)
    train_and_export(words, FailureRelay())
    steps, expected = logged_steps(output), logged_steps(tmp_path / "alone")
    assert len(steps) == 4
    for part in ("loss", "grad_norm", "ce_loss"):
        assert [e[part] for e in steps] == pytest.approx([e[part] for e in expected], rel=2e-6)
    assert [e["num_tokens"] for e in steps] == [e["num_tokens"] for e in expected]


@each(ALL)
def test_gradient_norms_by_family_equal_one_process(cell, runs, oracles):
    """A tied weight counts once, although both ends of the pipeline have it."""
    for entry, expected in zip(logged_steps(runs(cell)[1]), oracles(cell).family_norms, strict=True):
        logged = {family: entry[f"grad_norm/{family}"] for family in expected}
        assert logged == pytest.approx(expected, rel=FAMILY_TOLERANCE[cell.dtype])
        assert math.hypot(*logged.values()) == pytest.approx(entry["grad_norm"], rel=2e-6)


@each([c for c in ALL if c.dtype == "fp32" and c.kind not in ("expert_choice", "dense")])
def test_logged_routing_equals_one_process(cell, runs, oracles):
    """Of all layers, whichever stage has them."""
    entries, expected = logged_steps(runs(cell)[1]), oracles(cell)
    assert [entry["num_tokens"] for entry in entries] == expected.num_tokens
    for entry, layers in zip(entries, expected.routing, strict=True):
        for number, layer in zip((1, 3), layers, strict=True):
            assert entry["expert_load"][f"layer_{number}"] == pytest.approx(layer["expert_load"], abs=1e-12)
            assert entry[f"dead_experts/layer_{number}"] == layer["dead_experts"]
            for name in ("max_vio", "router_entropy", "router_logit_max"):
                assert entry[f"{name}/layer_{number}"] == pytest.approx(layer[name], rel=1e-4), name


@each(ALL)
def test_loss_is_the_sum_of_its_logged_parts(cell, runs):
    config = cell.config
    aux_coef = config.router_aux_loss_coef if config.has_balancing_loss else 0.0
    for entry in logged_steps(runs(cell)[1]):
        parts = entry["ce_loss"] + sum(
            aux_coef * entry[f"aux_loss/layer_{layer}"] + config.router_z_loss_coef * entry[f"z_loss/layer_{layer}"]
            for layer, kind in enumerate(config.mlp_layer_types)
            if kind == "sparse"
        )
        assert parts == pytest.approx(entry["loss"], rel=1e-5)
        assert not any(name.startswith("attention_sink") for name in entry), "which is not measured"


@each([c for c in ALL if c.kind == "deepseek"])
def test_biases_move_as_in_one_process(cell, runs, oracles, models):
    _, output = runs(cell)
    weights, start = (load_file(f / "model.safetensors") for f in (output / "hf", models[cell.kind]))
    biases = [name for name in weights if name.endswith(".e_score_correction_bias")]
    assert len(biases) == 2
    last = logged_steps(output)[-1]
    for name in biases:
        torch.testing.assert_close(weights[name], oracles(cell).weights[name], rtol=0.0, atol=1e-6)
        assert (weights[name] - start[name]).abs().max() > 0.05
        layer = name.split(".")[2]
        logged = [last[f"router_bias_{end}/layer_{layer}"] for end in ("min", "max")]
        assert logged == pytest.approx([weights[name].min().item(), weights[name].max().item()], abs=1e-6)


@each(ALL)
def test_export_is_the_live_model_and_whole(cell, runs):
    results, output = runs(cell)
    weights, live = load_file(output / "hf" / "model.safetensors"), torch.load(results / "live.pt")
    model, info = MoEForCausalLM.from_pretrained(output / "hf", output_loading_info=True, dtype="auto")
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.dtype == TORCH_DTYPE[cell.dtype]
    if cell.ep is None:
        assert live.keys() - weights.keys() == ({"lm_head.weight"} if cell.kind == "tied" else set())
        for name, tensor in weights.items():
            assert torch.equal(tensor, live[name]), name
    if cell.kind == "tied":
        assert torch.equal(live["lm_head.weight"], live["model.embed_tokens.weight"]), "both ends make the same steps"
    if cell.kind != "expert_choice":
        tokens = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, min_new_tokens=4, do_sample=False)
        assert tokens.shape == (1, 7)


@each(ALL)
def test_each_process_holds_its_own_layers_only(cell, runs):
    held = json.loads((runs(cell)[0] / "result.json").read_text())["held"]
    for rank, names in enumerate(held):
        layers = {int(name.split(".")[2]) for name in names if name.startswith("model.layers.")}
        assert 0 < len(layers) < 4
        stage = rank // cell.num_pipelines
        assert ("model.embed_tokens.weight" in names) == (stage == 0)
        assert ("lm_head.weight" in names) == ("model.norm.weight" in names) == (stage == cell.stages - 1)


@each(RESUMED)
def test_resuming_continues_bit_for_bit(cell, runs):
    _, whole = runs(cell)
    _, again = runs(cell, f"resumed-{cell.name}")
    for part in ("loss", "grad_norm", "ce_loss", "num_tokens"):
        assert [e[part] for e in logged_steps(again)] == [e[part] for e in logged_steps(whole)[3:]]
    expected, actual = (load_file(folder / "hf" / "model.safetensors") for folder in (whole, again))
    assert all(torch.equal(tensor, actual[name]) for name, tensor in expected.items())
    last = load_file(again / f"checkpoint-{NUM_STEPS}" / "hf" / "model.safetensors")
    assert all(torch.equal(tensor, actual[name]) for name, tensor in last.items())


@each(RESUMED)
def test_checkpoints_are_whole_and_know_their_layout(cell, runs):
    _, output = runs(cell)
    for step in (3, NUM_STEPS):
        checkpoint = output / f"checkpoint-{step}"
        assert is_whole(checkpoint)
        topology = read_manifest(checkpoint).topology
        assert (topology.pipeline_parallel_size, topology.world_size) == (cell.stages, cell.ranks)
        assert read_manifest(checkpoint).progress.samples_seen == step * 4 * cell.micro_batches
        with pytest.raises(CheckpointError, match="shards of a pipeline are not put together; its export"):
            open_exportable(checkpoint)


@each(RESUMED)
def test_work_is_counted_once(cell, runs, rows):
    """Every stage reads all rows, and does a part of the work."""
    results, _ = runs(cell)
    metrics = json.loads((results / "result.json").read_text())["metrics"]
    micro_batches = [
        rows[first : first + 4 // cell.num_pipelines]
        for first in range(0, 4 * cell.micro_batches * NUM_STEPS, 4 // cell.num_pipelines)
    ]
    padded = sum(len(batch) * max(len(row["input_ids"]) for row in batch) for batch in micro_batches)
    assert metrics["total_flos"] == pytest.approx(6 * active_parameters(cell.config).in_matrices * padded)
    assert "eval_steps_per_second" not in metrics and metrics["eval_samples_per_second"] > 0


@each(RESUMED)
def test_evaluation_equals_one_process(cell, runs):
    """Rows that fill up the last batch do not count."""
    results, output = runs(cell)
    metrics = json.loads((results / "result.json").read_text())["metrics"]
    model = MoEForCausalLM.from_pretrained(output / "hf", dtype=TORCH_DTYPE[cell.dtype]).eval()
    total, count, loads = 0.0, 0, torch.zeros(2, model.config.num_experts)
    for row in make_rows(7):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        with torch.no_grad():
            result = model(input_ids=ids, labels=labels)
        total += F.cross_entropy(result.logits[0, :-1].float(), labels[0, 1:], reduction="sum").item()
        count += int((labels[:, 1:] != -100).sum())
        loads += result.tokens_per_expert.sum(dim=1)
    assert metrics["eval_tokens"] == count
    assert metrics["eval_loss"] == pytest.approx(total / count, rel=1e-5 if cell.dtype == "fp32" else 5e-3)
    if cell.dtype == "fp32":  # rounding tips single tokens from one expert to another
        largest = (loads.max(dim=1).values / loads.mean(dim=1) - 1).tolist()
        assert [metrics[f"eval_max_vio/layer_{layer}"] for layer in (1, 3)] == pytest.approx(largest, rel=1e-5)
