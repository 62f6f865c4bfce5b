"""Other launchers than DeepSpeed's: torchrun and `accelerate launch` start the same run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from launching import ROOT, deepspeed, environment, free_port
from small import flags, recipe

from moe_hf.reporting.metrics_log import METRICS_NAME

STARTERS = {
    "torchrun": ["torch.distributed.run", "--nproc_per_node", "2", "--master_port"],
    # Its --cpu is for one process, or for MPI.
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port"],
}


def words(small_model: Path, rows_file: Path, output_dir: Path) -> list[str]:
    return flags(
        recipe([]),
        2,
        max_steps=2,
        bf16=True,
        model_name_or_path=small_model,
        train_file=rows_file,
        deepspeed=ROOT / "ds_configs" / "zero3_ep.json",
        output_dir=output_dir,
    )


def losses(output_dir: Path) -> list[tuple[float, float]]:
    entries = map(json.loads, (output_dir / METRICS_NAME).read_text().splitlines())
    return [(entry["loss"], entry["grad_norm"]) for entry in entries if "loss" in entry]


@pytest.fixture(scope="module")
def expected(small_model, rows_file, tmp_path_factory) -> list[tuple[float, float]]:
    """Loss and gradient norm of every step under DeepSpeed's own launcher."""
    folder = tmp_path_factory.mktemp("deepspeed")
    done = deepspeed(2, ROOT / "run_clm_moe.py", *words(small_model, rows_file, folder), timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return losses(folder)


@pytest.mark.slow
@pytest.mark.parametrize("starter", list(STARTERS))
def test_launcher_starts_the_same_run(starter, expected, small_model, rows_file, tmp_path):
    command = [sys.executable, "-m", *STARTERS[starter], str(free_port()), "run_clm_moe.py"]
    done = subprocess.run(
        [*command, *words(small_model, rows_file, tmp_path)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = losses(tmp_path)
    assert len(found) == 2 and found == expected
