"""`moe-hf inspect` prints a table or the documented JSON, and its exit code is the verdict."""

import json
from pathlib import Path

import pytest
import torch
from small import save_tokenizer, small_config

from moe_hf import MoEForCausalLM, cli
from moe_hf.checkpoint.export import export_model
from moe_hf.checkpoint.manifest import Progress, write_manifest
from moe_hf.checkpoint.topology import Topology
from moe_hf.commands import inspect

SIZE_KEYS = {"parameters", "active_parameters", "layers", "sparse_layers", "experts", "experts_per_token"}


@pytest.fixture(autouse=True)
def command(monkeypatch):
    if inspect not in cli.COMMANDS:
        monkeypatch.setattr(cli, "COMMANDS", (*cli.COMMANDS, inspect))


@pytest.fixture
def run(tmp_path) -> Path:
    """Write the output folder of a run of two checkpoints and an export."""
    torch.manual_seed(0)
    model = MoEForCausalLM(small_config()).bfloat16()
    for step in (5, 10):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        export_model(model, folder / "hf")
        (folder / "global_step").mkdir()
        (folder / "global_step" / "optim_states.pt").write_bytes(b"x" * 1000)
        write_manifest(folder, Topology(2, 2, 3, "bfloat16"), model.config, Progress(step, step * 4, 4))
    export_model(model, tmp_path / "run" / "hf", max_shard_size="30KB")
    save_tokenizer(tmp_path / "run" / "hf")
    return tmp_path / "run"


def inspected(capsys, *words: str | Path) -> tuple[int, str, str]:
    """Run the command and return its exit code and what it printed."""
    code = 0
    try:
        cli.main(["inspect", *map(str, words)])
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


def facts(table: str) -> dict[str, str]:
    """Read the first block of a table: a title and a text on each line."""
    return {line[:13].rstrip(): line[14:] for line in table.rstrip("\n").split("\n\n")[0].split("\n")}


def test_a_model_as_a_table(run, capsys):
    code, out, err = inspected(capsys, run / "hf")
    assert (code, err) == (0, "")
    model = MoEForCausalLM(small_config())
    total = sum(parameter.numel() for parameter in model.parameters())
    unused = sum(p.numel() // 2 for name, p in model.named_parameters() if ".experts." in name)
    files = list((run / "hf").glob("*.safetensors"))
    size = sum(path.stat().st_size for path in files) / 1000
    assert facts(out) == {
        "model": str(run / "hf"),
        "whole": "yes, all names and shapes as the configuration has them",
        "format": "moe_hf",
        "parameters": f"{total:,} in all, {total - unused:,} for one token",
        "layers": "4, of which 2 are sparse",
        "experts": "4 in each sparse layer, 2 for one token",
        "weights": f"{len(files)} files, {size:.0f}kB, bfloat16 ({len(model.state_dict())} tensors)",
        "tokenizer": "yes",
    }


def test_a_model_as_json(run, capsys):
    (run / "hf" / "training_args.bin").touch()
    code, out, err = inspected(capsys, run / "hf", "--json", "--tensors")
    assert (code, err) == (0, "")
    record = json.loads(out)
    state = MoEForCausalLM(small_config()).state_dict()
    tensors = {name: {"dtype": "bfloat16", "shape": list(tensor.shape)} for name, tensor in state.items()}
    assert record.pop("tensors") == tensors
    assert record.pop("size").keys() == SIZE_KEYS
    files = {path.name: path.stat().st_size for path in (run / "hf").glob("*.safetensors")}
    assert record == {
        "kind": "model",
        "path": str(run / "hf"),
        "whole": True,
        "problems": [],
        "format": "moe_hf",
        "model_type": "moe_hf",
        "weight_files": files,
        "bytes": sum(files.values()),
        "tensors_by_dtype": {"bfloat16": len(state)},
        "names_checked": True,
        "tokenizer": True,
        "pickles": ["training_args.bin"],
    }
    assert "tensors" not in json.loads(inspected(capsys, run / "hf", "--json")[1])


def test_the_table_of_tensors(run, capsys):
    _, out, _ = inspected(capsys, run / "hf", "--tensors")
    header, *rows = out.split("\n\n")[1].splitlines()
    assert header.split() == ["tensor", "shape", "dtype"]
    listed = {row.split()[0]: row.split(maxsplit=1)[1].split("  ") for row in rows}
    state = MoEForCausalLM(small_config()).state_dict()
    assert listed.keys() == state.keys() and len(rows) == len(state)
    for name, (shape, *_, dtype) in listed.items():
        assert shape == str(tuple(state[name].shape)) and dtype.strip() == "bfloat16"
    layers = [int(row.split(".")[2]) for row in rows if ".layers." in row]
    assert layers == sorted(layers)


def test_an_incomplete_model_is_told_then_refused(run, capsys):
    lost = sorted((run / "hf").glob("model-*"))[0]
    lost.unlink()
    code, out, err = inspected(capsys, run / "hf")
    sentence = f"{run / 'hf'} has no {lost.name}; weights are read from safetensors only, never from pickles."
    assert code == 2 and err == f"error: {sentence}\n"
    assert facts(out)["whole"] == "no" and facts(out)["problem"] == sentence
    code, out, err = inspected(capsys, run / "hf", "--json")
    assert code == 2 and json.loads(out)["problems"] == [sentence] and not json.loads(out)["whole"]


def test_a_checkpoint_as_a_table(run, capsys):
    code, out, err = inspected(capsys, run / "checkpoint-10")
    assert (code, err) == (0, "")
    found = facts(out)
    assert found["whole"] == "yes, checksums verified" and found["step"] == "10, after 40 samples"
    assert found["written by"] == "2 processes, ZeRO 3, EP 2, bfloat16"
    assert found["export"].startswith("hf, moe_hf, whole, ")
    files = out.split("\n\n")[1].splitlines()
    assert files[1].split() == ["global_step/optim_states.pt", "1,000"]
    assert inspected(capsys, run / "checkpoint-10", "--no-checksums")[1] != out
    assert facts(inspected(capsys, run / "checkpoint-10", "--no_checksums")[1])["whole"].startswith("yes, by the sizes")


def test_a_checkpoint_as_json(run, capsys):
    record = json.loads(inspected(capsys, run / "checkpoint-10", "--json")[1])
    assert record.pop("size").keys() == SIZE_KEYS
    assert record.pop("export")["kind"] == "model"
    progress = {"step": 10, "samples_seen": 40, "global_batch_size": 4, "skipped_steps": 0, "skipped_in_a_row": 0}
    assert record.pop("progress") == progress
    assert record.pop("bytes") == sum(record.pop("files").values()) > 1000
    assert record == {
        "kind": "checkpoint",
        "path": str(run / "checkpoint-10"),
        "whole": True,
        "problems": [],
        "step": 10,
        "topology": {
            "world_size": 2,
            "expert_parallel_size": 2,
            "zero_stage": 3,
            "dtype": "bfloat16",
            "routers": "shared",
            "optimizer": "adamw",
            "tensor_parallel_size": 1,
            "sequence_parallel_size": 1,
            "pipeline_parallel_size": 1,
        },
        "weights_only": False,
        "resumable": True,
        "checksums_verified": True,
    }
    (run / "checkpoint-10" / "manifest.json").unlink()
    record = json.loads(inspected(capsys, run / "checkpoint-10", "--json")[1])
    nulls = {name for name, value in record.items() if value is None}
    assert nulls == {"step", "topology", "progress", "weights_only", "size"} and not record["resumable"]


def test_a_torn_checkpoint_is_told_then_refused(run, capsys):
    shard = run / "checkpoint-10" / "global_step" / "optim_states.pt"
    shard.write_bytes(b"y" * 1000)
    assert inspected(capsys, run / "checkpoint-10", "--no-checksums")[0] == 0
    code, out, err = inspected(capsys, run / "checkpoint-10")
    assert code == 2 and facts(out)["whole"] == "no"
    assert err.startswith(f"error: {run / 'checkpoint-10'} is torn: global_step/optim_states.pt is not what was saved")
    (run / "checkpoint-10" / "hf" / "config.json").write_text("{")
    assert inspected(capsys, run / "checkpoint-10")[2].rstrip().endswith("more, listed above)")


def test_a_run(run, capsys):
    code, out, err = inspected(capsys, run)
    assert (code, err) == (0, "")
    assert facts(out)["resumes from"] == "checkpoint-10" and facts(out)["checkpoints"] == "2"
    table = [row.split()[0] for row in out.split("\n\n")[1].splitlines()]
    assert table == ["checkpoint", "checkpoint-10", "checkpoint-5"]
    (run / "checkpoint-10" / "global_step" / "optim_states.pt").unlink()
    code, out, err = inspected(capsys, run)
    assert code == 2 and "checkpoint-10 is torn: global_step/optim_states.pt is missing" in err
    assert facts(out)["resumes from"] == "checkpoint-5"
    record = json.loads(inspected(capsys, run, "--json")[1])
    assert (record["kind"], record["newest_resumable"], record["leftovers"]) == ("run", "checkpoint-5", [])
    assert [checkpoint["whole"] for checkpoint in record["checkpoints"]] == [False, True]
    assert record["export"]["whole"] and not record["whole"]


def test_the_documented_fields_are_those_there_are(run, capsys):
    """The module's docstring is the contract of `--json`."""
    for path in (run, run / "checkpoint-10", run / "hf"):
        record = json.loads(inspected(capsys, path, "--json", "--tensors")[1])
        for name in record | (record.get("size") or {}):
            assert f"`{name}`" in inspect.__doc__, name


def test_what_is_nothing_is_refused(tmp_path, capsys):
    code, out, err = inspected(capsys, tmp_path)
    assert (code, out) == (2, "") and err.startswith(f"error: {tmp_path} holds no model")
