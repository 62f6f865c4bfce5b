"""A checkpoint resumes on any layout it can be converted to, with its own model, and only when it is whole."""

from dataclasses import replace
from pathlib import Path

import pytest
from small import small_config

from moe_hf.checkpoint.manifest import Progress, write_manifest
from moe_hf.checkpoint.resume import check_architecture, check_resumable, check_whole
from moe_hf.checkpoint.topology import Topology
from moe_hf.errors import CheckpointError

LAYOUT = Topology(world_size=4, expert_parallel_size=2, zero_stage=3, dtype="bfloat16")
FILES = {"trainer_state.json": 120, "global_step3/zero_pp_rank_1_model_states.pt": 400, "hf/model.safetensors": 90}


def make(folder: Path, **others) -> Path:
    for name, size in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(size))
    write_manifest(folder, others.pop("layout", LAYOUT), small_config(), Progress(step=3), **others)
    return folder


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return make(tmp_path / "checkpoint-3")


def refusal(checkpoint: Path, topology: Topology = LAYOUT, **changes) -> str:
    with pytest.raises(CheckpointError) as error:
        check_resumable(checkpoint, topology, small_config(**changes))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_was_written_may_be_resumed(checkpoint):
    assert check_resumable(checkpoint, LAYOUT, small_config()).progress.step == 3
    # What does not change the tensors or their meaning may be another.
    check_resumable(checkpoint, LAYOUT, small_config(router_aux_loss_coef=0.5, attention_dropout=0.1))


def test_export_may_be_moved_or_deleted(checkpoint):
    (checkpoint / "hf" / "model.safetensors").unlink()
    check_resumable(checkpoint, LAYOUT, small_config())
    with pytest.raises(CheckpointError, match=r"hf/model\.safetensors is missing"):
        check_whole(checkpoint, part="export")


def test_without_deepspeed_the_weights_are_the_export(tmp_path):
    layout = Topology(world_size=1, expert_parallel_size=0, zero_stage=-1, dtype="float32")
    checkpoint = make(tmp_path / "checkpoint-3", layout=layout)
    check_resumable(checkpoint, layout, small_config())
    (checkpoint / "hf" / "model.safetensors").unlink()
    assert "is torn: hf/model.safetensors is missing" in refusal(checkpoint, layout)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("zero_stage", -1, "DeepSpeed must stay on"),
        ("dtype", "float32", "the training dtype must stay bfloat16"),
    ],
)
def test_what_cannot_be_converted_is_refused(checkpoint, field, value, words):
    sentence = refusal(checkpoint, replace(LAYOUT, **{field: value}))
    assert words in sentence
    assert "To start from its weights only, add --reset_optimizer." in sentence
    assert "written by 4 processes, ZeRO 3, EP 2, bfloat16" in sentence


@pytest.mark.parametrize(
    ("field", "value"), [("world_size", 2), ("expert_parallel_size", 4), ("expert_parallel_size", 0), ("zero_stage", 2)]
)
def test_another_layout_is_converted(checkpoint, field, value):
    assert check_resumable(checkpoint, replace(LAYOUT, **{field: value}), small_config()).topology == LAYOUT


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocab_size": 256}, "vocab_size=128 there but 256 here"),
        ({"hidden_size": 64, "head_dim": 8}, "hidden_size=32 there but 64 here"),
        ({"intermediate_size": 56}, "intermediate_size=48 there but 56 here"),
        ({"moe_intermediate_size": 16}, "moe_intermediate_size=24 there but 16 here"),
        ({"num_hidden_layers": 6}, "num_hidden_layers=4 there but 6 here"),
        ({"num_attention_heads": 8, "head_dim": 8}, "num_attention_heads=4 there but 8 here"),
        ({"num_key_value_heads": 4}, "num_key_value_heads=2 there but 4 here"),
        ({"head_dim": 16}, "head_dim=8 there but 16 here"),
        ({"decoder_sparse_step": 4}, "mlp_layer_types=['dense', 'sparse', 'dense', 'sparse'] there but"),
        ({"num_experts": 8}, "num_experts=4 there but 8 here"),
        ({"num_experts_per_tok": 1}, "num_experts_per_tok=2 there but 1 here"),
        ({"use_qk_norm": False}, "use_qk_norm=True there but False here"),
        ({"qk_norm_scope": "full"}, "qk_norm_scope=head there but full here"),
        ({"attention_gate": "headwise"}, "attention_gate=None there but headwise here"),
        ({"attention_bias": True}, "attention_bias=False there but True here"),
        ({"shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size=16 there but 8 here"),
        ({"shared_expert_gate": False}, "shared_expert_gate=True there but False here"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=False there but True here"),
    ],
)
def test_another_model_is_refused(checkpoint, changes, words):
    sentence = refusal(checkpoint, **changes)
    assert f"holds another model: {words}" in sentence and "give the configuration it was trained with" in sentence


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("norm_topk_prob", False),
        ("routed_scaling_factor", 2.0),
        ("rms_norm_eps", 1e-3),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 7.0}),
    ],
)
def test_another_meaning_of_the_same_tensors_is_refused(checkpoint, field, value):
    assert f"holds another model: {field}=" in refusal(checkpoint, **{field: value})


def test_new_field_of_another_version_is_another_model(checkpoint):
    manifest = check_resumable(checkpoint, LAYOUT, small_config())
    newer = replace(manifest, architecture=manifest.architecture | {"router_colour": "red"})
    with pytest.raises(CheckpointError, match="router_colour=red there but None here"):
        check_architecture(checkpoint, newer, small_config())


def test_weights_alone_are_not_resumed(tmp_path):
    sentence = refusal(make(tmp_path / "checkpoint-3", weights_only=True))
    assert "holds weights only (--save_only_model); add --reset_optimizer" in sentence


# --------------------------------------------------------------------------------------------------------------------
# Torn


def test_no_checkpoint(tmp_path, checkpoint):
    assert refusal(tmp_path / "checkpoint-4").startswith(f"There is no checkpoint at {tmp_path / 'checkpoint-4'};")
    assert refusal(checkpoint / "trainer_state.json").startswith("There is no checkpoint at ")


def test_torn_checkpoint_is_named_and_a_whole_one_offered(tmp_path):
    alone = "; there is no other whole checkpoint beside it."
    for step in (3, 6, 9):
        make(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-9" / "trainer_state.json").write_bytes(bytes(7))
    torn = f"{tmp_path / 'checkpoint-9'} is torn: trainer_state.json has 7 bytes instead of 120"
    assert refusal(tmp_path / "checkpoint-9") == f"{torn}; resume from {tmp_path / 'checkpoint-6'}."
    (tmp_path / "checkpoint-6" / "manifest.json").unlink()
    assert refusal(tmp_path / "checkpoint-9") == f"{torn}; resume from {tmp_path / 'checkpoint-3'}."
    write_manifest(tmp_path / "checkpoint-3", LAYOUT, small_config(), Progress(3), weights_only=True)
    assert refusal(tmp_path / "checkpoint-9") == torn + alone
    without = f"{tmp_path / 'checkpoint-6'} has no manifest.json, so it is not a whole checkpoint of run_clm_moe.py"
    assert refusal(tmp_path / "checkpoint-6") == without + alone
