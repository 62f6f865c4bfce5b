"""What else a run must do on two ranks: resume exactly, survive NaN, odd routing and odd batches, every shipped JSON.

Two launches: the first runs everything, the second resumes what the first has left at its third step. One more sees one
rank fail while it loads. What else can happen to a run is in `fault/`.
"""

import json
import shutil
from pathlib import Path

import oracle
import pytest
import torch
from launching import ROOT, deepspeed, run_cases
from safetensors.torch import load_file
from small import GLOBAL_MICRO_BATCH, NUM_STEPS, deepspeed_json, flags, make_rows, recipe, save_small_model

from moe_hf import MoEConfig, MoEForCausalLM
from moe_hf.checkpoint.manifest import read_manifest, write_manifest

# With an optimizer of their own they make other steps: test_precision.py runs them. Those of recipes run in
# test_recipes.py with their own number of ranks; this one moves the optimizer to the host. Those that divide the ranks
# otherwise are in the tests of their kind.
SHIPPED = sorted(
    path.name
    for path in (ROOT / "ds_configs").glob("zero*.json")
    if not any(f'"{key}"' in path.read_text() for key in ("optimizer", "tensor_parallel", "pipeline", "nvme"))
)
SHIPPED.append("xlarge-70b.json")
EP_RUNS = {"zero2_ep": (2, 2), "zero3_ep": (3, 2)}
POISON = 99  # a token whose embedding is NaN
POISONED_STEP = 2
SECOND_RANKS_SHARD = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"


def write_rows(rows: list[dict], path: Path) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def odd_rows() -> list[dict]:
    """Rows of a single token among longer ones, so that with one row per rank a whole micro-batch can be one token."""
    rows = make_rows(NUM_STEPS * GLOBAL_MICRO_BATCH)
    for row in rows[::5]:
        for values in row.values():
            del values[1:]
    return rows


def save_model_with_loads(folder: Path, wanted: str) -> None:
    """Save a model whose routers send all tokens to experts 0 and 1, or have one expert win always."""
    save_small_model(folder)
    model = MoEForCausalLM.from_pretrained(folder)
    hidden_size = model.config.hidden_size
    common = torch.ones(hidden_size)
    # All tokens share one large component, which alone decides the routing.
    model.model.embed_tokens.weight.data = 0.05 * model.model.embed_tokens.weight.data + common
    for layer in model.model.layers[1::2]:
        router = layer.mlp.gate.weight.data
        router[0] += common / hidden_size**0.5 * 2
        if wanted == "first_rank_only":
            router[1] += common / hidden_size**0.5
    model.save_pretrained(folder)


def poison(folder: Path) -> None:
    """Save a model in which one token's embedding is NaN."""
    save_small_model(folder)
    model = MoEForCausalLM.from_pretrained(folder)
    model.model.embed_tokens.weight.data[POISON] = float("nan")
    model.save_pretrained(folder)


def poisoned_rows(steps: set[int]) -> list[dict]:
    """Rows with the poisoned token in the last row of the given steps only: one of the two ranks sees it."""
    rows = make_rows(NUM_STEPS * GLOBAL_MICRO_BATCH)
    for step in range(NUM_STEPS):
        of_step = rows[step * GLOBAL_MICRO_BATCH : (step + 1) * GLOBAL_MICRO_BATCH]
        for row in of_step:
            row["input_ids"] = [3 if token == POISON else token for token in row["input_ids"]]
            row["labels"] = [3 if token == POISON else token for token in row["labels"]]
        if step in steps:
            of_step[-1]["input_ids"][0] = POISON
    return rows


def from_scratch(folder: Path, tokenizer: Path) -> list[str]:
    """Command line of a run that starts from a preset and from documents of unequal length, kept apart in blocks."""
    documents = [{"text": " ".join(f"w{3 + (start + i) % 7}" for i in range(9 + start % 5))} for start in range(400)]
    (folder / "from_scratch.json").write_text(json.dumps(deepspeed_json(3, 2)))
    return flags(
        recipe([], learning_rate=1e-2),
        2,
        config_name="quickstart",
        config_overrides="vocab_size=128,hidden_size=32,num_attention_heads=2,num_key_value_heads=1,head_dim=16",
        tokenizer_name=tokenizer,
        train_file=write_rows(documents, folder / "documents.jsonl"),
        packing="documents",
        output_dir=folder / "from_scratch",
        deepspeed=folder / "from_scratch.json",
    )


@pytest.fixture(scope="module")
def lab(tmp_path_factory, small_model, rows_file) -> Path:
    """Folder in which both launches have left `results/NAME` and `NAME/hf`."""
    folder = tmp_path_factory.mktemp("training")
    cases, plan = [], recipe([])

    def add(name: str, config: dict | Path, model: Path = small_model, rows: Path = rows_file, **others) -> None:
        if isinstance(config, dict):
            path = folder / f"{name}.json"
            path.write_text(json.dumps(config))
            config = path
        words = {"model_name_or_path": model, "train_file": rows, "output_dir": folder / name, "deepspeed": config}
        cases.append({"name": name, "argv": flags(plan, 2, **(words | others))})

    # First of all, while DeepSpeed has not seen the process group: random weights made inside zero.Init, from text.
    cases.append({"name": "from_scratch", "argv": from_scratch(folder, small_model)})
    for name in SHIPPED:
        path = ROOT / "ds_configs" / name
        add(f"shipped_{name}", path, **({"expert_parallel_size": 2} if "autoep_size" in path.read_text() else {}))
    for name, (zero, ep) in EP_RUNS.items():
        # Shuffled data and dropout: order and random numbers are part of what has to be resumed.
        shuffled = {"train_sampling_strategy": "random", "save_strategy": "steps", "save_steps": 3, "bf16": True}
        dropout = {"config_overrides": "attention_dropout=0.1"}
        add(f"whole_{name}", deepspeed_json(zero, ep), **shuffled, **dropout)
    add("checkpointing", deepspeed_json(3, 2), gradient_checkpointing=True)

    evaluation = write_rows(make_rows(7), folder / "evaluation.jsonl")
    evaluates = {"validation_file": evaluation, "do_eval": True, "per_device_eval_batch_size": 2}
    add("evaluated", deepspeed_json(3, 2), **evaluates)
    # Evaluation alone, of what the run before has exported.
    exported_model = {"model": folder / "evaluated" / "hf", "do_train": False}
    add("evaluated_again", deepspeed_json(3, 2), **evaluates, **exported_model)

    add("one_token", deepspeed_json(2, 2), rows=write_rows(odd_rows(), folder / "odd.jsonl"))
    for wanted in ("first_rank_only", "one_expert"):
        save_model_with_loads(folder / f"model_{wanted}", wanted)
        for zero in (2, 3):
            add(f"{wanted}_zero{zero}", deepspeed_json(zero, 2), model=folder / f"model_{wanted}")

    poison(folder / "poisoned")
    once = write_rows(poisoned_rows({POISONED_STEP}), folder / "once.jsonl")
    always = write_rows(poisoned_rows(set(range(1, NUM_STEPS))), folder / "always.jsonl")
    for zero, ep, bf16 in ((0, None, False), (1, 2, False), (2, 2, True), (3, 2, False), (3, 2, True)):
        name = f"nan_zero{zero}_{'bf16' if bf16 else 'fp32'}"
        add(name, deepspeed_json(zero, ep), model=folder / "poisoned", rows=once, bf16=bf16)
    add("nan_stops", deepspeed_json(3, 2), model=folder / "poisoned", rows=always, max_skipped_steps=2)
    run_cases(2, cases, folder / "results")

    resumed = []
    for name in EP_RUNS:
        # A copy of the folder as the run had left it after its third step.
        shutil.copytree(folder / f"whole_{name}" / "checkpoint-3", folder / f"resumed_{name}" / "checkpoint-3")
        words = next(case["argv"] for case in cases if case["name"] == f"whole_{name}")
        words = [word.replace(f"whole_{name}", f"resumed_{name}") if "results" not in word else word for word in words]
        words[words.index("--deepspeed") + 1] = str(folder / f"whole_{name}.json")
        resumed.append({"name": f"resumed_{name}", "argv": [*words, "--resume_from_checkpoint", "true"]})
    run_cases(2, resumed, folder / "results")
    return folder


def result_of(lab: Path, name: str) -> dict:
    return json.loads((lab / "results" / name / "result.json").read_text())


def training_steps(lab: Path, name: str) -> list[dict]:
    return [entry for entry in result_of(lab, name)["log_history"] if "loss" in entry]


def exported(lab: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(lab / name / "hf" / "model.safetensors")


def assert_same_trajectory(lab: Path, name: str, expected: oracle.Trajectory) -> None:
    steps = training_steps(lab, name)
    for entry, loss, norm in zip(steps, expected.losses, expected.grad_norms, strict=True):
        assert entry["loss"] == pytest.approx(loss, rel=2e-6)
        assert entry["grad_norm"] == pytest.approx(norm, rel=2e-6)
    for key, tensor in exported(lab, name).items():
        assert (tensor - expected.weights[key]).norm() <= 1e-5 * expected.weights[key].norm(), key


@pytest.fixture(scope="module")
def plain(small_model, rows) -> oracle.Trajectory:
    return oracle.train(MoEForCausalLM.from_pretrained(small_model).train(), recipe(rows))


def test_a_preset_learns_from_text(lab):
    losses = [entry["loss"] for entry in training_steps(lab, "from_scratch")]
    assert losses[0] == pytest.approx(torch.tensor(128.0).log().item(), rel=0.05)  # knows nothing yet
    assert losses[-1] < losses[0] - 0.5
    model, info = MoEForCausalLM.from_pretrained(lab / "from_scratch" / "hf", output_loading_info=True)
    assert not info["missing_keys"] and model.config.eos_token_id == 1


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_json_trains_like_one_process(lab, plain, name):
    assert_same_trajectory(lab, f"shipped_{name}", plain)


def test_gradient_checkpointing_changes_nothing(lab, plain):
    assert_same_trajectory(lab, "checkpointing", plain)


def test_micro_batch_of_one_token(lab, small_model):
    expected = oracle.train(MoEForCausalLM.from_pretrained(small_model).train(), recipe(odd_rows()))
    assert_same_trajectory(lab, "one_token", expected)


@pytest.mark.parametrize("zero", [2, 3])
@pytest.mark.parametrize("wanted", ["first_rank_only", "one_expert"])
def test_experts_and_ranks_without_tokens(lab, rows, wanted, zero):
    model = MoEForCausalLM.from_pretrained(lab / f"model_{wanted}").train()
    expected = oracle.train(model, recipe(rows))
    # With two experts per token a load of 2 means that one expert gets every token.
    assert expected.largest_loads[0] == pytest.approx(2.0)
    assert_same_trajectory(lab, f"{wanted}_zero{zero}", expected)


def test_evaluation_is_over_tokens(lab):
    """Seven rows over two ranks of two: the last batch is filled up with duplicates, which must not count."""
    model = MoEForCausalLM.from_pretrained(lab / "evaluated" / "hf").eval()
    total, count = 0.0, 0
    loads = torch.zeros(2, 4, dtype=torch.int64)
    for row in make_rows(7):
        ids, labels = torch.tensor([row["input_ids"]]), row["labels"]
        outputs = model(ids, output_router_logits=True)
        log_probs = outputs.logits[0].log_softmax(-1)
        for load, logits in zip(loads, outputs.router_logits, strict=True):
            for experts in logits.topk(2).indices.tolist():
                load[experts] += 1
        for position in range(1, len(labels)):
            if labels[position] != -100:
                total -= log_probs[position - 1, labels[position]].item()
                count += 1
    metrics = result_of(lab, "evaluated")["metrics"]
    assert metrics["eval_tokens"] == count
    assert metrics["eval_loss"] == pytest.approx(total / count, rel=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(torch.tensor(total / count).exp().item(), rel=1e-4)
    assert metrics["eval_aux_loss"] > 0 and metrics["eval_z_loss"] > 0
    for layer, load in zip((1, 3), loads.tolist(), strict=True):
        assert metrics[f"eval_max_vio/layer_{layer}"] == pytest.approx(max(load) / sum(load) * 4 - 1, rel=1e-9)
        assert metrics[f"eval_dead_experts/layer_{layer}"] == load.count(0)


def test_evaluation_alone_gives_the_same(lab):
    again, before = result_of(lab, "evaluated_again")["metrics"], result_of(lab, "evaluated")["metrics"]
    for key in ("eval_loss", "eval_aux_loss", "eval_z_loss", "eval_tokens"):
        assert again[key] == pytest.approx(before[key], rel=1e-6)
    assert not (lab / "evaluated_again" / "hf").exists()


@pytest.mark.parametrize("name", EP_RUNS)
def test_resuming_continues_bit_for_bit(lab, name):
    whole, resumed = training_steps(lab, f"whole_{name}"), training_steps(lab, f"resumed_{name}")
    assert [entry["step"] for entry in resumed] == [1, 2, 3, 4, 5, 6]  # the first three come from the saved state
    for entry, again in zip(whole, resumed, strict=True):
        for key in ("loss", "grad_norm", "learning_rate", "aux_loss", "z_loss", "num_tokens", "dead_experts"):
            assert entry[key] == again[key], (entry["step"], key)
    before, after = exported(lab, f"whole_{name}"), exported(lab, f"resumed_{name}")
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    # Resuming must have trained: the checkpoint's weights are not yet those of the end.
    at_three = load_file(lab / f"whole_{name}" / "checkpoint-3" / "hf" / "model.safetensors")
    assert not torch.equal(at_three["lm_head.weight"], after["lm_head.weight"])


@pytest.mark.parametrize("name", EP_RUNS)
def test_every_checkpoint_is_complete(lab, name):
    for step in (3, 6):
        checkpoint = lab / f"whole_{name}" / f"checkpoint-{step}"
        assert (checkpoint / "trainer_state.json").is_file()
        assert (checkpoint / "manifest.json").is_file()
        _, info = MoEForCausalLM.from_pretrained(checkpoint / "hf", output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
    card = (lab / f"whole_{name}" / "hf" / "README.md").read_text()
    assert f"{training_steps(lab, f'whole_{name}')[-1]['loss']:.4f}" in card
    lines = (lab / f"whole_{name}" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if '"loss"' in line] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "name", ["nan_zero0_fp32", "nan_zero1_fp32", "nan_zero2_bf16", "nan_zero3_fp32", "nan_zero3_bf16"]
)
def test_a_step_with_nan_is_skipped_on_all_ranks(lab, name):
    steps = training_steps(lab, name)
    assert [entry["skipped_steps"] for entry in steps] == [0, 0, 1, 1, 1, 1]
    assert not torch.tensor(steps[POISONED_STEP]["loss"]).isfinite()
    assert all(torch.tensor(entry["loss"]).isfinite() for entry in steps[POISONED_STEP + 1 :])
    for key, tensor in exported(lab, name).items():
        if key == "model.embed_tokens.weight":
            tensor = torch.cat([tensor[:POISON], tensor[POISON + 1 :]])
        assert tensor.isfinite().all(), key


def test_too_many_skipped_steps_end_the_run_with_a_checkpoint(lab):
    error = result_of(lab, "nan_stops")["error"]
    assert "2 steps in a row" in error and "max_skipped_steps=2" in error
    assert training_steps(lab, "nan_stops")[-1]["step"] == 3
    assert (lab / "nan_stops" / "checkpoint-3" / "manifest.json").is_file()


def resume(lab: Path, folder: Path) -> tuple[int, str]:
    """Start the second half of a run in a copy of its folder; return the exit code and what was said on stderr."""
    words = flags(
        recipe([]),
        2,
        model_name_or_path=lab / "evaluated" / "hf",
        train_file=lab / "odd.jsonl",
        output_dir=folder,
        deepspeed=lab / "whole_zero2_ep.json",
        save_strategy="steps",
        save_steps=3,
        bf16=True,
        resume_from_checkpoint=folder / "checkpoint-3",
    )
    done = deepspeed(2, ROOT / "run_clm_moe.py", *words, timeout=120)
    return done.returncode, done.stderr


def assert_one_sentence(stderr: str, *fragments: str) -> None:
    said = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1, stderr[-3000:]
    for fragment in fragments:
        assert fragment in said[0]
    assert "Traceback" not in stderr


def test_a_rank_that_cannot_load_ends_all(lab, tmp_path):
    """What DeepSpeed cannot read although it is what was saved."""
    checkpoint = shutil.copytree(lab / "whole_zero2_ep" / "checkpoint-3", tmp_path / "checkpoint-3")
    shard = checkpoint / "global_step3" / SECOND_RANKS_SHARD
    shard.write_bytes(shard.read_bytes()[:-2000] + bytes(2000))
    manifest = read_manifest(checkpoint)
    config = MoEConfig.from_pretrained(checkpoint / "hf")
    write_manifest(checkpoint, manifest.topology, config, manifest.progress)
    returncode, stderr = resume(lab, tmp_path)
    assert returncode == 2
    assert_one_sentence(stderr, "checkpoint-3 cannot be loaded")
