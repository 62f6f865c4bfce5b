"""`moe-hf plan` says what a setting needs and whether it fits, or finds one that does."""

import json
import re
from pathlib import Path

import pytest
from launching import ROOT

from moe_hf import MoEConfig, cli
from moe_hf.checkpoint.model_card import active_parameters
from moe_hf.planning.search import check_setting
from moe_hf.presets import read_preset

SCRIPTS = sorted((ROOT / "scripts").glob("train_*.sh"))
TIMES = ("always", "computing", "stepping")
SMALL = ["--config_name", "moe-40m", "--gpus", "2"]


def plan(capsys, *words: object) -> tuple[int, str]:
    """Run the command; return its exit code and what it printed, or the error."""
    try:
        cli.main(["plan", *map(str, words)])
    except SystemExit as ended:
        printed = capsys.readouterr()
        return ended.code, printed.out + printed.err
    return 0, capsys.readouterr().out


def words_of(script: Path) -> list[str]:
    """Return what a launch script trains, as arguments of this command."""
    text = script.read_text()
    preset, nodes, processes = re.search(r"^train (\S+) (\d+) (\d+)", text, re.MULTILINE).groups()
    flags = re.findall(r"--(block_size|per_device_train_batch_size|gradient_accumulation_steps) (\d+)", text)
    words = [word for name, value in flags for word in (f"--{name}", value)]
    files = ["--config_name", preset, "--deepspeed", f"{ROOT}/ds_configs/{preset}.json"]
    return [*files, *words, "--gpus", str(int(nodes) * int(processes))]


def words_for(name: str) -> list[str]:
    return words_of(ROOT / "scripts" / name)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_fits_the_gpus_that_it_names(script, capsys):
    code, printed = plan(capsys, *words_of(script), "--gpu-memory", 80)
    assert (code, printed.splitlines()[-1]) == (0, "fits: yes"), printed


def test_mixtral_does_not_fit_four_gpus(capsys):
    words = words_for("train_mixtral_8x7b_16gpu.sh")
    code, printed = plan(capsys, *words[:-1], 4, "--gpu_memory", 80, "--expert_parallel_size", 4)
    assert (code, printed.splitlines()[-1]) == (1, "fits: no"), printed
    # The states alone: 16 bytes a parameter over four GPUs.
    peak = float(re.search(r"^memory +([\d.]+) of 72.00 GB", printed, re.MULTILINE)[1])
    assert 16 * 46.7 / 4 < peak < 16 * 46.7 / 4 + 25


def test_json_of_mixtral_on_sixteen_gpus(capsys):
    """Against the arithmetic of docs/recipes.md, worked out here by hand."""
    code, printed = plan(capsys, *words_for("train_mixtral_8x7b_16gpu.sh"), "--json")
    found = json.loads(printed)
    config = MoEConfig(**read_preset("mixtral-8x7b"))
    total = active_parameters(config).total
    assert code == 0 and found["fits"] and found["parameters"]["total"] == total == 46_702_792_704
    held = {kind: 0 for kind in ("weights", "gradients", "optimizer")}
    for amount in found["memory"]:
        held[amount["kind"]] = held.get(amount["kind"], 0) + (amount["bytes"] if amount["place"] == "gpu" else 0)
    for kind, size in (("weights", 2), ("gradients", 2), ("optimizer", 12)):
        assert held[kind] == pytest.approx(size * total / 16, rel=1e-3)
    times = {when: sum(a["bytes"] for a in found["memory"] if a["when"] == when) for when in TIMES}
    assert found["peak_bytes"] == times["always"] + max(times["computing"], times["stepping"])
    assert found["peak_bytes"] <= found["usable_bytes"] == 72e9 and found["host_bytes"] == 0
    # Two matrices of tokens to the experts and back, forward, again forward, and backward: 16 x 32 layers.
    (exchange,) = [m for m in found["messages"] if m["purpose"] == "tokens to experts and back"]
    assert exchange["message"] == 6 * 16 * 32 * (2 * 4096 * 2) * 4096 * 2
    assert exchange["sent"] == exchange["message"] * 7 // 8 and not exchange["ranks"] > 8
    assert found["step"]["tokens"] == 2 * 4096 * 16 * 16
    flops = 4 / 3 * found["flops_per_token"]["total"] * 2 * 4096 * 16
    assert found["step"]["computing"] == pytest.approx(flops / (989e12 * 0.3))


def test_offloaded_states_are_on_the_host(capsys):
    found = json.loads(plan(capsys, *words_for("train_70b_16gpu.sh"), "--json")[1])
    share = found["parameters"]["total"] / 16
    assert found["host_bytes"] == pytest.approx(18 * share, rel=0.01)
    assert not [a for a in found["memory"] if a["kind"] == "optimizer" and a["place"] == "gpu"]


def test_table_says_what_the_json_says(capsys):
    words = [*SMALL, "--deepspeed", f"{ROOT}/ds_configs/zero2_ep.json", "--block-size", 512, "--micro-batch", 8]
    _, text = plan(capsys, *words)
    found = json.loads(plan(capsys, *words, "--json")[1])
    assert "2 GPUs, ZeRO 2, EP 2, gradient checkpointing on" in text
    assert "8 x 512 tokens a GPU, 1 times: 8,192 tokens a step" in text
    assert f"{found['peak_bytes'] / 1e9:,.2f} of 72.00 GB" in text
    assert all(f"{m['operation']}: {m['purpose']}" in text for m in found["messages"])
    assert max(map(len, text.splitlines())) <= 120


def test_search_ranks_what_fits_and_writes_a_json_that_is_accepted(capsys, tmp_path):
    path = tmp_path / "best.json"
    words = [*SMALL, "--gpu-memory", 3, "--block_size", 512, "--gradient_accumulation_steps", 8]
    code, printed = plan(capsys, *words, "--output", path, "--json")
    candidates = json.loads(printed)["candidates"]
    assert code == 0 and len(candidates) > 3
    seconds = [float(f"{candidate['step']['seconds']:.3g}") for candidate in candidates]
    assert seconds == sorted(seconds) and all(c["peak_bytes"] <= 2.7e9 for c in candidates)
    assert {c["step"]["tokens"] for c in candidates} == {2 * 8 * 512}

    best = json.loads(path.read_text())
    assert best == candidates[0]["deepspeed"]
    sizes = best["train_micro_batch_size_per_gpu"], best["gradient_accumulation_steps"]
    check_setting(best, MoEConfig(**read_preset("moe-40m")), 2, "bf16", *sizes)
    # The file is planned as the search has planned it.
    again = ["--deepspeed", path, "--micro_batch", sizes[0], "--gradient_accumulation_steps", sizes[1]]
    found = json.loads(plan(capsys, *words[:-2], *again, "--json")[1])
    assert found["peak_bytes"] == candidates[0]["peak_bytes"] and found["step"] == candidates[0]["step"]


def test_nothing_fits(capsys, tmp_path):
    words = ["--config_name", "mixtral-8x7b", "--gpus", 2, "--block_size", 512, "--per_device_train_batch_size", 1]
    code, printed = plan(capsys, *words, "--output", tmp_path / "best.json")
    assert (code, printed.splitlines()[-1]) == (1, "fits: no") and not (tmp_path / "best.json").exists()
    assert printed.startswith("No setting fits; take more GPUs")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--hardware", "H1000"], "--hardware H1000 is not known; there are H100-80GB, H200, A100-80GB, A100-40GB"),
        (["--gpus", "0"], "'0' is not a whole number above 0"),
        (["--gpu-memory", "nan"], "'nan' is not a number above 0"),
        (["--efficiency", "1.5"], "--efficiency 1.5 must be a share of the peak, at most 1."),
        (["--block_size", "100000"], "--block_size 100000 is more than the model's max_position_embeddings=512."),
        (["--config_name", "mixtrl-8x7b"], "did you mean mixtral-8x7b?"),
        (["--gradient_checkpointing", "maybe"], "'maybe' is neither True nor False"),
        (["--expert_parallel_size", "3"], "expert_parallel_size=3 is larger than world_size=2; use 1 or 2"),
        (["--output", "x.json"], "--output is for the setting that a search finds"),
        (["--deepspeed", '{"zero_optimization": {"stage": 2, "stge": 1}}'], "stge is not a DeepSpeed key"),
        (["--precision", "fp32", "--deepspeed", "BF16"], "bf16.enabled=true contradicts --bf16 False"),
        (["--deepspeed", "MUON"], "optimizer.type=Muon is not planned: the formulas are of AdamW"),
        (["--deepspeed", "HPZ"], "zero_optimization.zero_hpz_partition_size=2 is not planned: there is no formula"),
    ],
)
def test_mistakes_are_one_sentence(words, sentence, capsys):
    stored = {
        "BF16": {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}},
        "MUON": {"optimizer": {"type": "Muon"}, "gradient_clipping": 0.0, "zero_optimization": {"stage": 2}},
        "HPZ": {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}},
    }
    common = {"bf16": {"enabled": "auto"}, "train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto"}
    words = [json.dumps(common | stored[word]) if word in stored else word for word in words]
    given = [*SMALL, "--deepspeed", f"{ROOT}/ds_configs/zero2_ep.json", *words]
    code, printed = plan(capsys, *given)
    assert code == 2 and sentence in printed and "Traceback" not in printed
