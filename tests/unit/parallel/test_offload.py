"""Which offloading is let in, what of disk and model is looked at before it starts, and whose files are whose."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_hf import MoEConfig, MoEForCausalLM
from moe_hf.errors import ConfigError
from moe_hf.parallel import nvme_checks, swap_files, swap_folder
from moe_hf.parallel.deepspeed_schema import check_deepspeed_keys, check_deepspeed_values
from moe_hf.parallel.nvme_checks import check_nvme, locked_bytes, weights_of
from moe_hf.parallel.offload import check_offload, nvme_sections, with_nvme_path

NVME = {"device": "nvme", "nvme_path": "/disk"}
FOLDER = Path(__file__).resolve().parents[3] / "ds_configs"


def zero(stage: int, **sections) -> dict:
    return {"zero_optimization": {"stage": stage, **sections}}


def on_disk(path, stage: int = 3, **weights) -> dict:
    section = {"device": "nvme", "nvme_path": str(path)}
    return zero(
        stage,
        offload_optimizer=dict(section),
        offload_param=section | {"buffer_size": 4000, "max_in_cpu": 0} | weights,
        stage3_max_reuse_distance=0,
    )


@pytest.mark.parametrize(
    "config",
    [
        zero(0),
        zero(0, offload_optimizer={"device": "none"}),
        *(zero(stage, offload_optimizer={"device": "cpu"}) for stage in (1, 2, 3)),
        zero(3, offload_optimizer={"device": "cpu"}, offload_param={"device": "cpu"}),
        zero(3, offload_param={"device": "cpu"}),
        zero(3, offload_optimizer=NVME),
        zero(3, offload_optimizer=NVME | {"pipeline_read": True, "buffer_count": 8}),
        zero(3, offload_optimizer=NVME, offload_param=NVME, stage3_max_reuse_distance=0),
        zero(3, offload_optimizer=NVME, offload_param=NVME, max_reuse_distance="0"),
    ],
)
def test_what_works_is_let_in(config):
    check_offload(config)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (
            zero(0, offload_optimizer={"device": "cpu"}),
            'offload_optimizer.device="cpu" has no effect at ZeRO stage 0; use stage 1, 2 or 3 or delete',
        ),
        (zero(2, offload_param={"device": "nvme"}), 'offload_param.device="nvme" has no effect at ZeRO stage 2; use'),
        *(
            (
                zero(stage, offload_optimizer=NVME),
                f'offload_optimizer.device="nvme" would rest in host memory at ZeRO stage {stage}; use stage 3, or',
            )
            for stage in (1, 2)
        ),
        (zero(3, offload_optimizer={"device": "nvme"}), "offload_optimizer.nvme_path is missing; give .* --nvme_path"),
        (
            zero(3, offload_optimizer=NVME, offload_param={"device": "nvme"}),
            "zero_optimization.offload_param.nvme_path is missing",
        ),
        *(
            (
                zero(3, offload_param=NVME, **optimizer),
                'offload_param.device="nvme" without offload_optimizer.device="nvme" cannot be resumed; write',
            )
            for optimizer in ({}, {"offload_optimizer": {"device": "cpu"}})
        ),
        (
            zero(3, offload_optimizer=NVME, offload_param=NVME),
            'add "stage3_max_reuse_distance": 0 to zero_optimization',
        ),
        (zero(3, offload_optimizer=NVME | {"buffer_count": 3}), "buffer_count=3 is too few .* of a group; write 4"),
        (zero(3, offload_optimizer=NVME | {"pipeline_read": True}), "buffer_count=4 is too few .* 2 groups; write 8"),
        (
            zero(3, offload_optimizer=NVME | {"pipeline_read": True, "pipeline_write": True, "buffer_count": 11}),
            "buffer_count=11 is too few .* of 3 groups; write 12",
        ),
        (
            zero(3, offload_optimizer={"device": "cpu", "ratio": 0.5}),
            "ratio=0.5 keeps the rest in an optimizer that no",
        ),
        (zero(3, offload_optimizer={"device": "cpu", "super_offload": True}), "super_offload=true is for CPU and GPU"),
        (
            zero(2, offload_optimizer={"device": "cpu"}, zenflow={"topk_ratio": 0.1}),
            "zenflow updates most weights later",
        ),
        (zero(3) | {"aio": {"use_gds": True}}, "aio.use_gds=true moves data between NVMe and GPU"),
    ],
)
def test_what_does_not_is_refused(config, sentence):
    with pytest.raises(ConfigError, match=sentence):
        check_offload(config)


def test_the_path_may_come_from_the_command_line():
    config = json.loads((FOLDER / "zero3_ep_nvme.json").read_text())
    assert set(nvme_sections(config)) == {"offload_optimizer", "offload_param"}
    changed = with_nvme_path(config, "/mnt/nvme0")
    assert [section["nvme_path"] for section in nvme_sections(changed).values()] == ["/mnt/nvme0"] * 2
    assert "nvme_path" not in json.dumps(config), "a copy"
    check_deepspeed_keys(changed)
    check_deepspeed_values(changed)
    check_offload(changed)
    with pytest.raises(ConfigError, match=r"nvme_path /mnt has no effect, .* use ds_configs/zero3_nvme"):
        with_nvme_path(zero(3, offload_optimizer={"device": "cpu"}), "/mnt")
    assert with_nvme_path(zero(3), None) == zero(3)


# --------------------------------------------------------------------------------------------------------------------
# The machine and the model


@pytest.fixture(scope="module")
def config() -> MoEConfig:
    return MoEConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        decoder_sparse_step=2,
        num_experts=4,
        num_experts_per_tok=2,
        shared_expert_intermediate_size=32,
    )


@pytest.fixture
def operator(monkeypatch):
    """Whether or not this machine has libaio."""
    monkeypatch.setattr(nvme_checks, "_check_operator", lambda: None)


def test_weights_are_counted_as_they_are_fetched(config):
    model = MoEForCausalLM(config)
    for expert_parallel in (False, True):
        weights = weights_of(config, expert_parallel=expert_parallel)
        assert weights.total == model.num_parameters()
        assert weights.largest == 4 * 2 * 48 * 64
        gate_up = [4 * 48 * 64] * 2 if expert_parallel else [4 * 2 * 48 * 64]
        block = [4 * 64, *gate_up, 4 * 64 * 48, *[32 * 64] * 3]
        assert any(sorted(group) == sorted(block) for group in weights.groups), weights.groups


def test_buffers_have_to_hold_what_is_fetched_together(config, operator, tmp_path, monkeypatch):
    monkeypatch.setattr(nvme_checks, "_SMALLEST_BYTES", 4 * 2000)  # of which two ranks make 4000 elements
    check = {"model_config": config, "world_size": 2, "in_16_bits": False}
    fits = {"buffer_size": 4 * 48 * 64, "buffer_count": 2}
    check_nvme(on_disk(tmp_path, **fits), **check)
    with pytest.raises(ConfigError, match=r"offload_param.buffer_size=12287 holds less .* 12288 elements; write 12288"):
        check_nvme(on_disk(tmp_path, **fits | {"buffer_size": 12287}), **check)
    with pytest.raises(ConfigError, match=r"offload_param.buffer_count=1 is less .* write 2 or more, best 4"):
        check_nvme(on_disk(tmp_path, **fits | {"buffer_count": 1}), **check)
    # AutoEP fetches gate and up one by one, but only after they were one.
    experts = {"expert_parallel": {"enabled": True, "autoep_size": 2}}
    with pytest.raises(ConfigError, match=r"buffer_size=12287 holds less .* 12288 elements"):
        check_nvme(on_disk(tmp_path, **fits | {"buffer_size": 12287}) | experts, **check)
    parallel = on_disk(tmp_path, **fits) | experts
    with pytest.raises(ConfigError, match=r"buffer_count=2 is less .* write 3 or more, best 6"):
        check_nvme(parallel, **check)


def test_locked_memory_is_that_of_the_buffers(config):
    weights = weights_of(config, expert_parallel=False)
    half = -(-weights.total // 2)
    assert locked_bytes(zero(3, offload_optimizer=NVME), weights, 2, 2) == 4 * half * 4
    cut = zero(3, offload_optimizer=NVME | {"buffer_count": 5}, sub_group_size=1000)
    assert locked_bytes(cut, weights, 2, 2) == 5 * (1000 + weights.largest // 2) * 4
    weights_too = zero(3, offload_param=NVME | {"buffer_count": 3, "buffer_size": 70})
    assert locked_bytes(weights_too, weights, 2, 2) == (3 * 70 + half) * 2


def test_the_system_has_to_let_buffers_be_locked(config, operator, tmp_path, monkeypatch):
    sections = zero(3, offload_optimizer={"device": "nvme", "nvme_path": str(tmp_path)})
    check = {"model_config": config, "world_size": 1, "in_16_bits": True}
    monkeypatch.setattr(nvme_checks.resource, "getrlimit", lambda _: (10_000, 10_000))
    monkeypatch.setattr(nvme_checks, "_may_lock_all", lambda: True)
    check_nvme(sections, **check)
    monkeypatch.setattr(nvme_checks, "_may_lock_all", lambda: False)
    with pytest.raises(ConfigError, match=r"locks 2 MB of memory in each process, but the system allows 0 MB: raise"):
        check_nvme(sections, **check)


def test_the_disk_needs_room(config, operator, tmp_path, monkeypatch):
    total = weights_of(config, expert_parallel=False).total
    usage = type("Usage", (), {"free": 18 * total // 2})
    monkeypatch.setattr(nvme_checks.shutil, "disk_usage", lambda _: usage)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    fits = on_disk(tmp_path, buffer_size=10**6)
    check_nvme(fits, config, world_size=4, in_16_bits=True)  # 16 + 2 bytes a parameter, of which half are here
    usage.free -= 1
    with pytest.raises(ConfigError, match=r"has 1 MB free, but this machine's share .* \(18 bytes a parameter\)"):
        check_nvme(fits, config, world_size=4, in_16_bits=True)


def test_the_path_is_a_folder_that_can_be_written(config, operator, tmp_path, monkeypatch):
    check = {"model_config": config, "world_size": 1, "in_16_bits": True}
    (tmp_path / "file").touch()
    for name in ("missing", "file"):
        with pytest.raises(ConfigError, match=f"--nvme_path .*{name} is not a folder; make it, on a local disk"):
            check_nvme(on_disk(tmp_path / name), **check)
    with pytest.raises(ConfigError, match="--nvme_path /proc cannot be written: "):
        check_nvme(on_disk("/proc"), **check)

    def without_direct_io(path, flags, *others):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(nvme_checks.os, "open", without_direct_io)
    monkeypatch.setattr(nvme_checks.tempfile, "mkstemp", lambda dir: (os.dup(0), str(tmp_path / "file")))
    with pytest.raises(ConfigError, match="is on a file system without direct I/O; give a folder on a local disk"):
        check_nvme(on_disk(tmp_path), **check)


def test_without_libaio_the_sentence_names_the_package(monkeypatch):
    from deepspeed.ops.op_builder import AsyncIOBuilder

    monkeypatch.setattr(AsyncIOBuilder, "has_function", lambda *_: False)
    with pytest.raises(ConfigError, match=r"its headers are missing; install them .apt-get install libaio-dev"):
        nvme_checks._check_operator()


def test_nothing_is_looked_at_without_nvme(config):
    check_nvme(zero(3, offload_param={"device": "cpu"}), config, world_size=2, in_16_bits=True)


# --------------------------------------------------------------------------------------------------------------------
# Files


def test_each_process_has_a_folder_of_its_own(tmp_path):
    first = swap_folder.with_own_folder(on_disk(tmp_path))
    second = swap_folder.with_own_folder(on_disk(tmp_path))
    paths = [{section["nvme_path"] for section in nvme_sections(config).values()} for config in (first, second)]
    assert len(paths[0]) == len(paths[1]) == 1 and paths[0] != paths[1], "weights and optimizer share one"
    assert all(Path(path).parent == tmp_path and Path(path).is_dir() for path in paths[0] | paths[1])
    swap_folder.remove_own_folders()
    swap_folder.remove_own_folders()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_has_left_goes_and_what_is_held_stays(tmp_path):
    program = (
        "import json, os, signal, sys; from moe_hf.parallel import swap_folder\n"
        "config = swap_folder.with_own_folder(json.loads(sys.argv[1]))\n"
        "print(config['zero_optimization']['offload_param']['nvme_path'], flush=True)\n"
        "input()\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    command = [sys.executable, "-c", program, json.dumps(on_disk(tmp_path))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        folder = Path(process.stdout.readline().strip())
        (folder / "weights.swp").write_bytes(b"0" * 100)
        (tmp_path / "not_ours").mkdir()
        swap_folder.remove_folders_of_killed_runs(tmp_path)
        assert (folder / "weights.swp").exists()
        process.communicate("\n")
    assert folder.exists() and process.returncode == -9
    swap_folder.remove_folders_of_killed_runs(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["not_ours"]


def test_swap_files_hold_what_was_written_and_are_read_without_memory(tmp_path):
    values = torch.randn(1000)
    swap_files.write_swap_file(tmp_path / "swp", values, length=1024)
    assert (tmp_path / "swp").stat().st_size == 4096
    mapped = swap_files.read_mapped(tmp_path / "swp", 1000, torch.float32)
    assert torch.equal(mapped, values)
    assert mapped.untyped_storage().nbytes() == 4000


class WritesInPart:
    """A handle as DeepSpeed's, of a disk with so much room, which says nothing when it is full."""

    def __init__(self, room: int) -> None:
        self.room, self.pending = room, 0

    def async_pwrite(self, buffer, path: str, offset: int) -> int:
        Path(path).write_bytes(bytes(min(buffer.nbytes, self.room)))
        self.pending += 1
        return 0

    def wait(self) -> int:
        count, self.pending = self.pending, 0
        return count

    def is_pinned(self, buffer) -> bool:
        return True


def test_a_full_disk_is_noticed(tmp_path):
    handle = swap_files.CheckedHandle(WritesInPart(room=4096))
    assert handle.is_pinned(None)
    for name in ("a", "b"):
        assert handle.async_pwrite(torch.zeros(1024), str(tmp_path / name), 0) == 0
    assert handle.wait() == 2
    handle.async_pwrite(torch.zeros(2048), str(tmp_path / "c"), 0)
    with pytest.raises(ConfigError, match=r"/c could not be written to its end, and .* on the disk of --nvme_path"):
        handle.wait()


def test_a_hole_is_a_full_disk_only_where_there_is_no_room(tmp_path, monkeypatch):
    with open(tmp_path / "holes", "wb") as file:
        file.truncate(1 << 20)
    swap_files.check_file(tmp_path / "holes", 1 << 20)
    monkeypatch.setattr(swap_files.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(ConfigError, match="holes could not be written to its end, and 0 MB are free"):
        swap_files.check_file(tmp_path / "holes", 1 << 20)
