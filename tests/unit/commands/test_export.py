"""`moe-hf export` writes a checkpoint as a model, or says in one sentence why not and exits with 2."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from deepspeed_files import STEP, Run, draw_states, live_model, write_checkpoint
from safetensors.torch import load_file
from small import save_tokenizer, small_config

from moe_hf import cli
from moe_hf.checkpoint.export import export_model
from moe_hf.commands import export

CONFIG = small_config(
    decoder_sparse_step=1, use_qk_norm=False, shared_expert_intermediate_size=0, shared_expert_gate=False
)


@pytest.fixture(autouse=True)
def command(monkeypatch):
    if export not in cli.COMMANDS:
        monkeypatch.setattr(cli, "COMMANDS", (*cli.COMMANDS, export))


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    model = live_model(CONFIG)
    run = Run(4, 3, 2, bf16=True)
    return write_checkpoint(tmp_path / f"checkpoint-{STEP}", run, model, draw_states(model), export=True)


def exported(capsys, *words: str | Path) -> tuple[int, str, str]:
    """Run the command and return its exit code, what it printed, and its last line on standard error."""
    code = 0
    try:
        cli.main(["export", *map(str, words)])
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    return code, out, err.replace("\r", "\n").rstrip("\n").rpartition("\n")[2]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def live_export(folder: Path, dtype: torch.dtype, **options) -> dict[str, bytes]:
    export_model(live_model(CONFIG).to(dtype), folder, model_card="# A card\n", **options)
    save_tokenizer(folder)
    return contents(folder)


def test_a_checkpoint(tmp_path, checkpoint, capsys):
    code, out, err = exported(capsys, "--checkpoint", checkpoint, "--output", tmp_path / "out")
    assert (code, out) == (0, f"{checkpoint} → {tmp_path / 'out'} (moe_hf, bfloat16)\n")
    assert "exporting" in err
    assert contents(tmp_path / "out") == live_export(tmp_path / "live", torch.bfloat16)


def test_its_options(tmp_path, checkpoint, capsys):
    words = ["--checkpoint", checkpoint, "--output", tmp_path / "out", "--dtype", "float32", "--max-shard-size", "30KB"]
    code, out, _ = exported(capsys, *words)
    assert (code, out) == (0, f"{checkpoint} → {tmp_path / 'out'} (moe_hf, float32)\n")
    found = contents(tmp_path / "out")
    assert found == live_export(tmp_path / "live", torch.float32, max_shard_size="30KB")
    assert "model.safetensors.index.json" in found


def test_another_architecture(tmp_path, checkpoint, capsys):
    code, out, _ = exported(capsys, "--checkpoint", checkpoint, "--output", tmp_path / "out", "--to", "mixtral")
    assert (code, out) == (0, f"{checkpoint} → {tmp_path / 'out'} (mixtral, bfloat16)\n")
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert any("block_sparse_moe" in name for name in names) and not list((tmp_path / "out").glob("*.py"))


def test_a_model(tmp_path, checkpoint, capsys):
    before = contents(checkpoint / "hf")
    words = ["--checkpoint", checkpoint / "hf", "--output", tmp_path / "out"]
    assert exported(capsys, *words)[:2] == (0, f"{checkpoint / 'hf'} → {tmp_path / 'out'} (moe_hf, bfloat16)\n")
    assert contents(tmp_path / "out") == before


def test_paths_as_a_shell_completes_them(tmp_path, checkpoint, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert exported(capsys, "--checkpoint", f"{checkpoint.name}/", "--output", "out/")[0] == 0
    monkeypatch.chdir(checkpoint)
    assert exported(capsys, "--checkpoint", ".", "--output", "../other")[0] == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "other") != {}


def test_what_cannot_be_done_is_one_sentence(tmp_path, checkpoint, capsys):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine").write_text("keep")
    out = tmp_path / "out"
    mistakes = {
        ("--output", tmp_path / "there"): f"--output {tmp_path / 'there'} is already there; give a new folder.",
        ("--output", out, "--max-shard-size", "x"): "--max-shard-size x is not a size such as 500MB or 5GB.",
    }
    for words, sentence in mistakes.items():
        code, printed, err = exported(capsys, "--checkpoint", checkpoint, *words)
        assert (code, printed) == (2, "") and err.startswith(f"error: {sentence}")
    code, printed, err = exported(capsys, "--checkpoint", tmp_path / "absent", "--output", out)
    assert (code, printed) == (2, "") and err.startswith(f"error: There is no folder {tmp_path / 'absent'};")
    shard = next((checkpoint / f"global_step{STEP}").glob("*rank_2*optim_states.pt"))
    shard.write_bytes(shard.read_bytes()[:-7])
    code, printed, err = exported(capsys, "--checkpoint", checkpoint, "--output", out)
    assert (code, printed) == (2, "")
    assert err.startswith(f"error: {checkpoint} is torn: global_step{STEP}/{shard.name} has ")
    assert not list(tmp_path.glob("*out*")) and contents(tmp_path / "there") == {"mine": b"keep"}


@pytest.mark.parametrize("words", [["--checkpoint", "x"], ["--output", "y"]])
def test_both_folders_are_required(capsys, words):
    assert exported(capsys, *words)[0] == 2


def test_one_process_without_deepspeed_is_enough(tmp_path, checkpoint):
    program = (
        "import sys\n"
        "from moe_hf import cli\n"
        "from moe_hf.commands import export\n"
        "cli.COMMANDS = (export,)\n"
        "cli.main(['export', *sys.argv[1:]])\n"
        "import torch.distributed as dist\n"
        "assert not dist.is_initialized()\n"
        "assert 'deepspeed' not in sys.modules\n"
    )
    words = ["--checkpoint", str(checkpoint), "--output", str(tmp_path / "out")]
    ended = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert (tmp_path / "out" / "config.json").is_file()
