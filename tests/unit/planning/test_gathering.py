"""What ZeRO 3 fetches and gathers: predicted from sizes alone, and read off from real engines."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from launching import ROOT, environment, free_port
from small import small_config

from moe_hf.parallel.zero_settings import zero_settings
from moe_hf.planning.gathering import gathering
from moe_hf.planning.module_order import modules_in_order
from moe_hf.planning.parameters import local_parameters
from moe_hf.planning.setting import Setting

WORKER = Path(__file__).parent / "gathering_worker.py"
FAR = {"stage3_param_persistence_threshold": 40}
NEAR = FAR | {"stage3_max_reuse_distance": 9_000, "stage3_prefetch_bucket_size": 3_000}
NEVER = FAR | {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
NO_SHARED = {"shared_expert_intermediate_size": 0, "shared_expert_gate": False}
CASES = [
    {"ep": 0, "checkpointing": True, "zero": NEAR, "config": {}},
    {"ep": 0, "checkpointing": False, "zero": NEVER, "config": NO_SHARED},
    {"ep": 1, "checkpointing": True, "zero": NEAR, "config": {"attention_gate": "elementwise"}},
    {"ep": 1, "checkpointing": True, "zero": NEVER, "config": {"shared_expert_gate": False}},
    {"ep": 1, "checkpointing": True, "zero": NEVER, "config": NO_SHARED | {"tie_word_embeddings": True}},
    {"ep": 1, "checkpointing": False, "zero": NEAR, "config": NO_SHARED | {"use_qk_norm": False}},
]


def setting_of(case: dict) -> Setting:
    config = {"zero_optimization": {"stage": 3} | case["zero"]}
    return Setting(1, zero_settings(config, 32), case["ep"], checkpointing=case["checkpointing"])


@pytest.mark.slow
def test_order_and_times_are_those_of_real_engines():
    values = [small_config(**case["config"]).to_dict() for case in CASES]
    fields = small_config().__dataclass_fields__
    kept = [{k: v for k, v in each.items() if k in fields and k != "mlp_layer_types"} for each in values]
    cases = [case | {"config": config} for case, config in zip(CASES, kept, strict=True)]
    done = subprocess.run(
        [sys.executable, WORKER, str(free_port()), json.dumps(cases)],
        env={**environment(), "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("found ")]
    for case, line in zip(CASES, lines, strict=True):
        found, config = json.loads(line.removeprefix("found ")), small_config(**case["config"])
        parameters = local_parameters(config, setting_of(case))
        uses = [sorted(p.name for p in use) for use in modules_in_order(parameters, config, setting_of(case))]
        assert uses == found["uses"], case
        assert gathering(parameters, config, setting_of(case)).times == found["times"], case


def times(zero: dict, **others) -> tuple[dict[str, int], int]:
    case = {"ep": 1, "checkpointing": True, "zero": zero, "config": {}} | others
    config = small_config(**case["config"])
    found = gathering(local_parameters(config, setting_of(case)), config, setting_of(case))
    return found.times, found.live


def test_what_is_kept_is_gathered_once_and_takes_more_room():
    # With prefetching and without: each has a rule of its own by which weights stay.
    once, all_of_it = times(FAR | {"stage3_max_live_parameters": 10**9})
    assert set(once.values()) == {1}
    assert times(FAR | {"stage3_prefetch_bucket_size": 0})[0] == once
    again, few = times(NEVER)
    # Forward, forward again and backward.
    assert set(again.values()) == {2, 3} and few < 0.3 * all_of_it
    some, between = times(NEAR)
    assert set(some.values()) == {1, 2} and few < between <= all_of_it


def test_small_weights_are_never_gathered_in_between():
    names = set(times(FAR)[0])
    assert not [name for name in names if name.endswith("layernorm.weight")]
    assert "model.layers.0.input_layernorm.weight" in times(FAR | {"stage3_param_persistence_threshold": 0})[0]
