"""A checkpoint resumes on the layout and the model it was written with, and only when it is whole."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from small import small_config

from moe_hf.checkpoint.topology import Topology, check_resumable, write_topology
from moe_hf.errors import CheckpointError

LAYOUT = Topology(world_size=4, expert_parallel_size=2, zero_stage=3, dtype="bfloat16")
FILES = {
    "trainer_state.json": 120,
    "global_step3/zero_pp_rank_0_model_states.pt": 4000,
    "global_step3/zero_pp_rank_1_model_states.pt": 4000,
    "rng_state_0.pth": 17,
    "hf/model.safetensors": 900,
    "hf/config.json": 30,
}


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    folder = tmp_path / "checkpoint-3"
    for name, size in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(size))
    write_topology(folder, LAYOUT, small_config())
    return folder


def refusal(checkpoint: Path, topology: Topology = LAYOUT, **changes) -> str:
    with pytest.raises(CheckpointError) as error:
        check_resumable(checkpoint, topology, small_config(**changes))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_was_written_may_be_resumed(checkpoint):
    check_resumable(checkpoint, LAYOUT, small_config())
    # What does not change the tensors or their meaning may be another.
    check_resumable(checkpoint, LAYOUT, small_config(router_aux_loss_coef=0.5, attention_dropout=0.1))


def test_record_holds_every_file_of_the_state_and_its_size(checkpoint):
    record = json.loads((checkpoint / "topology.json").read_text())
    assert record["files"] == {name: size for name, size in FILES.items() if not name.startswith("hf/")}
    assert record["topology"] == {
        "world_size": 4,
        "expert_parallel_size": 2,
        "zero_stage": 3,
        "dtype": "bfloat16",
    }
    assert not (checkpoint / ".topology.json").exists()


def test_export_may_be_moved_or_deleted(checkpoint):
    (checkpoint / "hf" / "config.json").unlink()
    check_resumable(checkpoint, LAYOUT, small_config())
    (checkpoint / "hf" / "model.safetensors").rename(checkpoint.parent / "model.safetensors")
    (checkpoint / "hf").rmdir()
    check_resumable(checkpoint, LAYOUT, small_config())


def test_files_that_were_added_do_no_harm(checkpoint):
    (checkpoint / "notes.txt").write_text("mine")
    check_resumable(checkpoint, LAYOUT, small_config())


def test_record_can_be_written_again(checkpoint):
    (checkpoint / "rng_state_0.pth").write_bytes(bytes(18))
    assert "rng_state_0.pth has 18 bytes instead of 17" in refusal(checkpoint)
    write_topology(checkpoint, LAYOUT, small_config())
    check_resumable(checkpoint, LAYOUT, small_config())


def test_record_can_be_written_again_after_a_kill(checkpoint):
    (checkpoint / ".topology.json").write_text('{"topology": {')
    write_topology(checkpoint, LAYOUT, small_config())
    check_resumable(checkpoint, LAYOUT, small_config())


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("world_size", 2, "the number of processes must stay 4"),
        ("expert_parallel_size", 4, "the expert-parallel size must stay 2"),
        ("expert_parallel_size", 0, "the expert-parallel size must stay 2"),
        ("zero_stage", 2, "the ZeRO stage must stay 3"),
        ("zero_stage", -1, "the ZeRO stage must stay 3"),
        ("dtype", "float32", "the training dtype must stay bfloat16"),
    ],
)
def test_another_layout_is_refused(checkpoint, field, value, words):
    sentence = refusal(checkpoint, replace(LAYOUT, **{field: value}))
    assert words in sentence
    assert f"--model_name_or_path {checkpoint / 'hf'}" in sentence
    assert "written by 4 processes, ZeRO 3, EP 2, bfloat16" in sentence


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
    assert field in refusal(checkpoint, **{field: value})


# --------------------------------------------------------------------------------------------------------------------
# Torn and damaged


@pytest.mark.parametrize("name", [name for name in FILES if not name.startswith("hf/")])
def test_missing_and_truncated_files_are_named(checkpoint, name):
    with open(checkpoint / name, "r+b") as file:
        file.truncate(FILES[name] - 1)
    expected = f"is torn: {name} has {FILES[name] - 1} bytes instead of {FILES[name]}; resume from another checkpoint."
    assert refusal(checkpoint).endswith(expected)
    (checkpoint / name).unlink()
    assert refusal(checkpoint).endswith(f"is torn: {name} is missing; resume from another checkpoint.")


def test_no_checkpoint(tmp_path, checkpoint):
    assert refusal(tmp_path / "checkpoint-4").startswith(f"There is no checkpoint at {tmp_path / 'checkpoint-4'};")
    assert refusal(checkpoint / "trainer_state.json").startswith("There is no checkpoint at ")


def test_checkpoint_without_its_record_is_not_whole(checkpoint):
    (checkpoint / "topology.json").unlink()
    assert "has no topology.json, so it is not a whole checkpoint" in refusal(checkpoint)


def truncated(record: dict) -> bytes:
    return json.dumps(record).encode()[:-40]


@pytest.mark.parametrize(
    "damage",
    [
        truncated,
        lambda record: b"",
        lambda record: b"\xff\xfe{}",
        lambda record: b"[]",
        lambda record: b"null",
        lambda record: json.dumps({"topology": record["topology"]}).encode(),
        lambda record: json.dumps(record | {"topology": {"world_size": 4}}).encode(),
        lambda record: json.dumps(record | {"topology": record["topology"] | {"nodes": 1}}).encode(),
    ],
)
def test_damaged_record_is_refused(checkpoint, damage):
    path = checkpoint / "topology.json"
    path.write_bytes(damage(json.loads(path.read_text())))
    assert refusal(checkpoint) == f"{path} is damaged; resume from another checkpoint."


@pytest.mark.parametrize(
    "change",
    [{"architecture": []}, {"architecture": None}, {"files": []}, {"files": None}, {"architecture": {"new_field": 1}}],
)
def test_record_of_another_form_is_refused(checkpoint, change):
    path = checkpoint / "topology.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert refusal(checkpoint).startswith(str(checkpoint))


def test_layouts_are_described_in_words():
    assert LAYOUT.describe() == "4 processes, ZeRO 3, EP 2, bfloat16"
    assert Topology(1, 0, -1, "float32").describe() == "1 processes, no DeepSpeed, EP off, float32"
