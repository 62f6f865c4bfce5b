"""Whatever layout wrote a checkpoint, it reads back as the whole tensors it was cut from, bit for bit."""

import json

import pytest
import torch
from deepspeed_files import STATES, Run, correction_biases, draw_states, live_model, loss_free, odd_config
from deepspeed_files import write_checkpoint as write

from moe_hf.checkpoint.export import expected_tensors
from moe_hf.checkpoint.manifest import Progress, write_manifest
from moe_hf.checkpoint.sharded import ShardedCheckpoint
from moe_hf.checkpoint.topology import Topology
from moe_hf.errors import CheckpointError

RUNS = [
    Run(ranks, zero, ep, bf16)
    for zero in (0, 1, 2, 3)
    for ranks, ep in ((1, None), (3, None), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4), (8, 2))
    for bf16 in (False, True)
    if zero or ep is None
]
# Elements of a rank's sub group: of some parameters each, of one each, and of nearly a whole group.
SUB_GROUPS = [Run(ranks, 3, ep, True, size) for ranks, ep in ((3, None), (4, 2)) for size in (1, 40, 400)]
MODELS = {"softmax": odd_config(), "loss_free": loss_free(), "tied": odd_config(tie_word_embeddings=True)}


@pytest.mark.parametrize("run", RUNS + SUB_GROUPS, ids=lambda run: run.name)
def test_every_layout_reads_back(tmp_path, run):
    model = live_model(MODELS["softmax"])
    states = draw_states(model)
    checkpoint = ShardedCheckpoint(write(tmp_path / "checkpoint-3", run, model, states))
    assert_holds(checkpoint, states)
    assert checkpoint.step == run.counted_steps
    assert checkpoint.counters == {"global_steps": 3, "global_samples": 12, "skipped_steps": 1}
    assert checkpoint.topology.world_size == run.ranks and checkpoint.config.to_dict() == model.config.to_dict()


@pytest.mark.parametrize("kind", ["loss_free", "tied"])
@pytest.mark.parametrize(
    "run", [Run(2, 0), Run(2, 0, bf16=True), Run(4, 1, 2), Run(3, 2, bf16=True), Run(4, 3, 4), Run(3, 3)], ids=str
)
def test_buffers_and_tied_embeddings(tmp_path, run, kind):
    model = live_model(MODELS[kind])
    states = draw_states(model)
    checkpoint = ShardedCheckpoint(write(tmp_path / "checkpoint-3", run, model, states))
    assert_holds(checkpoint, states, correction_biases(model))
    assert len(checkpoint.buffers) == (3 if kind == "loss_free" else 0)
    assert ("lm_head.weight" in checkpoint.shapes) is (kind != "tied")


def test_the_layouts_need_what_is_tested(tmp_path):
    """Padding of groups and of parameters, and ranks that hold nothing of a parameter, are there to go wrong."""
    model = live_model(MODELS["softmax"])
    states = draw_states(model)
    for ep in (1, 2, 4):
        write(tmp_path / f"a{ep}", Run(4, 1, ep), model, states)
        last = torch.load(
            tmp_path / f"a{ep}" / "global_step3" / "zero_pp_rank_3_mp_rank_00_optim_states.pt", weights_only=False
        )["optimizer_state_dict"]
        paddings = last["group_paddings"]
        assert paddings[0] and paddings[2], paddings
    vectors = [name for name, param in model.named_parameters() if param.numel() < 4]
    assert vectors and all(param.numel() % 4 for param in model.model.norm.parameters())


def assert_holds(checkpoint, states, buffers=None):
    buffers = buffers or {}
    names = expected_tensors(checkpoint.config)
    assert checkpoint.shapes == {name: tuple(tensor.shape) for name, tensor in names.items()}
    assert checkpoint.state_names == list(STATES)
    assert names.keys() == states["fp32"].keys() | buffers.keys()
    for state in STATES:
        for name, tensor in states[state].items():
            assert same(checkpoint.read(name, state), tensor), (state, name)
    for name, tensor in buffers.items():
        assert same(checkpoint.read(name), tensor), name


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return found.dtype == expected.dtype == torch.float32 and torch.equal(found, expected)


# --------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.fixture
def checkpoint(tmp_path):
    model = live_model(MODELS["softmax"])
    return write(tmp_path / "checkpoint-3", Run(2, 2, 2), model, draw_states(model))


def refusal(path) -> str:
    with pytest.raises(CheckpointError) as caught:
        ShardedCheckpoint(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_without_latest(checkpoint):
    (checkpoint / "latest").unlink()
    assert refusal(checkpoint) == f"{checkpoint} has no readable file `latest`; use another checkpoint."
    (checkpoint / "latest").write_bytes(b"\xff\xfe")
    assert "has no readable file `latest`" in refusal(checkpoint)


@pytest.mark.parametrize("named", ["global_step4", "../other", "..", ".", "", "hf/config.json", "/etc"])
def test_latest_names_a_folder_of_the_checkpoint_or_is_refused(checkpoint, named):
    (checkpoint.parent / "other").mkdir()
    (checkpoint / "latest").write_text(named)
    assert str(checkpoint) in refusal(checkpoint)


def test_the_export_beside_the_shards_says_what_the_model_is(checkpoint):
    path = checkpoint / "hf" / "config.json"
    path.write_text(path.read_text()[:40])
    assert refusal(checkpoint).startswith(f"{path} is damaged")
    path.write_text(json.dumps({"model_type": "moe_hf", "no_such_field": 1}))
    assert refusal(checkpoint).startswith(f"{path} is damaged")
    path.unlink()
    assert refusal(checkpoint) == f"{checkpoint} has no hf/config.json, which describes its model."


def test_without_a_manifest(checkpoint):
    (checkpoint / "manifest.json").unlink()
    assert "has no manifest.json" in refusal(checkpoint)


def test_written_without_deepspeed(checkpoint):
    write_manifest(checkpoint, Topology(1, 0, -1, "float32"), MODELS["softmax"], Progress(3))
    assert refusal(checkpoint) == (
        f"{checkpoint} was written without DeepSpeed and has no shards; its model is {checkpoint / 'hf'}."
    )


def test_written_by_ranks_that_shared_matrices(checkpoint):
    layout = Topology(2, 0, 2, "bfloat16", tensor_parallel_size=2)
    write_manifest(checkpoint, layout, MODELS["softmax"], Progress(3))
    assert refusal(checkpoint) == (
        f"{checkpoint} has matrices cut by tensor_parallel_size=2, which are put together while training only; its "
        f"model, in bfloat16, is {checkpoint / 'hf'}."
    )


@pytest.mark.parametrize(
    "name", ["lm_head.weight.1", "model.layers.0.mlp.experts.gate_up_proj", "model.layers.9.mlp.experts.down_proj"]
)
def test_a_name_that_the_model_has_not(checkpoint, name):
    with pytest.raises(CheckpointError, match=r"holds no .* the model it was trained with has none"):
        ShardedCheckpoint(checkpoint).read(name)
