"""The scripts that are no recipes, from their first line to what they print at the end."""

import re

import pytest
from launching import run_script

from moe_hf import MoEForCausalLM


@pytest.mark.slow
def test_quickstart_trains_exports_and_generates(tmp_path):
    done = run_script("quickstart.sh", STEPS="12", OUTPUT=str(tmp_path))
    assert done.returncode == 0, f"{done.stdout[-2000:]}{done.stderr[-5000:]}"
    assert re.search(r"export = trainer +yes", done.stdout), done.stdout[-3000:]
    assert re.search(r"parameters +4,625,344", done.stdout)
    assert "A sample, after" in done.stdout and "moe-hf generate" in done.stdout
    assert MoEForCausalLM.from_pretrained(tmp_path / "hf").num_parameters() == 4_625_344


@pytest.mark.slow
def test_comparison_of_routing_ends_with_a_table_and_a_page(tmp_path):
    done = run_script("compare_routing.sh", "loss_free", "sinkhorn", STEPS="3", OUTPUT=str(tmp_path))
    assert done.returncode == 0, f"{done.stdout[-2000:]}{done.stderr[-5000:]}"
    for method in ("loss_free", "sinkhorn"):
        assert re.search(rf"\| {method} +\|", done.stdout), done.stdout[-3000:]
    assert (tmp_path / "report" / "report.html").is_file()


def test_an_unknown_method_is_told_before_anything_starts():
    done = run_script("compare_routing.sh", "sinkhole", timeout=60)
    assert done.returncode == 2 and "there is no method 'sinkhole'; choose among: " in done.stderr
