"""Checkpoints and runs are told from manifests: whole, torn or resumable, and no pickle in them is executed."""

import pickle
import shutil
from pathlib import Path

import pytest
import torch
from helpers_model import tiny_config, tiny_model
from safetensors.torch import load_file, save_file

from moe_hf.checkpoint.description import size_of
from moe_hf.checkpoint.export import export_model
from moe_hf.checkpoint.manifest import Progress, write_manifest
from moe_hf.checkpoint.run_description import bytes_to_verify, describe, describe_checkpoint, describe_run
from moe_hf.checkpoint.topology import Topology
from moe_hf.errors import CheckpointError

ZERO2 = Topology(world_size=2, expert_parallel_size=2, zero_stage=2, dtype="bfloat16")
PLAIN = Topology(world_size=1, expert_parallel_size=0, zero_stage=-1, dtype="float32")
SHARD = "global_step7/zero_pp_rank_1_mp_rank_00_optim_states.pt"


def make_checkpoint(folder: Path, topology: Topology = ZERO2, *, step: int = 7, **options) -> Path:
    """Write files of the kinds that a checkpoint has, with a manifest; their content is nobody's here."""
    folder.mkdir(parents=True)
    export_model(tiny_model(), folder / "hf")
    (folder / "trainer_state.json").write_text("{}")
    if topology.has_deepspeed:
        (folder / SHARD).parent.mkdir()
        (folder / SHARD).write_bytes(bytes(range(200)))
        (folder / "latest").write_text("global_step7")
    write_manifest(folder, topology, tiny_config(), Progress(step, 28, 4), **options)
    return folder


def zero0_checkpoint(folder: Path) -> Path:
    """Write the one file of DeepSpeed's stage 0: whole tensors, and the optimizer's states in the order of groups."""
    model = tiny_model()
    parameters = sorted(model.named_parameters(), key=lambda item: item[1].dim() == 1)
    states = {i: {"step": 7, "exp_avg": torch.ones_like(p)} for i, (_, p) in enumerate(parameters)}
    content = {
        "module": model.state_dict(),
        "buffer_names": [],
        "optimizer": {"state": states, "param_groups": []},
        "dp_world_size": 1,
        "global_steps": 7,
        "global_samples": 28,
        "skipped_steps": 0,
    }
    (folder / "global_step7").mkdir(parents=True)
    torch.save(content, folder / "global_step7" / "mp_rank_00_model_states.pt")
    (folder / "latest").write_text("global_step7")
    export_model(model, folder / "hf")
    write_manifest(folder, Topology(1, 0, 0, "float32"), tiny_config(), Progress(7, 28, 4))
    return folder


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("topology", [ZERO2, PLAIN])
def test_a_whole_checkpoint(tmp_path, topology):
    path = make_checkpoint(tmp_path / "checkpoint-7", topology)
    read = []
    checkpoint = describe_checkpoint(path, on_bytes=read.append)
    assert checkpoint.problems == [] and checkpoint.resumable and checkpoint.checksums
    assert checkpoint.manifest.topology == topology and checkpoint.manifest.progress.step == 7
    assert checkpoint.size == size_of(tiny_config())
    files = {p.relative_to(path).as_posix(): p.stat().st_size for p in path.rglob("*") if p.is_file()}
    del files["manifest.json"]
    assert checkpoint.files == files
    assert sum(read) == sum(files.values()) == bytes_to_verify(path)
    assert checkpoint.export.problems == [] and checkpoint.export.model_type == "moe_hf"


def test_sizes_only_reads_no_file(tmp_path):
    path = make_checkpoint(tmp_path / "checkpoint-7")
    flip_a_byte(path / SHARD)
    read = []
    checkpoint = describe_checkpoint(path, checksums=False, on_bytes=read.append)
    assert (checkpoint.problems, checkpoint.checksums, read) == ([], False, [])


@pytest.mark.parametrize("topology", [ZERO2, PLAIN])
@pytest.mark.parametrize(
    ("name", "spoil", "sentence"),
    [
        ("trainer_state.json", Path.unlink, "is torn: trainer_state.json is missing."),
        ("trainer_state.json", lambda path: path.write_text("{"), "has 1 bytes instead of 2."),
        ("trainer_state.json", flip_a_byte, "trainer_state.json is not what was saved"),
        ("hf/generation_config.json", flip_a_byte, "hf/generation_config.json is not what was saved"),
    ],
)
def test_a_torn_file_is_named(tmp_path, topology, name, spoil, sentence):
    """With DeepSpeed a run does not need the export; without it the export is what it resumes from."""
    path = make_checkpoint(tmp_path / "checkpoint-7", topology)
    spoil(path / name)
    checkpoint = describe_checkpoint(path)
    assert any(sentence in problem for problem in checkpoint.problems)
    in_export = name.startswith("hf/")
    assert bool(checkpoint.state_problems) == (not in_export)
    assert checkpoint.resumable == (in_export and topology is ZERO2)


def test_an_export_without_a_weight_is_found_by_sizes_too(tmp_path):
    path = make_checkpoint(tmp_path / "checkpoint-7")
    (path / "hf" / "model.safetensors").unlink()
    checkpoint = describe_checkpoint(path, checksums=False)
    assert checkpoint.state_problems == [] and checkpoint.resumable
    assert [p for p in checkpoint.export_problems if "hf/model.safetensors is missing" in p]
    assert [p for p in checkpoint.export.problems if "has no model.safetensors" in p]


def test_an_export_that_was_saved_incomplete_is_found(tmp_path):
    """Every file is what was saved, and yet a tensor is missing."""
    path = make_checkpoint(tmp_path / "checkpoint-7")
    weights = load_file(path / "hf" / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, path / "hf" / "model.safetensors", {"format": "pt"})
    (path / "manifest.json").unlink()
    write_manifest(path, ZERO2, tiny_config(), Progress(7))
    checkpoint = describe_checkpoint(path)
    assert checkpoint.problems == [f"{path / 'hf'} is incomplete: model.norm.weight is missing."]
    assert checkpoint.resumable


def test_without_a_manifest_the_files_are_still_listed(tmp_path):
    path = make_checkpoint(tmp_path / "checkpoint-7")
    (path / "manifest.json").unlink()
    checkpoint = describe(path)
    assert len(checkpoint.problems) == 1 and "has no manifest.json" in checkpoint.problems[0]
    assert checkpoint.manifest is None and not checkpoint.resumable and checkpoint.size is None
    assert SHARD in checkpoint.files and checkpoint.export.problems == []


def test_weights_only_is_whole_but_not_resumed(tmp_path):
    checkpoint = describe_checkpoint(make_checkpoint(tmp_path / "checkpoint-7", weights_only=True))
    assert checkpoint.problems == [] and not checkpoint.resumable


def test_the_architecture_of_another_version_is_left_out(tmp_path, monkeypatch):
    path = make_checkpoint(tmp_path / "checkpoint-7")
    monkeypatch.setattr("moe_hf.checkpoint.topology.ARCHITECTURE_FIELDS", ("model_type", "num_attention_heads"))
    (path / "manifest.json").unlink()
    config = tiny_config()
    config.num_attention_heads = 5
    write_manifest(path, ZERO2, config, Progress(7))
    checkpoint = describe_checkpoint(path)
    assert checkpoint.problems == [] and checkpoint.size is None


def test_tensors_of_the_sharded_state(tmp_path):
    path = zero0_checkpoint(tmp_path / "checkpoint-7")
    expected = {name: tuple(tensor.shape) for name, tensor in tiny_model().state_dict().items()}
    assert describe_checkpoint(path).shapes == {}
    checkpoint = describe_checkpoint(path, tensors=True)
    assert (checkpoint.problems, checkpoint.shapes, checkpoint.states) == ([], expected, ["fp32", "exp_avg"])


def test_a_pickle_in_the_state_is_not_executed(tmp_path):
    """Neither without `tensors`, when nothing is opened, nor with it, when only tensors and plain values are taken."""
    path, mark = zero0_checkpoint(tmp_path / "checkpoint-7"), tmp_path / "executed"

    class Evil:
        def __reduce__(self):
            return (Path.touch, (mark,))

    for name in ("global_step7/mp_rank_00_model_states.pt", "training_args.bin", "scheduler.pt", "rng_state_0.pth"):
        torch.save({"module": Evil()}, path / name)
    write_manifest(path, Topology(1, 0, 0, "float32"), tiny_config(), Progress(7))
    assert describe_checkpoint(path).problems == []
    checkpoint = describe_checkpoint(path, tensors=True)
    assert len(checkpoint.problems) == 1 and "mp_rank_00_model_states.pt holds an object of" in checkpoint.problems[0]
    assert not checkpoint.resumable and not mark.exists()
    torch.load(path / "scheduler.pt", weights_only=False)
    assert mark.exists()  # it is a pickle that does


def test_raw_pickles_are_not_executed(tmp_path):
    path, mark = zero0_checkpoint(tmp_path / "checkpoint-7"), tmp_path / "executed"

    class Evil:
        def __reduce__(self):
            return (Path.touch, (mark,))

    (path / "global_step7" / "mp_rank_00_model_states.pt").write_bytes(pickle.dumps(Evil()))
    write_manifest(path, Topology(1, 0, 0, "float32"), tiny_config(), Progress(7))
    assert len(describe_checkpoint(path, tensors=True).problems) == 1
    assert not mark.exists()


# --------------------------------------------------------------------------------------------------------------------
# Runs


def test_a_run(tmp_path):
    for step in (5, 10, 15):
        make_checkpoint(tmp_path / f"checkpoint-{step}", step=step)
    export_model(tiny_model(), tmp_path / "hf")
    (tmp_path / ".checkpoint-20.incomplete").mkdir()
    run = describe(tmp_path)
    assert [checkpoint.path.name for checkpoint in run.checkpoints] == [
        "checkpoint-15",
        "checkpoint-10",
        "checkpoint-5",
    ]
    assert run.problems == [] and run.newest_resumable.path.name == "checkpoint-15"
    assert run.export.problems == [] and run.leftovers == [".checkpoint-20.incomplete"]
    assert bytes_to_verify(tmp_path) == sum(sum(checkpoint.files.values()) for checkpoint in run.checkpoints)
    (tmp_path / "checkpoint-15" / SHARD).unlink()
    flip_a_byte(tmp_path / "checkpoint-10" / "hf" / "generation_config.json")
    run = describe_run(tmp_path)
    assert len(run.problems) == 2 and run.newest_resumable.path.name == "checkpoint-10"
    assert [bool(checkpoint.problems) for checkpoint in run.checkpoints] == [True, True, False]


def test_a_run_without_anything_whole(tmp_path):
    make_checkpoint(tmp_path / "checkpoint-5", weights_only=True)
    (tmp_path / "hf").mkdir()
    run = describe(tmp_path)
    assert run.newest_resumable is None and run.export is None
    assert len(run.problems) == 1 and "hf is not a model folder" in run.problems[0]


def test_a_run_that_was_killed_at_its_first_save(tmp_path):
    (tmp_path / ".checkpoint-5.incomplete").mkdir()
    run = describe(tmp_path)
    assert (run.kind, run.checkpoints, run.export, run.problems) == ("run", [], None, [])


def test_the_kind_of_a_folder(tmp_path):
    make_checkpoint(tmp_path / "run" / "checkpoint-7")
    assert describe(tmp_path / "run").kind == "run"
    assert describe(tmp_path / "run" / "checkpoint-7").kind == "checkpoint"
    assert describe(tmp_path / "run" / "checkpoint-7" / "hf").kind == "model"
    shutil.move(tmp_path / "run" / "checkpoint-7", tmp_path / "renamed")
    assert describe(tmp_path / "renamed").kind == "checkpoint"


def test_anything_else_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(
            CheckpointError, match=r"is not a folder; give a model, a checkpoint-N or OUTPUT_DIR of a run"
        ):
            describe(path)
    with pytest.raises(CheckpointError, match=r"holds no model \(config.json\), no checkpoint"):
        describe(tmp_path)
