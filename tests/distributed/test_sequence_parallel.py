"""Ranks that share sequences give what one process gives with the whole ones.

One launch of two ranks shows a cell of each kind; with --slow there are more, and four ranks: two groups of two, and
one of four that repeats heads of keys.
"""

import json
import random
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import oracle
import pytest
import torch
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
from streams import BLOCK_SIZE, number_of, write_files

from moe_hf import MoEForCausalLM
from moe_hf.checkpoint.convert import write_model
from moe_hf.checkpoint.offline import open_exportable
from moe_hf.data.collator import CausalLMCollator
from moe_hf.training.telemetry.attention_sink import AttentionSink

WORKER = ROOT / "tests" / "distributed" / "sequence_worker.py"
TOLERANCE = {False: 2e-6, True: 5e-3}
FAMILY_TOLERANCE = {False: 1e-6, True: 1e-2}
MODELS = {
    "plain": {},
    # Biases, and loads that are balanced within each sequence.
    "deepseek": {
        "scoring_func": "sigmoid",
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "shared_expert_gate": False,
        "router_balancing": "loss_free",
        "router_bias_update_speed": 0.02,
        "router_aux_loss_scope": "sequence",
    },
    # One head of keys for all ranks; a gate on what attention returns.
    "gated": {"num_key_value_heads": 1, "attention_gate": "headwise", "qk_norm_scope": "full"},
}


@dataclass(frozen=True)
class Cell:
    """One run; `ep` `None` is AutoEP off."""

    zero: int
    ep: int | None
    sp: int = 2
    ranks: int = 2
    accumulation: int = 1
    model: str = "plain"
    packed: bool = False
    bf16: bool = False
    attention: str = "sdpa"
    checkpointing: bool = False
    is_slow: bool = False

    @property
    def name(self) -> str:
        parts = [f"zero{self.zero}", f"ep{self.ep or '_off'}", f"sp{self.sp}", f"of{self.ranks}", self.model]
        parts += [f"ga{self.accumulation}", *(["packed"] if self.packed else []), *(["bf16"] if self.bf16 else [])]
        parts += [self.attention, *(["checkpointing"] if self.checkpointing else [])]
        return "-".join(parts)

    @property
    def readers(self) -> int:
        """Groups of ranks that read rows of their own."""
        return self.ranks // self.sp


CELLS = [
    Cell(2, 2, accumulation=2),
    Cell(2, 2, model="deepseek"),
    Cell(1, None, model="gated", packed=True),
    Cell(3, 2, checkpointing=True),
    Cell(3, None, model="deepseek", attention="eager", is_slow=True),
    Cell(1, 2, packed=True, attention="eager", accumulation=2, is_slow=True),
    Cell(2, None, accumulation=2, is_slow=True),
    Cell(2, 1, is_slow=True),
    Cell(0, None, is_slow=True),
    # As in the parity matrix: over fewer rows even one process moves by 6e-3 when its attention rounds otherwise.
    Cell(2, 2, accumulation=2, bf16=True, is_slow=True),
    Cell(3, 2, bf16=True, model="deepseek", is_slow=True),
    Cell(2, 2, ranks=4, accumulation=2, is_slow=True),
    Cell(2, 4, ranks=4, model="deepseek", is_slow=True),
    Cell(3, 2, ranks=4, model="deepseek", accumulation=2, is_slow=True),
    Cell(1, None, ranks=4, packed=True, model="gated", is_slow=True),
    Cell(2, 4, ranks=4, sp=4, packed=True, is_slow=True),
    Cell(1, 2, ranks=4, sp=4, model="deepseek", is_slow=True),
]
SHIPPED, EVALUATED = CELLS[1], CELLS[3]
LONG = 1024


def each(cells: list[Cell]) -> pytest.MarkDecorator:
    """Return what runs a test for every one of these cells, for slow ones if asked."""
    marks = {True: pytest.mark.slow, False: ()}
    return pytest.mark.parametrize("cell", [pytest.param(c, id=c.name, marks=marks[c.is_slow]) for c in cells])


def packed_rows(count: int) -> list[dict]:
    """Make rows of 20 tokens without padding, in which a new document begins where the positions restart."""
    draw = random.Random(8)
    rows = []
    for _ in range(count):
        ids = [draw.randint(3, 127) for _ in range(20)]
        first = draw.randint(2, 18)
        starts = [*range(first), *range(20 - first)]
        labels = [-100 if place == 0 else token for place, token in zip(starts, ids, strict=True)]
        rows.append({"input_ids": ids, "labels": labels, "position_ids": starts})
    return rows


def write(rows: list[dict], path: Path) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Folder of the initial weights of each kind of model."""
    folder = tmp_path_factory.mktemp("models")
    for name, changes in MODELS.items():
        save_small_model(folder / name, **changes)
    return {name: folder / name for name in MODELS}


@pytest.fixture(scope="module")
def packed() -> list[dict]:
    return packed_rows(NUM_STEPS * 2 * GLOBAL_MICRO_BATCH)


@pytest.fixture(scope="module")
def lab(models, packed, rows_file, tmp_path_factory):
    """Function that launches, once, the default cells or the slow ones of some ranks, and returns their folder."""
    folder = tmp_path_factory.mktemp("sequence")
    packed_file = write(packed, folder / "packed.jsonl")

    def argv(name: str, config: dict, readers: int, accumulation: int = 1, sp: int = 2, **words) -> dict:
        path = folder / f"{name}.json"
        # The flag and the JSON say it in turn.
        path.write_text(json.dumps(config | ({} if accumulation == 1 or sp == 1 else {"sequence_parallel_size": sp})))
        flag = {"sequence_parallel_size": sp} if accumulation == 1 and sp > 1 else {}
        words = {"output_dir": folder / name, "deepspeed": path, "train_file": rows_file} | flag | words
        return {"name": name, "argv": flags(recipe([], accumulation), readers, **words)}

    def case(cell: Cell) -> dict:
        words = {"model_name_or_path": models[cell.model], "attn_implementation": cell.attention, "bf16": cell.bf16}
        if cell.packed:
            words["train_file"] = packed_file
        if cell.bf16:
            words["learning_rate"] = 3e-5
        if cell == SHIPPED:
            words["deepspeed"] = ROOT / "ds_configs" / "ulysses_zero2_ep.json"
        if cell == EVALUATED:
            words |= evaluates
        return argv(
            cell.name,
            deepspeed_json(cell.zero, cell.ep),
            cell.readers,
            cell.accumulation,
            cell.sp,
            gradient_checkpointing=cell.checkpointing,
            **words,
        )

    evaluation = write(make_rows(7), folder / "evaluation.jsonl")
    evaluates = {"validation_file": evaluation, "do_eval": True, "per_device_eval_batch_size": 2}

    def others() -> list[dict]:
        again = {"model_name_or_path": folder / EVALUATED.name / "hf", "do_train": False, **evaluates}
        cases = [argv("evaluated_alone", deepspeed_json(3, 2), 2, sp=1, **again)]
        # Shuffled data and dropout: order and random numbers are part of what has to be resumed.
        random_words = {
            "model_name_or_path": models["plain"],
            "train_sampling_strategy": "random",
            "config_overrides": "attention_dropout=0.1,hidden_dropout=0.1",
            "max_steps": 4,
        }
        config = deepspeed_json(2, 2)
        cases.append(argv("whole", config, 1, save_strategy="steps", save_steps=2, **random_words))
        checkpoint = folder / "whole" / "checkpoint-2"
        cases.append(argv("resumed", config, 1, resume_from_checkpoint=checkpoint, **random_words))
        long_row = [{"input_ids": [3 + (7 * i) % 120 for i in range(LONG)]} for _ in range(2)]
        long_words = {
            "train_file": write(long_row, folder / "long.jsonl"),
            "config_name": save_long_config(folder / "long_config.json"),
            "tokenizer_name": models["plain"],
            "block_size": LONG,
            "max_steps": 1,
            "per_device_train_batch_size": 1,
        }
        for sp in (1, 2):
            cases.append(argv(f"long_sp{sp}", deepspeed_json(2, 2), 1, sp=sp, **long_words))
        return cases

    @cache
    def launch(ranks: int, slow: bool) -> Path:
        cases = [case(cell) for cell in CELLS if (cell.ranks, cell.is_slow) == (ranks, slow)]
        run_cases(ranks, cases if slow else cases + others(), folder / "results", worker=WORKER)
        return folder

    return launch


def save_long_config(path: Path) -> Path:
    path.write_text(json.dumps(small_config(max_position_embeddings=LONG).to_dict()))
    return path


@pytest.fixture(scope="module")
def oracles(models, rows, packed):
    """Function from a cell to the trajectory of one process."""

    @cache
    def train(name: str, accumulation: int, is_packed: bool, bf16: bool) -> oracle.Trajectory:
        model = MoEForCausalLM.from_pretrained(models[name]).train()
        given = recipe(
            [row | {"attention_mask": [1] * 20} for row in packed] if is_packed else rows,
            accumulation,
            3e-5 if bf16 else 1e-3,
        )
        if not model.config.has_balancing_loss:
            given = replace(given, aux_coef=0.0)
        if name == "deepseek":
            given = replace(given, bias_update_speed=model.config.router_bias_update_speed)
        return oracle.train(model, given, torch.bfloat16 if bf16 else torch.float32)

    return lambda cell: train(cell.model, cell.accumulation, cell.packed, cell.bf16)


def steps_of(folder: Path, name: str) -> list[dict]:
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def result_of(folder: Path, name: str) -> dict:
    return json.loads((folder / "results" / name / "result.json").read_text())


@each(CELLS)
def test_trajectory_equals_one_process(cell, lab, oracles):
    folder, expected = lab(cell.ranks, cell.is_slow), oracles(cell)
    steps = steps_of(folder, cell.name)
    assert len(steps) == NUM_STEPS
    for entry, loss, norm in zip(steps, expected.losses, expected.grad_norms, strict=True):
        assert entry["loss"] == pytest.approx(loss, rel=TOLERANCE[cell.bf16])
        assert entry["grad_norm"] == pytest.approx(norm, rel=TOLERANCE[cell.bf16])
    if cell.bf16:
        return
    for name, tensor in load_file(folder / cell.name / "hf" / "model.safetensors").items():
        assert (tensor - expected.weights[name]).norm() <= 1e-5 * expected.weights[name].norm(), name


@each(CELLS)
def test_gradient_norms_by_family_equal_one_process(cell, lab, oracles):
    steps = steps_of(lab(cell.ranks, cell.is_slow), cell.name)
    for entry, expected in zip(steps, oracles(cell).family_norms, strict=True):
        logged = {family: entry[f"grad_norm/{family}"] for family in expected}
        assert logged == pytest.approx(expected, rel=FAMILY_TOLERANCE[cell.bf16])


@each([cell for cell in CELLS if not cell.bf16])
def test_logged_routing_equals_one_process(cell, lab, oracles):
    entries, expected = steps_of(lab(cell.ranks, cell.is_slow), cell.name), oracles(cell)
    assert [entry["num_tokens"] for entry in entries] == expected.num_tokens
    for entry, layers in zip(entries, expected.routing, strict=True):
        for number, layer in zip((1, 3), layers, strict=True):
            assert entry["expert_load"][f"layer_{number}"] == pytest.approx(layer["expert_load"], abs=1e-12)
            for name in ("max_vio", "router_entropy", "router_logit_max"):
                assert entry[f"{name}/layer_{number}"] == pytest.approx(layer[name], rel=1e-4), name


def test_attention_is_measured_on_whole_sequences(lab, models, rows):
    """Of the first row of the batch, half of whose first tokens lie on the other rank."""
    cell = CELLS[0]
    model = MoEForCausalLM.from_pretrained(models[cell.model]).train()
    sink, batch = AttentionSink(model), CausalLMCollator(0)(rows[:GLOBAL_MICRO_BATCH])
    with sink.measure(batch["input_ids"], batch["attention_mask"], None), torch.no_grad():
        model(**batch)
    masses, num_weights = sink.pop()
    first = steps_of(lab(cell.ranks, cell.is_slow), cell.name)[0]
    logged = [first[f"attention_sink/layer_{number}"] for number in range(len(masses))]
    assert logged == pytest.approx((masses / num_weights).tolist(), rel=1e-5)


def test_evaluation_equals_that_of_ranks_with_rows_of_their_own(lab):
    """Of the same weights, over the same seven rows: sums over pieces, and no row twice."""
    folder = lab(2, False)
    shared, alone = (
        {k: v for k, v in result_of(folder, name)["metrics"].items() if k.startswith("eval_")}
        for name in (EVALUATED.name, "evaluated_alone")
    )
    timed = {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_model_preparation_time"}
    assert shared.keys() - timed == alone.keys() - timed
    assert {"eval_loss", "eval_perplexity", "eval_aux_loss", "eval_z_loss", "eval_router_logit_max/layer_3"} <= set(
        shared
    )
    for name in shared.keys() - timed:
        assert shared[name] == pytest.approx(alone[name], rel=1e-5, abs=1e-9), name


def test_resuming_continues_bit_for_bit(lab):
    folder = lab(2, False)
    whole, resumed = ({entry["step"]: entry for entry in steps_of(folder, name)} for name in ("whole", "resumed"))
    assert sorted(resumed) == [3, 4] and len({entry["loss"] for entry in whole.values()}) == 4
    for step, entry in resumed.items():
        assert [entry[name] for name in ("loss", "grad_norm")] == [whole[step][name] for name in ("loss", "grad_norm")]
    whole, resumed = (load_file(folder / name / "hf" / "model.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


@each([cell for cell in CELLS if not cell.bf16])
def test_export_is_the_live_model(cell, lab):
    """Which attends by itself again, with heads of its own, where a batch is not shared."""
    folder = lab(cell.ranks, cell.is_slow)
    live, export = torch.load(folder / "results" / cell.name / "live.pt"), folder / cell.name / "hf"
    weights = load_file(export / "model.safetensors")
    assert weights.keys() == live["weights"].keys()
    assert all(torch.equal(tensor, live["weights"][name]) for name, tensor in weights.items())
    with torch.no_grad():
        logits = MoEForCausalLM.from_pretrained(export).eval()(torch.arange(3, 27).reshape(2, 12)).logits
    torch.testing.assert_close(logits, live["logits"], rtol=5e-6, atol=5e-6)


def test_a_checkpoint_exports_like_all_others(lab, tmp_path):
    checkpoint = lab(2, False) / "whole" / "checkpoint-2"
    write_model(open_exportable(checkpoint), tmp_path / "hf")
    for path in (checkpoint / "hf").iterdir():
        assert (tmp_path / "hf" / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_checkpoint_knows_its_place_in_rows(lab):
    manifest = json.loads((lab(2, False) / "whole" / "checkpoint-2" / "manifest.json").read_text())
    assert manifest["topology"]["sequence_parallel_size"] == 2
    assert manifest["progress"]["samples_seen"] == 2 * GLOBAL_MICRO_BATCH


def test_two_ranks_keep_half_of_the_activations(lab):
    """Of one row of 1024 tokens, what is saved for the backward pass."""
    folder = lab(2, False)
    alone, shared = (
        json.loads((folder / "results" / f"long_sp{sp}" / "saved_bytes.json").read_text())[0] for sp in (1, 2)
    )
    assert 0.45 < shared / alone < 0.55


@pytest.mark.slow
def test_ranks_of_a_group_read_the_same_stream(models, tmp_path):
    """Together they see every document of an epoch once, and a resumed run exactly the next ones."""
    (tmp_path / "deepspeed.json").write_text(json.dumps(deepspeed_json(2, 2, sequence_parallel_size=2)))
    words = {
        "model_name_or_path": models["plain"],
        "train_file": write_files(tmp_path / "files", [6, 6]),
        "streaming": True,
        "packing": "pad",
        "block_size": BLOCK_SIZE,
        "deepspeed": tmp_path / "deepspeed.json",
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 2,
        "per_device_train_batch_size": 2,
    }
    checkpoint = tmp_path / "whole" / "out" / "checkpoint-2"
    cases = [
        {"name": name, "argv": flags(recipe([]), 1, **words, output_dir=tmp_path / name / "out", **others)}
        for name, others in (("whole", {}), ("resumed", {"resume_from_checkpoint": checkpoint}))
    ]
    run_cases(2, cases, tmp_path, worker=WORKER.with_name("streaming_worker.py"))
    whole, resumed = (
        [json.loads((tmp_path / name / f"rank_{rank}.json").read_text()) for rank in range(2)]
        for name in ("whole", "resumed")
    )
    assert all(result["error"] is None for result in whole + resumed)
    documents = [
        number_of(first + second)
        for batches in zip(*(result["batches"] for result in whole), strict=True)
        for first, second in zip(*batches, strict=True)
    ]
    assert sorted(documents) == [*range(12)]
    for rank in range(2):
        assert all(len(row) == BLOCK_SIZE // 2 for batch in whole[rank]["batches"] for row in batch)
        assert resumed[rank]["batches"] == whole[rank]["batches"][2:]
        assert all(loss == whole[rank]["losses"][step] for step, loss in resumed[rank]["losses"].items())
