"""An export from the files of a checkpoint is the export of the live model, byte for byte, or it is not there."""

import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from deepspeed_files import (
    STEP,
    Run,
    disk_that_holds,
    draw_states,
    live_model,
    loss_free,
    odd_config,
    write_checkpoint,
)
from safetensors.torch import load_file, save_file
from small import save_tokenizer, small_config
from transformers import AutoTokenizer, MixtralForCausalLM

from moe_hf import MoEForCausalLM
from moe_hf.checkpoint import weights as weights_module
from moe_hf.checkpoint.convert import convert, write_model
from moe_hf.checkpoint.export import export_model
from moe_hf.checkpoint.manifest import Progress, write_manifest
from moe_hf.checkpoint.offline import open_exportable
from moe_hf.checkpoint.topology import Topology
from moe_hf.errors import CheckpointError, ConfigError

RUNS = [Run(2, 0), Run(2, 0, bf16=True), Run(3, 1), Run(4, 2, 2, bf16=True), Run(4, 3, 2), Run(2, 3, 2, bf16=True)]
CONFIG = loss_free()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def live_export(model: MoEForCausalLM, folder: Path, dtype: torch.dtype, **options) -> dict[str, bytes]:
    """Export the model from memory in this dtype, with the tokenizer and card of the checkpoint; return the files."""
    export_model(model.to(dtype), folder, model_card="# A card\n", **options)
    save_tokenizer(folder)
    return contents(folder)


def saved(folder: Path, run: Run, config=CONFIG) -> Path:
    model = live_model(config)
    return write_checkpoint(folder / f"checkpoint-{STEP}", run, model, draw_states(model), export=True)


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return saved(tmp_path, Run(2, 2, 2, bf16=True))


def refusal(function, *arguments, **options) -> str:
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --------------------------------------------------------------------------------------------------------------------
# What is written


@pytest.mark.parametrize("max_shard_size", ["5GB", "8KB"])
@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_in_the_dtype_of_training(tmp_path, run, max_shard_size):
    source = open_exportable(saved(tmp_path, run))
    write_model(source, tmp_path / "out", max_shard_size=max_shard_size)
    found = contents(tmp_path / "out")
    assert found == live_export(live_model(CONFIG), tmp_path / "live", run.dtype, max_shard_size=max_shard_size)
    assert len([name for name in found if name.endswith(".safetensors")]) > (max_shard_size == "8KB")
    assert {"config.json", "generation_config.json", "modeling_moe.py", "tokenizer.json", "README.md"} <= found.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("run", [RUNS[1], RUNS[4], RUNS[5]], ids=lambda run: run.name)
def test_in_another_dtype(tmp_path, run, dtype):
    """Float32 gives the masters that the 16-bit weights were rounded from."""
    write_model(open_exportable(saved(tmp_path, run)), tmp_path / "out", dtype=dtype)
    assert contents(tmp_path / "out") == live_export(live_model(CONFIG), tmp_path / "live", dtype)
    masters = live_model(CONFIG).state_dict()
    for name, tensor in weights(tmp_path / "out").items():
        is_buffer = name.endswith("e_score_correction_bias")
        assert tensor.dtype == (torch.float32 if is_buffer else dtype)
        assert torch.equal(tensor, masters[name].to(tensor.dtype)), name


def test_tied_embeddings(tmp_path):
    config = odd_config(tie_word_embeddings=True)
    write_model(open_exportable(saved(tmp_path, Run(2, 3, 2), config)), tmp_path / "out")
    assert contents(tmp_path / "out") == live_export(live_model(config), tmp_path / "live", torch.float32)
    assert "lm_head.weight" not in weights(tmp_path / "out")


def test_it_loads_and_computes_the_same(tmp_path):
    config = small_config(scoring_func="sigmoid", router_balancing="loss_free")
    write_model(open_exportable(saved(tmp_path, Run(4, 3, 2), config)), tmp_path / "out")
    loaded, info = MoEForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = torch.arange(3, 15).reshape(2, 6)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(tokens).logits, live_model(config).eval()(tokens).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("w7 w9").input_ids == [7, 9]


def test_names_are_told_before_they_are_read(tmp_path, checkpoint):
    told = []
    write_model(open_exportable(checkpoint), tmp_path / "out", on_tensor=told.append)
    assert sorted(told) == sorted(weights(tmp_path / "out"))


MIXTRAL = {
    "decoder_sparse_step": 1,
    "use_qk_norm": False,
    "shared_expert_intermediate_size": 0,
    "shared_expert_gate": False,
}


@pytest.mark.parametrize("run", [Run(2, 2, 2, bf16=True), Run(3, 3)], ids=lambda run: run.name)
def test_as_another_architecture(tmp_path, run):
    config = small_config(**MIXTRAL)
    checkpoint = saved(tmp_path, run, config)
    told = []
    write_model(open_exportable(checkpoint), tmp_path / "out", to="mixtral", dtype=torch.float32, on_tensor=told.append)
    export_model(live_model(config), tmp_path / "live")
    save_tokenizer(tmp_path / "live")
    convert(tmp_path / "live", tmp_path / "converted", to="mixtral")
    assert contents(tmp_path / "out") == contents(tmp_path / "converted")
    assert sorted(told) == sorted(weights(tmp_path / "out"))
    tokens = torch.arange(3, 15).reshape(2, 6)
    with torch.no_grad():
        theirs = MixtralForCausalLM.from_pretrained(tmp_path / "out").eval()(tokens).logits
        ours = live_model(config).eval()(tokens).logits
    assert ((theirs - ours).abs().max() / ours.abs().max()).item() < 1e-5


def test_an_architecture_without_a_feature_of_the_model_is_refused(tmp_path, checkpoint):
    source = open_exportable(checkpoint)
    assert refusal(write_model, source, tmp_path / "out", to="mixtral")
    assert "'gpt2' cannot be converted" in refusal(write_model, source, tmp_path / "out", to="gpt2")
    assert not list(tmp_path.glob("*out*"))


# --------------------------------------------------------------------------------------------------------------------
# Where it is read from


def test_without_deepspeed_the_model_is_the_export(tmp_path):
    model = live_model(CONFIG)
    checkpoint = tmp_path / "checkpoint-3"
    files = live_export(model, checkpoint / "hf", torch.float32)
    write_manifest(checkpoint, Topology(1, 0, -1, "float32"), CONFIG, Progress(STEP))
    told = []
    write_model(open_exportable(checkpoint, told.append), tmp_path / "out")
    assert contents(tmp_path / "out") == files
    assert sorted(told) == sorted(f"hf/{name}" for name in files)
    write_model(open_exportable(checkpoint), tmp_path / "half", dtype=torch.bfloat16)
    assert contents(tmp_path / "half") == live_export(model, tmp_path / "live", torch.bfloat16)
    damage(checkpoint / "hf" / "model.safetensors")
    assert "hf/model.safetensors is not what was saved" in refusal(open_exportable, checkpoint)


def test_a_checkpoint_of_weights_only(tmp_path):
    """`--save_only_model` leaves no shards, under DeepSpeed neither."""
    checkpoint = tmp_path / "checkpoint-3"
    files = live_export(live_model(CONFIG), checkpoint / "hf", torch.bfloat16)
    write_manifest(checkpoint, Topology(2, 2, 3, "bfloat16"), CONFIG, Progress(STEP), weights_only=True)
    write_model(open_exportable(checkpoint), tmp_path / "out")
    assert contents(tmp_path / "out") == files


def test_a_folder_with_a_model(tmp_path):
    files = live_export(live_model(CONFIG), tmp_path / "model", torch.bfloat16)
    write_model(open_exportable(tmp_path / "model"), tmp_path / "out")
    assert contents(tmp_path / "out") == files


def test_what_is_neither_is_refused(tmp_path):
    assert refusal(open_exportable, tmp_path) == (
        f"{tmp_path} has no manifest.json, so it is not a whole checkpoint of run_clm_moe.py."
    )
    assert refusal(open_exportable, tmp_path / "absent").startswith(f"There is no folder {tmp_path / 'absent'};")
    (tmp_path / "checkpoint-3").mkdir()
    assert f"is a run; give one of its checkpoints, such as {tmp_path / 'checkpoint-3'}." in refusal(
        open_exportable, tmp_path
    )


# --------------------------------------------------------------------------------------------------------------------
# Damage


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_every_file_that_is_used_is_verified(checkpoint):
    told = []
    open_exportable(checkpoint, told.append)
    shards = [f"global_step{STEP}/{path.name}" for path in (checkpoint / f"global_step{STEP}").iterdir()]
    assert sorted(told) == sorted([*shards, "latest"])
    for name in [*shards, "latest", "hf/config.json", "hf/tokenizer.json", "hf/README.md", "hf/generation_config.json"]:
        before = (checkpoint / name).read_bytes()
        damage(checkpoint / name)
        assert refusal(open_exportable, checkpoint) == (
            f"{checkpoint} is torn: {name} is not what was saved, its SHA-256 differs."
        )
        (checkpoint / name).write_bytes(before[:-1])
        assert f"{checkpoint} is torn: {name} " in refusal(open_exportable, checkpoint)
        (checkpoint / name).unlink()
        assert f"{checkpoint} is torn: {name} " in refusal(open_exportable, checkpoint)
        (checkpoint / name).write_bytes(before)
    open_exportable(checkpoint)


def test_the_rounded_weights_beside_the_shards_are_not_needed(tmp_path, checkpoint):
    (checkpoint / "hf" / "model.safetensors").unlink()
    write_model(open_exportable(checkpoint), tmp_path / "out")
    assert contents(tmp_path / "out") == live_export(live_model(CONFIG), tmp_path / "live", torch.bfloat16)


def test_what_a_later_conversion_left_beside_them_is_not_looked_at(tmp_path, checkpoint):
    (checkpoint / "universal").mkdir()
    (checkpoint / "universal" / "file").touch()
    open_exportable(checkpoint)


# --------------------------------------------------------------------------------------------------------------------
# Whole or not there


def test_what_is_there_is_not_overwritten(tmp_path, checkpoint):
    source = open_exportable(checkpoint)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    assert refusal(write_model, source, tmp_path / "out") == (
        f"--output {tmp_path / 'out'} is already there; give a new folder."
    )
    assert contents(tmp_path / "out") == {"mine": b"keep"}
    before = contents(checkpoint)
    assert "is already there" in refusal(write_model, source, checkpoint)
    assert "is already there" in refusal(write_model, source, checkpoint / "latest")
    assert contents(checkpoint) == before


@pytest.mark.parametrize("to", ["moe_hf", "mixtral"])
def test_a_full_disk_leaves_nothing(tmp_path, to):
    config = small_config(**MIXTRAL)
    source = open_exportable(saved(tmp_path, Run(2, 2, 2), config))
    before = sorted(path.name for path in tmp_path.iterdir())
    with disk_that_holds(12_000):
        sentence = refusal(write_model, source, tmp_path / "out", to=to, max_shard_size="10KB")
    assert sentence.startswith(f"{tmp_path / 'out'} could not be written: ") and not sentence.endswith("..")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    write_model(source, tmp_path / "out", to=to)


@pytest.mark.parametrize("error", [CheckpointError("damaged."), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_an_error_in_the_middle_leaves_nothing(tmp_path, checkpoint, error):
    source, names = open_exportable(checkpoint), []

    def stop(name: str) -> None:
        names.append(name)
        if len(names) == 30:
            assert list(tmp_path.glob(".out.incomplete/*.safetensors"))
            raise error

    with pytest.raises(type(error)):
        write_model(source, tmp_path / "out", max_shard_size="3KB", on_tensor=stop)
    assert not list(tmp_path.glob("*out*"))


def test_values_that_do_not_fit_are_refused(tmp_path):
    model = live_model(CONFIG)
    states = draw_states(model)
    states["fp32"]["model.layers.2.mlp.experts.down_proj"][1, 2, 3] = 70000.0
    checkpoint = write_checkpoint(tmp_path / "checkpoint-3", Run(2, 2, 2), model, states)
    sentence = refusal(write_model, open_exportable(checkpoint), tmp_path / "out", dtype=torch.float16)
    assert sentence == (
        "model.layers.2.mlp.experts.down_proj holds 70000, too much for torch.float16; use another --dtype."
    )
    assert not list(tmp_path.glob("*out*"))


def test_a_size_that_is_none_is_refused(tmp_path, checkpoint):
    sentence = refusal(write_model, open_exportable(checkpoint), tmp_path / "out", max_shard_size="large")
    assert sentence == "--max-shard-size large is not a size such as 500MB or 5GB."
    assert not list(tmp_path.glob("*out*"))


def test_one_shard_and_one_tensor_are_held(tmp_path, monkeypatch):
    """What was read for one file is gone when the next one is written."""
    source = open_exportable(saved(tmp_path, Run(2, 2, 2), odd_config()))
    references, written = [], []

    def read(name: str) -> torch.Tensor:
        tensor = source.read(name)
        references.append((len(written), weakref.ref(tensor)))
        return tensor

    def save(*arguments) -> None:
        save_file(*arguments)
        assert {index for index, reference in references if reference() is not None} == {len(written)}
        written.append(arguments[1])

    monkeypatch.setattr(weights_module, "save_file", save)
    write_model(replace(source, read=read), tmp_path / "out", max_shard_size="10KB")
    assert len(written) > 3
