"""Every launch script, scaled down, with its own DeepSpeed JSON and number of ranks; and what the recipes promise.

A recipe of several ranks takes minutes on two cores: --slow runs those.
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
import torch
from launching import ROOT, environment, run_script

from moe_hf import MoEConfig, MoEForCausalLM
from moe_hf.checkpoint.manifest import is_whole, read_manifest
from moe_hf.parallel.deepspeed_config import expert_parallel_size, read_deepspeed_json, zero_stage
from moe_hf.parallel.placement import expert_parallel_groups
from moe_hf.presets import read_preset
from moe_hf.presets.scaling import scaled_down
from moe_hf.reporting.metrics_log import METRICS_NAME

# FP32 weights and two moments of Adam.
OPTIMIZER_BYTES = 12


@dataclass(frozen=True)
class Recipe:
    """What one launch script promises: so many ranks, on machines with so many each, and how they share the work."""

    script: str
    preset: str
    ranks: int
    per_machine: int
    ep_size: int
    zero: int

    def __str__(self) -> str:
        return self.script

    @cached_property
    def deepspeed_json(self) -> dict:
        return read_deepspeed_json(ROOT / "ds_configs" / f"{self.preset}.json")

    @cached_property
    def num_parameters(self) -> tuple[int, int]:
        """Parameters outside and inside of experts."""
        with torch.device("meta"):
            model = MoEForCausalLM(MoEConfig(**read_preset(self.preset)))
        experts = sum(p.numel() for name, p in model.named_parameters() if ".mlp.experts." in name)
        return model.num_parameters() - experts, experts

    def bytes_of_weights(self) -> float:
        """Return bytes of BF16 weights on each rank at rest."""
        dense, experts = self.num_parameters
        if self.zero == 3:
            return 2 * (dense + experts) / self.ranks
        return 2 * (dense + experts / max(self.ep_size, 1))


RECIPES = [
    Recipe("train_single_gpu.sh", "small-1.3b", ranks=1, per_machine=1, ep_size=0, zero=2),
    Recipe("train_7b_4gpu.sh", "medium-7b", ranks=4, per_machine=4, ep_size=4, zero=2),
    Recipe("train_fine_64e.sh", "fine-64e", ranks=8, per_machine=8, ep_size=8, zero=2),
    Recipe("train_olmoe_1b_7b.sh", "olmoe-1b-7b", ranks=8, per_machine=8, ep_size=8, zero=2),
    Recipe("train_16b_8gpu.sh", "large-16b", ranks=8, per_machine=8, ep_size=4, zero=3),
    Recipe("train_qwen3_30b_a3b_16gpu.sh", "qwen3-30b-a3b", ranks=16, per_machine=8, ep_size=8, zero=3),
    Recipe("train_mixtral_8x7b_16gpu.sh", "mixtral-8x7b", ranks=16, per_machine=8, ep_size=8, zero=3),
    Recipe("train_70b_16gpu.sh", "xlarge-70b", ranks=16, per_machine=8, ep_size=8, zero=3),
]
EACH = [pytest.param(r, id=r.script, marks=[pytest.mark.slow] * (r.ranks > 1)) for r in RECIPES]


def logged(folder: Path) -> list[dict]:
    """Return what was logged at every step."""
    lines = (folder / METRICS_NAME).read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if "loss" in entry]


def test_every_script_and_json_is_a_recipe():
    scripts = {path.name for path in (ROOT / "scripts").glob("train_*.sh")}
    assert scripts == {recipe.script for recipe in RECIPES}
    presets = {path.stem for path in (ROOT / "ds_configs").glob("*-*.json")}
    assert presets == {recipe.preset for recipe in RECIPES}


@pytest.mark.parametrize("recipe", EACH)
def test_script_trains_the_twin(recipe, tmp_path):
    done = run_script(recipe.script, "--output_dir", tmp_path, SMOKE="1")
    assert done.returncode == 0, f"{done.stdout[-2000:]}{done.stderr[-5000:]}"

    entries = logged(tmp_path)
    losses, norms = torch.tensor([[entry["loss"], entry["grad_norm"]] for entry in entries]).T
    # Of three different batches; that training learns is shown elsewhere.
    assert len(losses) == 3 and losses.isfinite().all() and (norms > 0).all() and norms.isfinite().all(), entries
    assert entries[-1]["skipped_steps"] == 0

    model, info = MoEForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    twin = MoEConfig(**scaled_down(read_preset(recipe.preset)))
    for name in ("num_hidden_layers", "mlp_layer_types", "num_experts", "num_experts_per_tok", "hidden_size"):
        assert getattr(model.config, name) == getattr(twin, name), name

    checkpoint = tmp_path / "checkpoint-3"
    assert is_whole(checkpoint, part="all")
    topology = read_manifest(checkpoint).topology
    promised = (recipe.ranks, recipe.ep_size, recipe.zero, "bfloat16")
    assert (topology.world_size, topology.expert_parallel_size, topology.zero_stage, topology.dtype) == promised
    assert_optimizer_is_shared_out(checkpoint, model.num_parameters(), recipe.ranks)


def assert_optimizer_is_shared_out(checkpoint: Path, num_parameters: int, ranks: int) -> None:
    """Each rank has an equal share of the optimizer, the experts' too: 12 bytes a parameter, over all ranks."""
    sizes = dict.fromkeys(range(ranks), 0)
    for path in checkpoint.glob("global_step3/*optim_states.pt"):
        sizes[int(re.search(r"pp_rank_(\d+)_", path.name)[1])] += path.stat().st_size
    share = OPTIMIZER_BYTES * num_parameters / ranks
    assert all(share <= size <= 1.2 * share + 100_000 for size in sizes.values()), (share, sizes)


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_script_and_json_say_what_the_recipe_promises(recipe):
    assert expert_parallel_size(recipe.deepspeed_json) == recipe.ep_size
    assert zero_stage(recipe.deepspeed_json) == recipe.zero
    script = (ROOT / "scripts" / recipe.script).read_text()
    assert f'train {recipe.preset} {recipe.ranks // recipe.per_machine} {recipe.per_machine} "$@"' in script


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_documented_memory_follows_from_the_preset(recipe):
    """The table of docs/recipes.md against the arithmetic written out beside it."""
    rows = [row.strip("| ").split(" | ") for row in (ROOT / "docs" / "recipes.md").read_text().splitlines()]
    (row,) = [row for row in rows if row[0] == f"`{recipe.preset}`"]
    _, _, ranks, ep_size, zero, weights, gradients, optimizer, together, checkpoints = [word.strip() for word in row]
    assert (ranks, ep_size, zero) == (str(recipe.ranks), str(recipe.ep_size or "off"), str(recipe.zero))
    share = sum(recipe.num_parameters) / recipe.ranks
    on_gpu = [recipe.bytes_of_weights(), 2 * share, OPTIMIZER_BYTES * share]
    if "offload_optimizer" in recipe.deepspeed_json["zero_optimization"]:
        assert gradients == "host" and optimizer == "host"
        on_gpu = on_gpu[:1]
    else:
        assert [gradients, optimizer] == [f"{value / 1e9:.1f}" for value in on_gpu[1:]]
    assert weights == f"{on_gpu[0] / 1e9:.1f}" and together == f"**{sum(on_gpu) / 1e9:.1f}**"
    script = (ROOT / "scripts" / recipe.script).read_text()
    tokens, rows = (
        int(re.search(rf"--{flag} (\d+)", script)[1]) for flag in ("block_size", "per_device_train_batch_size")
    )
    config = MoEConfig(**read_preset(recipe.preset))
    kept = config.num_hidden_layers * rows * tokens * config.hidden_size * 2
    assert checkpoints == f"{kept / 1e9:.1f}" and tokens <= config.max_position_embeddings
    assert sum(on_gpu) + kept < 60e9  # of 80: the rest is for what is computed with, and for the step


@pytest.mark.slow
@pytest.mark.parametrize("size", ["5m", "40m", "124m", "350m"])
def test_comparison_of_dense_and_sparse_runs(size):
    done = run_script("compare_dense_moe.sh", size, SMOKE="1")
    assert done.returncode == 0, f"{done.stdout[-2000:]}{done.stderr[-5000:]}"
    for family, ep_size in (("gpt", 0), ("moe", 2)):
        folder = ROOT / "runs" / "smoke" / f"{family}-{size}"
        assert [entry["step"] for entry in logged(folder)] == [1, 2, 3]
        for entry in logged(folder):
            router_losses = 0.01 * entry.get("aux_loss", 0) + 0.001 * entry.get("z_loss", 0)
            assert entry["loss"] == pytest.approx(entry["ce_loss"] + router_losses, rel=1e-4)
        twin = MoEConfig(**scaled_down(read_preset(f"{family}-{size}")))
        assert MoEConfig.from_pretrained(folder / "hf").num_experts == twin.num_experts == (8 if ep_size else 0)
        assert re.search(rf"{family}-{size}\s.*\d", done.stdout), done.stdout[-3000:]
    assert list((ROOT / "runs" / "smoke" / "report").glob("*.html"))
    assert list((ROOT / "runs" / "smoke" / "report").rglob("*.png"))


@pytest.mark.parametrize(
    ("words", "variables", "said"),
    [
        (["train_7b_4gpu.sh"], {}, "takes 4 accelerators and there are 0 here"),
        (["train_70b_16gpu.sh"], {}, "takes 2 machines with 8 accelerators each; give HOSTFILE="),
        (["train_70b_16gpu.sh"], {"NODE_RANK": "0"}, "MASTER_ADDR: is the address of the machine with NODE_RANK=0"),
        (["compare_dense_moe.sh", "6m"], {}, "there is no size '6m'; choose among: 5m 40m 124m 350m"),
    ],
)
def test_mistakes_are_told_before_anything_starts(words, variables, said):
    done = run_script(*words, **variables, timeout=60)
    assert done.returncode in (1, 2) and said in done.stderr and "Traceback" not in done.stderr, done.stderr


@pytest.fixture(scope="module")
def rank_9_of_16() -> list[dict]:
    """What DeepSpeed gives to rank 9 of 16, in some layouts."""
    layouts = [(2, 8, {}), (3, 4, {}), (3, 8, {}), (2, 16, {}), (2, 2, {"use_data_before_expert_parallelism": True})]
    words = []
    for zero, ep_size, others in layouts:
        config = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_optimization": {"stage": zero}}
        config["expert_parallel"] = {"enabled": True, "autoep_size": ep_size}
        words.append(json.dumps(config | others))
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "distributed" / "placement_worker.py", "9", "16", *words],
        env={**environment(), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_expert_parallel_groups_are_neighbours_within_a_machine(rank_9_of_16):
    """On machines with 8 ranks each: 0 to 7, and 8 to 15."""
    found = [(share["experts_with"], share["same_experts"]) for share in rank_9_of_16]
    eight, four, eight_again, across, strided = found
    assert eight == eight_again == ([8, 9, 10, 11, 12, 13, 14, 15], [1, 9])
    assert four == ([8, 9, 10, 11], [1, 5, 9, 13])
    assert across == (list(range(16)), [9])
    assert strided == ([1, 9], [8, 9, 10, 11, 12, 13, 14, 15])
    for group, arguments in ((eight, (16, 8)), (four, (16, 4)), (across, (16, 16)), (strided, (16, 2, True))):
        assert group[0] in expert_parallel_groups(*arguments)


def test_memory_is_shared_as_documented(rank_9_of_16):
    """The formulas of docs/recipes.md, but for what DeepSpeed rounds up."""
    for share, (zero, ep_size) in zip(rank_9_of_16, [(2, 8), (3, 4), (3, 8), (2, 16), (2, 2)], strict=True):
        dense, experts = share["dense"], share["experts"]
        weights = (dense + experts) / 16 if zero == 3 else dense + experts / ep_size
        assert weights <= share["weights"] <= 1.02 * weights, (zero, ep_size)
        assert (dense + experts) / 16 <= share["optimizer"] <= 1.02 * (dense + experts) / 16, (zero, ep_size)


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_no_recipe_sends_tokens_between_machines(recipe):
    for group in expert_parallel_groups(recipe.ranks, max(recipe.ep_size, 1)):
        assert len({rank // recipe.per_machine for rank in group}) == 1
