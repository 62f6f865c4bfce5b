"""Exports are models that Transformers can spread over devices by itself."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from launching import ROOT, environment, free_port

from moe_hf import MoEForCausalLM

WORKER = Path(__file__).with_name("inference_worker.py")


@pytest.mark.skipif(
    find_spec("transformers.distributed.expert_parallel") is None, reason="this Transformers dispatches no tokens"
)
def test_tensor_and_expert_parallel_inference_give_the_same_logits(small_model, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    done = subprocess.run(
        [str(word) for word in [*command, WORKER, small_model, tmp_path / "logits.pt"]],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    with torch.no_grad():
        expected = MoEForCausalLM.from_pretrained(small_model).eval()(torch.arange(3, 27).reshape(2, 12)).logits
    for name, logits in torch.load(tmp_path / "logits.pt").items():
        torch.testing.assert_close(
            logits, expected, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
