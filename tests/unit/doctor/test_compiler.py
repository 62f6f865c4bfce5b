"""A compiler that is missing or broken is told before DeepSpeed needs it."""

import pytest
from torch.utils import cpp_extension

from moe_hf.doctor import compiler
from moe_hf.doctor.compiler import check_compiler
from moe_hf.doctor.findings import ADVICE, OK, WRONG, Finding
from moe_hf.parallel import op_compiler


def by_name(deepspeed_json=None) -> dict:
    return {finding.name: finding for finding in check_compiler(deepspeed_json)}


@pytest.fixture
def no_compilation(monkeypatch):
    """For what is asked besides."""
    monkeypatch.setattr(compiler, "_compile", lambda status: Finding("compiler", "C++", OK, "not tried"))


@pytest.fixture
def on_cuda(monkeypatch):
    for module in (compiler, op_compiler):
        monkeypatch.setattr(module, "accelerator_name", lambda: "cuda")


def test_this_machine_compiles():
    found = by_name()
    assert {finding.status for finding in found.values()} == {OK}
    assert found["C++"].found and found["ShareMemComm"].found == "can be compiled"


def test_no_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    finding = by_name()["C++"]
    assert finding.status == WRONG and "no-such-compiler" in finding.found and "CXX=" in finding.remedy


def test_a_compiler_that_fails(monkeypatch, tmp_path):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'fatal error: Python.h: No such file' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    finding = by_name()["C++"]
    assert finding.status == WRONG and "Python.h" in finding.found and "python3-dev" in finding.remedy


def test_no_ninja(monkeypatch, no_compilation):
    monkeypatch.setattr(cpp_extension, "is_ninja_available", lambda: False)
    assert by_name()["ninja"].status == WRONG


def test_a_run_that_compiles_nothing_needs_no_compiler(monkeypatch, on_cuda, no_compilation):
    monkeypatch.setattr(cpp_extension, "is_ninja_available", lambda: False)
    monkeypatch.setattr(compiler, "cuda_toolkit_problem", lambda: "CUDA_HOME does not exist")
    found = by_name()
    assert found["ninja"].status == found["CUDA toolkit"].status == ADVICE and "ShareMemComm" not in found


@pytest.mark.parametrize(
    ("section", "op"),
    [
        ({"offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}, "AsyncIO"),
        ({"offload_param": {"device": "nvme", "nvme_path": "/x"}}, "AsyncIO"),
        ({"offload_optimizer": {"device": "cpu"}}, "CPUAdam"),
    ],
)
def test_what_the_json_makes_deepspeed_compile(section, op, monkeypatch, no_compilation):
    monkeypatch.setattr(compiler, "cannot_compile", lambda name: f"no libaio for {name}" if op in name else None)
    finding = by_name({"zero_optimization": {"stage": 3, **section}})[op]
    assert finding.status == WRONG and finding.found == f"no libaio for {op}Builder"


def test_torchs_own_adam_is_not_compiled():
    config = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}, "zero_force_ds_cpu_optimizer": False}
    assert "CPUAdamBuilder" not in op_compiler.needed_ops(config)
    assert "CPUAdamBuilder" in op_compiler.needed_ops(config | {"optimizer": {"type": "AdamW"}})


def test_an_operator_that_deepspeed_does_not_have():
    assert op_compiler.cannot_compile("ShareMemCommBuilder") is None
    assert "no NoSuchBuilder" in op_compiler.cannot_compile("NoSuchBuilder")
