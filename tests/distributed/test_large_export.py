"""Exporting half a billion parameters offline needs the memory of a shard and a tensor, not of a model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from launching import ROOT, deepspeed, environment
from small import deepspeed_json, flags, recipe

from moe_hf import MoEConfig
from moe_hf.checkpoint.export import expected_tensors

pytestmark = pytest.mark.slow

LARGE = {
    "vocab_size": 50304,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_experts": 16,
    "num_experts_per_tok": 2,
}
SHARD_MB = 200

# Room for the allocator and for what is imported on the way.
ALLOWANCE_MB = 100

EXPORT = f"""
import sys, threading, time
from moe_hf import cli
from moe_hf.commands import export
from moe_hf.checkpoint import offline

def resident_mb():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024

before, peak = resident_mb(), 0.0

def watch():
    global peak
    while True:
        peak = max(peak, resident_mb())
        time.sleep(0.005)

threading.Thread(target=watch, daemon=True).start()
cli.main(["export", "--checkpoint", sys.argv[1], "--output", sys.argv[2], "--max-shard-size", "{SHARD_MB}MB"])
print("MB:", peak - before)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, small_model, rows_file) -> Path:
    """A checkpoint after one step of a real run on two ranks."""
    folder = tmp_path_factory.mktemp("large")
    (folder / "config.json").write_text(json.dumps(LARGE))
    (folder / "deepspeed.json").write_text(json.dumps(deepspeed_json(2, 2)))
    words = flags(
        recipe([]),
        2,
        config_name=folder / "config.json",
        tokenizer_name=small_model,
        train_file=rows_file,
        output_dir=folder / "run",
        deepspeed=folder / "deepspeed.json",
        max_steps=1,
        save_strategy="steps",
        save_steps=1,
        max_shard_size=f"{SHARD_MB}MB",
        bf16=True,
    )
    done = deepspeed(2, ROOT / "run_clm_moe.py", *words, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "run" / "checkpoint-1"


def test_memory_is_bounded_by_a_shard_and_a_tensor(checkpoint, tmp_path):
    expected = expected_tensors(MoEConfig(**LARGE))
    assert sum(tensor.numel() for tensor in expected.values()) > 500e6
    largest_mb = max(tensor.numel() * tensor.element_size() for tensor in expected.values()) / 2**20
    done = subprocess.run(
        [sys.executable, "-c", EXPORT, str(checkpoint), str(tmp_path / "export")],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    used_mb = float(done.stdout.rpartition("MB:")[2])
    # A tensor in float32, with a rank's part of it before it is in its place. Pages mapped from the checkpoint's files
    # do not count: the system takes them back when it needs them.
    bound_mb = SHARD_MB + 1.5 * largest_mb + ALLOWANCE_MB
    assert used_mb < bound_mb < 0.4 * sum(tensor.nbytes for tensor in expected.values()) / 2**20, used_mb
    live = {path.name: path for path in (checkpoint / "hf").iterdir()}
    assert live.keys() == {path.name for path in (tmp_path / "export").iterdir()}
    for name, path in live.items():
        assert path.read_bytes() == (tmp_path / "export" / name).read_bytes(), name
