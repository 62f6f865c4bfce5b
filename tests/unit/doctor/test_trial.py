"""What the self-test runs: the run's own kind of parallelism, precision and JSON, in small numbers."""

import json

import pytest
from launching import ROOT

from moe_hf.doctor.legality import check_run, launched
from moe_hf.doctor.trial import trial_of, write_plan
from moe_hf.training.checked_run import check_command_line


def run_of(tmp_path, num_ranks: int, deepspeed: str = "ds_configs/zero3_ep.json", **others):
    flags = {"config_name": "quickstart", "deepspeed": deepspeed, "output_dir": tmp_path / "out", "do_train": True}
    argv = [str(word) for name, value in (flags | others).items() for word in (f"--{name}", value)]
    run, findings = check_run(argv, num_ranks, 8)
    assert run is not None, findings
    return run


def test_a_trial_of_a_large_run(tmp_path):
    run = run_of(tmp_path, 16, expert_parallel_size=8, gradient_accumulation_steps=32, gradient_checkpointing=True)
    trial = trial_of(run, 4)
    assert trial.describe() == "4 processes, EP 2, ZeRO 3, 4 layers (2 sparse), 8 experts, k 2, float32"
    assert (trial.recipe.micro_batches_per_step, trial.recipe.data_ranks, trial.recipe.rows_per_rank) == (2, 4, 1)
    assert trial.gradient_checkpointing and len(trial.rows()) == trial.recipe.num_rows == 32


@pytest.mark.parametrize(
    ("deepspeed", "flags"),
    [
        ("ds_configs/zero1.json", {}),
        ("ds_configs/zero2_ep.json", {"bf16": True}),
        ("ds_configs/zero3_offload.json", {}),
        ("ds_configs/zero2_ep_cpu_adam.json", {"learning_rate": 1e-4}),
        ("ds_configs/zero2_muon.json", {"max_grad_norm": 0}),
    ],
)
def test_every_command_line_of_a_plan_is_one_that_run_clm_moe_accepts(deepspeed, flags, tmp_path):
    plan = write_plan(trial_of(run_of(tmp_path, 2, deepspeed, **flags), 2), tmp_path)
    cases = json.loads(plan.read_text())["cases"]
    names = ["train", "resume"]
    assert [case["name"] for case in cases] == (["exact", *names] if "bf16" in flags else names)
    with launched(2, 2):
        for case in cases[:-1]:  # the last goes on from a checkpoint that is not there yet
            checked = check_command_line(case["argv"])
            assert checked.topology.dtype == (
                "bfloat16" if flags.get("bf16") and case["name"] == "train" else "float32"
            )
    assert "checkpoint-2" in " ".join(cases[-1]["argv"])


def test_numbers_of_the_runs_size_are_left_out_of_the_json(tmp_path):
    path = tmp_path / "large.json"
    config = json.loads((ROOT / "ds_configs" / "zero2_ep_cpu_adam.json").read_text())
    config |= {"train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 4, "train_batch_size": 64}
    config |= {"gradient_clipping": 0.5, "wall_clock_breakdown": True}
    path.write_text(json.dumps(config))
    flags = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4, "max_grad_norm": 0.5}
    scaled = trial_of(run_of(tmp_path, 2, path, **flags), 2).deepspeed_json
    assert "optimizer" not in scaled and scaled["zero_optimization"]["reduce_bucket_size"] == 1_000_000
    assert scaled["train_batch_size"] == scaled["gradient_clipping"] == "auto"
    # Its kind is what is tried.
    assert scaled["zero_optimization"]["stage"] == 2 and scaled["expert_parallel"]["autoep_size"] == 2
    assert scaled["zero_optimization"]["offload_optimizer"]["device"] == "cpu" and scaled["wall_clock_breakdown"]
