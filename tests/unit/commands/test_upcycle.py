"""`moe-hf upcycle`: flags become a recipe, and a mistake one sentence."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small import small_config

from moe_hf import MoEConfig, MoEForCausalLM, cli
from moe_hf.checkpoint.export import export_model
from moe_hf.checkpoint.upcycling import Copy, Drop, Granular, Noise, UpcyclingRecipe
from moe_hf.commands import upcycle


@pytest.fixture(autouse=True)
def only_this_command(monkeypatch):
    monkeypatch.setattr(cli, "COMMANDS", (upcycle,))


@pytest.fixture
def dense(tmp_path) -> Path:
    config = small_config(
        num_experts=0, decoder_sparse_step=1, shared_expert_intermediate_size=0, shared_expert_gate=False
    )
    export_model(MoEForCausalLM(config), tmp_path / "dense")
    return tmp_path / "dense"


def words(dense: Path, method: str, *others: str) -> list[str]:
    return [
        "upcycle", "--model", str(dense), "--output", str(dense.parent / "moe"), "--num-experts", "8",
        "--num-experts-per-tok", "4", "--method", method, *others,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "recipe"),
    [
        (["copy"], UpcyclingRecipe(Copy(), 8, 4)),
        (["copy", "--layers", "every-2", "--seed", "7"], UpcyclingRecipe(Copy(), 8, 4, "every-2", seed=7)),
        (["noise"], UpcyclingRecipe(Noise(0.1, 0.5), 8, 4)),
        (["noise", "--noise-std", "0.3", "--noise-fraction", "1"], UpcyclingRecipe(Noise(0.3, 1.0), 8, 4)),
        (["granular", "--granularity", "4"], UpcyclingRecipe(Granular(4), 8, 4)),
        (["drop", "--router-std", "0.01"], UpcyclingRecipe(Drop(0.5), 8, 4, router_std=0.01)),
        (["drop", "--drop-ratio", "0.25"], UpcyclingRecipe(Drop(0.25), 8, 4)),
    ],
)
def test_flags_become_a_recipe(dense, monkeypatch, flags, recipe):
    given = []

    def take(model, output, recipe, **options):
        given.append((model, output, recipe, options))
        return small_config()

    monkeypatch.setattr("moe_hf.checkpoint.upcycling.upcycle", take)
    cli.main(words(dense, *flags, "--dtype", "float16", "--max-shard-size", "1.5GB"))
    options = {"dtype": torch.float16, "max_shard_size": "1.5GB", "show_progress": True}
    assert given == [(str(dense), str(dense.parent / "moe"), recipe, options)]


def test_command_writes_a_model_and_says_how_large_it_is(dense, capsys):
    cli.main(words(dense, "granular", "--granularity", "4", "--layers", "1,3", "--dtype", "bfloat16"))
    config = MoEConfig.from_pretrained(dense.parent / "moe")
    assert config.mlp_layer_types == ["dense", "sparse", "dense", "sparse"]
    assert (config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size) == (8, 4, 12)
    tensors = load_file(dense.parent / "moe" / "model.safetensors")
    total = sum(tensor.numel() for tensor in tensors.values())
    experts = sum(tensor.numel() for name, tensor in tensors.items() if ".experts." in name)
    captured = capsys.readouterr()
    assert captured.out == (
        f"{dense.parent / 'moe'}: {total:,} parameters, {total - experts // 2:,} active for one token.\n"
    )
    assert "upcycling" in captured.err and f"{len(tensors)}/{len(tensors)}" in captured.err
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["copy", "--noise-std", "0.1"], "--noise-std 0.1 has no effect with --method copy; it belongs to noise."),
        (
            ["copy", "--noise-fraction", "0.1"],
            "--noise-fraction 0.1 has no effect with --method copy; it belongs to noise.",
        ),
        (["noise", "--drop-ratio", "0.5"], "--drop-ratio 0.5 has no effect with --method noise; it belongs to drop."),
        (["drop", "--granularity", "2"], "--granularity 2 has no effect with --method drop; it belongs to granular."),
        (["granular"], "--method granular needs --granularity, into how many experts the MLP is cut."),
        (["granular", "--granularity", "3"], "--num-experts 8 must be a multiple of --granularity 3."),
        (["granular", "--granularity", "8"], "--num-experts-per-tok 4 must be a multiple of --granularity 8."),
        (["drop", "--drop-ratio", "1"], "--drop-ratio 1.0 must be above 0 and below 1; 0 is --method copy."),
        (["copy", "--num-experts", "2"], "--num-experts-per-tok 4 must be between 1 and --num-experts 2."),
        (["copy", "--layers", "every-9"], "--layers every-9: the step must be between 1 and the model's 4 layers."),
        (["copy", "--max-shard-size", "5"], '--max-shard-size 5 must be a number of KB, MB, GB or TB, like "5GB".'),
        (["copy", "--model", "/nowhere"], "/nowhere is not a folder with a config.json and weights."),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(dense, capsys, flags, sentence):
    with pytest.raises(SystemExit) as ended:
        cli.main(words(dense, *flags))
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {sentence}"
    assert [path.name for path in dense.parent.iterdir()] == ["dense"]


def test_a_model_with_experts_is_refused(dense, capsys):
    export_model(MoEForCausalLM(small_config()), dense.parent / "sparse")
    with pytest.raises(SystemExit):
        cli.main(words(dense, "copy", "--model", str(dense.parent / "sparse")))
    assert capsys.readouterr().err == (
        "error: The model already has 4 experts in 2 layers; upcycling starts from a dense one.\n"
    )
