"""Tokens per second, FLOPs against PyTorch's own counter, and the peaks they are compared with."""

from types import SimpleNamespace

import pytest
import torch
from small import small_config
from torch.utils.flop_counter import FlopCounterMode

from moe_hf import MoEForCausalLM
from moe_hf.planning.flops import flops_per_token
from moe_hf.planning.hardware import peak_tflops_of
from moe_hf.training.telemetry import throughput as throughput_module
from moe_hf.training.telemetry.throughput import Throughput, peak_memory_gib


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """A clock whose time is set by the test."""
    clock = SimpleNamespace(now=100.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr(throughput_module, "time", clock)
    return clock


@pytest.fixture
def cpu(monkeypatch) -> None:
    """Let there be no GPU whose peak is known."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


# --------------------------------------------------------------------------------------------------------------------
# FLOPs


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"num_experts_per_tok": 1, "num_experts": 8, "shared_expert_intermediate_size": 0, "shared_expert_gate": False},
        {"num_experts": 0, "shared_expert_intermediate_size": 0, "shared_expert_gate": False},
        {"attention_gate": "elementwise", "num_key_value_heads": 4, "decoder_sparse_step": 1},
    ],
    ids=["mixed", "tied", "top_1", "dense", "gated"],
)
def test_flops_are_those_that_pytorch_counts(changes):
    batch_size, sequence_length = 3, 20
    torch.manual_seed(0)
    config = small_config(**changes)
    model = MoEForCausalLM._from_config(config, attn_implementation="eager", experts_implementation="eager").train()
    input_ids = torch.randint(config.vocab_size, (batch_size, sequence_length))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=input_ids, use_cache=False).logits.pow(2).mean().backward()
    flops = flops_per_token(config, sequence_length)
    # Eager attention multiplies the upper triangle too, and masks it: twice what a causal kernel needs.
    assert counter.get_total_flops() == batch_size * sequence_length * (flops.matmul + 2 * flops.attention)
    assert flops.total == flops.matmul + flops.attention


def test_experts_that_a_token_does_not_visit_cost_nothing():
    few, many = (small_config(num_experts=number) for number in (4, 64))
    routers = 6 * 2 * 60 * many.hidden_size  # two sparse layers, 60 rows more each
    assert flops_per_token(many, 32).matmul - flops_per_token(few, 32).matmul == routers


def test_attention_grows_with_the_row():
    short, long = (flops_per_token(small_config(), length) for length in (16, 4096))
    assert (long.attention, long.matmul) == (256 * short.attention, short.matmul)
    # 4 layers, 16 tokens, 4 heads of 8.
    assert short.attention == 6 * 4 * 16 * 4 * 8


# --------------------------------------------------------------------------------------------------------------------
# Peaks


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165),
        ("AMD Instinct MI300X", 1307),
        ("NVIDIA B200", 2250),
        # Others of a similar name, with another peak.
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H20", None),
        ("NVIDIA GB200", None),
        ("NVIDIA A10", None),
        ("Tesla T4", None),
    ],
)
def test_peak_by_the_name_of_the_gpu(name, tflops):
    assert peak_tflops_of(name) == tflops


def test_peak_of_the_gpu_is_found_and_the_flag_goes_first(monkeypatch, clock):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert "989 TFLOP/s" in Throughput(small_config()).describe(32)
    assert "42 TFLOP/s" in Throughput(small_config(), peak_tflops=42.0).describe(32)


# --------------------------------------------------------------------------------------------------------------------
# Between two log entries


def test_tokens_per_second_begin_anew_with_every_entry(clock, cpu):
    throughput = Throughput(small_config())
    for seconds in (2.0, 4.0):
        throughput.add_step(torch.tensor(10), 32)
        throughput.add_step(10, 32)
        clock.now += seconds
        assert throughput.pop() == {"tokens_per_second": 20 / seconds}
    assert throughput.pop() == {}


def test_time_of_evaluating_and_saving_is_left_out(clock, cpu):
    throughput = Throughput(small_config())
    throughput.add_step(1000, 32)
    clock.now += 50.0
    throughput.restart_clock()
    throughput.add_step(20, 32)
    clock.now += 2.0
    assert throughput.pop() == {"tokens_per_second": 10.0}
    throughput.add_step(20, 32)
    throughput.restart_clock()
    assert throughput.pop() == {}


def test_mfu_is_the_share_of_the_peak_of_all_devices(clock, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    config = small_config()
    throughput = Throughput(config, peak_tflops=0.5)
    # Rows of unequal length: each step counts with its own.
    throughput.add_step(torch.tensor(100_000), 16)
    throughput.add_step(torch.tensor(300_000), 64)
    clock.now += 8.0
    flops = 100_000 * flops_per_token(config, 16).total + 300_000 * flops_per_token(config, 64).total
    assert throughput.pop()["mfu"] == pytest.approx(flops / 8.0 / (4 * 0.5e12), rel=1e-12)


def test_counts_of_the_largest_runs_do_not_overflow(clock):
    throughput = Throughput(small_config(), peak_tflops=1e9)
    num_tokens = 16_000_000
    for _ in range(1000):
        throughput.add_step(torch.tensor(num_tokens), 131_072)
    clock.now += 1.0
    flops = 1000 * num_tokens * flops_per_token(small_config(), 131_072).total
    assert throughput.pop()["mfu"] == pytest.approx(flops / 1e21, rel=1e-12)


def test_formula_has_the_numbers_of_the_run(cpu, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = small_config()
    flops = flops_per_token(config, 32)
    start = f"FLOPs per token = 6 * {flops.matmul // 6:,} active matrix parameters + 6 * 4 layers * 32 tokens * 4 heads"
    for peak, end in ((12.5, f"{flops.total:,} / (2 devices * 12.5 TFLOP/s)."), (None, "(--peak_tflops gives it).")):
        text = Throughput(config, peak).describe(32)
        assert text.startswith(start) and text.endswith(end)
        assert f"* 8 = {flops.total:,};" in text


def test_peak_memory_sees_what_was_allocated_and_given_back():
    before = peak_memory_gib()
    size = int((before + 0.25) * 2**30)
    filled = bytearray(size)
    filled[:: 2**12] = b"\1" * len(range(0, size, 2**12))
    del filled
    assert before + 0.2 < peak_memory_gib() < 2 * before + 1.0
