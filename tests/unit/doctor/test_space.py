"""Room for what a run writes."""

from collections import namedtuple

import pytest
from small import small_config

from moe_hf import MoEForCausalLM
from moe_hf.doctor import space
from moe_hf.doctor.findings import ADVICE, OK, WRONG
from moe_hf.doctor.space import check_cache, check_output, check_shared_memory, checkpoint_bytes, num_parameters

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def free(monkeypatch):
    """Function that sets the free bytes of every disk."""
    return lambda count: monkeypatch.setattr(space.shutil, "disk_usage", lambda path: Usage(0, 0, count))


def test_parameters_are_counted_as_the_model_has_them():
    config = small_config(tie_word_embeddings=True)
    assert num_parameters(config) == sum(parameter.numel() for parameter in MoEForCausalLM(config).parameters())


@pytest.mark.parametrize(
    ("in_16_bits", "stage", "per_parameter"), [(True, 3, 14), (True, 2, 16), (False, 3, 16), (False, 1, 20)]
)
def test_bytes_of_a_checkpoint(in_16_bits, stage, per_parameter):
    assert checkpoint_bytes(1000, in_16_bits=in_16_bits, zero_stage=stage) == per_parameter * 1000


@pytest.mark.parametrize(("kept", "per_parameter"), [(0, 2), (1, 16), (3, 44)])
def test_the_disk_of_the_output(kept, per_parameter, free, tmp_path):
    config = small_config()
    needed = per_parameter * num_parameters(config)
    settings = {"in_16_bits": True, "stage": 3, "kept": kept}
    free(needed)
    assert check_output(tmp_path / "not" / "yet", config, **settings).status == OK
    free(needed - 1)
    finding = check_output(tmp_path, config, **settings)
    assert finding.status == WRONG and str(tmp_path) in finding.found and "--save_total_limit" in finding.remedy


def test_a_folder_that_cannot_be_written(monkeypatch, tmp_path):
    monkeypatch.setattr(space.os, "access", lambda path, mode: False)
    assert check_output(tmp_path, small_config(), in_16_bits=True, stage=3, kept=0).status == WRONG
    assert check_cache().status == WRONG


def test_the_cache(free, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    assert check_cache().status == OK
    free(1000)
    assert check_cache().status == WRONG and "HF_HOME" in check_cache().remedy


def test_shared_memory(free):
    free(4 * 69_000_000)
    assert check_shared_memory(4, on_cpu=True).status == OK
    finding = check_shared_memory(5, on_cpu=True)
    assert finding.status == WRONG and "--shm-size" in finding.remedy
    free(64 * 2**20)  # Docker's default
    assert check_shared_memory(8, on_cpu=False).status == ADVICE
