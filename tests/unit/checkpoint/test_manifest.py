"""Every damage to a checkpoint is found and named: a file removed, cut or with one bit flipped, the manifest too."""

import errno
import hashlib
import json
import os
import random
import time
from pathlib import Path

import pytest
from small import small_config

from moe_hf.checkpoint.manifest import (
    MANIFEST_NAME,
    FileRecord,
    Progress,
    checkpoints_of,
    file_names,
    fingerprints,
    is_whole,
    last_saved_at,
    newest_whole,
    read_manifest,
    resumed_part,
    verify,
    write_manifest,
)
from moe_hf.checkpoint.topology import ARCHITECTURE_FIELDS, Topology
from moe_hf.errors import CheckpointError

LAYOUT = Topology(world_size=4, expert_parallel_size=2, zero_stage=3, dtype="bfloat16")
PLAIN = Topology(world_size=1, expert_parallel_size=0, zero_stage=-1, dtype="float32")
PROGRESS = Progress(step=3, samples_seen=24, global_batch_size=8, skipped_steps=2, skipped_in_a_row=1)
SIZES = {
    "global_step3/zero_pp_rank_0_model_states.pt": 4000,
    "global_step3/zero_pp_rank_1_model_states.pt": 4001,
    "hf/config.json": 30,
    "hf/model.safetensors": 900,
    "latest": 12,
    "rng_state_0.pth": 1,
    "trainer_state.json": 120,
}


def make(folder: Path, layout: Topology = LAYOUT, **others) -> Path:
    draw = random.Random(7)
    for name, size in SIZES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(draw.randbytes(size))
    write_manifest(folder, layout, small_config(), PROGRESS, **others)
    return folder


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return make(tmp_path / "checkpoint-3")


def complaint(checkpoint: Path, **options) -> str:
    with pytest.raises(CheckpointError) as error:
        verify(checkpoint, **options)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")
    return str(error.value)


def test_manifest_says_what_was_saved(checkpoint):
    before = time.time()
    manifest = verify(checkpoint)
    assert manifest == read_manifest(checkpoint)
    assert (manifest.topology, manifest.progress, manifest.weights_only) == (LAYOUT, PROGRESS, False)
    assert manifest.architecture == {name: getattr(small_config(), name) for name in ARCHITECTURE_FIELDS}
    assert before - 60 < manifest.saved_at <= before
    assert list(manifest.files) == sorted(SIZES)
    for name, record in manifest.files.items():
        content = (checkpoint / name).read_bytes()
        assert record == FileRecord(SIZES[name], hashlib.sha256(content).hexdigest())


def test_large_files_are_hashed_whole(tmp_path):
    content = random.Random(1).randbytes((9 << 20) + 5)
    (tmp_path / "large").write_bytes(content)
    assert fingerprints(tmp_path, ["large"])["large"].sha256 == hashlib.sha256(content).hexdigest()


def test_manifest_is_on_the_disk_when_it_has_its_name(tmp_path, monkeypatch):
    done, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name), sync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append(f"> {Path(b).name}"), replace(a, b)))
    write_manifest(tmp_path, LAYOUT, small_config(), PROGRESS)
    assert done == [f".{MANIFEST_NAME}", f"> {MANIFEST_NAME}"]


# --------------------------------------------------------------------------------------------------------------------
# Damage


@pytest.mark.parametrize("name", sorted(SIZES))
def test_every_file_is_watched(checkpoint, name):
    path, content = checkpoint / name, (checkpoint / name).read_bytes()
    for length in sorted({0, len(content) // 2, len(content) - 1}):
        path.write_bytes(content[:length])
        for checksums in (True, False):
            sentence = f"{checkpoint} is torn: {name} has {length} bytes instead of {SIZES[name]}."
            assert complaint(checkpoint, checksums=checksums) == sentence
    path.write_bytes(content + b"\0")
    assert f"{name} has {len(content) + 1} bytes" in complaint(checkpoint, checksums=False)
    for place in sorted({0, len(content) // 2, len(content) - 1}):
        flipped = bytearray(content)
        flipped[place] ^= 1
        path.write_bytes(flipped)
        assert complaint(checkpoint) == f"{checkpoint} is torn: {name} is not what was saved, its SHA-256 differs."
    path.unlink()
    assert complaint(checkpoint) == f"{checkpoint} is torn: {name} is missing."
    path.mkdir()
    assert complaint(checkpoint) == f"{checkpoint} is torn: {name} is missing."


def test_every_byte_of_the_manifest_is_watched(checkpoint):
    path = checkpoint / MANIFEST_NAME
    content = path.read_bytes()
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError):
            read_manifest(checkpoint)
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        assert complaint(checkpoint) == f"{checkpoint} is torn: manifest.json is damaged."
    path.write_bytes(content[:-1])
    assert not is_whole(checkpoint, checksums=False)
    path.write_bytes(content)
    verify(checkpoint)


@pytest.mark.parametrize(
    "content",
    [b"", b"null", b"[]", b"{}", b"7", b"\xff\xfe{}", b"[" * 100_000, b'{"format": 1, "topology": {}}'],
)
def test_other_content_is_no_manifest(checkpoint, content):
    (checkpoint / MANIFEST_NAME).write_bytes(content)
    assert complaint(checkpoint) == f"{checkpoint} is torn: manifest.json is damaged."


def test_manifest_of_another_version_is_refused(checkpoint):
    path = checkpoint / MANIFEST_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    assert "is of another version of moe_hf" in complaint(checkpoint)


def test_checkpoint_without_manifest_is_not_whole(checkpoint):
    (checkpoint / MANIFEST_NAME).unlink()
    sentence = "has no manifest.json, so it is not a whole checkpoint of run_clm_moe.py."
    assert complaint(checkpoint) == f"{checkpoint} {sentence}"
    assert complaint(checkpoint.parent / "absent").endswith(sentence)


def test_file_that_cannot_be_read_is_named(checkpoint, monkeypatch):
    """A disk that fails under a file of the right size."""

    def fail(path, *args, **options):
        if Path(path).name == "latest":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return open_file(path, *args, **options)

    open_file = open
    monkeypatch.setattr("builtins.open", fail)
    assert complaint(checkpoint) == f"{checkpoint} is torn: latest cannot be read: Input/output error."


def test_files_that_were_added_do_no_harm(checkpoint):
    (checkpoint / "notes.txt").write_text("mine")
    verify(checkpoint)


def test_manifest_can_be_written_again(checkpoint):
    (checkpoint / "latest").write_text("longer than it was")
    # A writer was killed before it had renamed its file.
    (checkpoint / f".{MANIFEST_NAME}").write_text('{"topology": {')
    assert not is_whole(checkpoint)
    write_manifest(checkpoint, LAYOUT, small_config(), PROGRESS)
    assert verify(checkpoint).files["latest"].size == 18
    assert file_names(checkpoint) == sorted(SIZES)
    assert not (checkpoint / f".{MANIFEST_NAME}").exists()


# --------------------------------------------------------------------------------------------------------------------
# Parts, and shares of the work


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(bytes(900))])
def test_export_is_a_part_of_its_own(checkpoint, damage):
    damage(checkpoint / "hf" / "model.safetensors")
    verify(checkpoint, part="state")
    assert "hf/model.safetensors" in complaint(checkpoint, part="export")
    assert "hf/model.safetensors" in complaint(checkpoint)
    # With DeepSpeed the state is elsewhere.
    assert is_whole(checkpoint) and not is_whole(checkpoint, part="all")


def test_damaged_state_leaves_the_export_whole(checkpoint):
    (checkpoint / "latest").unlink()
    verify(checkpoint, part="export")
    assert "latest is missing" in complaint(checkpoint, part="state")


def test_without_deepspeed_the_export_belongs_to_the_state(tmp_path):
    for name, layout, weights_only in (("a", PLAIN, False), ("b", LAYOUT, True)):
        checkpoint = make(tmp_path / name, layout, weights_only=weights_only)
        assert resumed_part(read_manifest(checkpoint)) == "all"
        (checkpoint / "hf" / "config.json").write_bytes(bytes(30))
        assert not is_whole(checkpoint) and is_whole(checkpoint, part="state")


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_shares_are_all_of_the_work(checkpoint, count):
    read = []
    for index in range(count):
        verify(checkpoint, share=(index, count), on_file=read.append)
    assert sorted(read) == sorted(SIZES)
    (checkpoint / "rng_state_0.pth").write_bytes(b"?")
    found = 0
    for index in range(count):
        try:
            verify(checkpoint, share=(index, count))
        except CheckpointError:
            found += 1
    assert found == 1


def test_without_checksums_nothing_is_read(checkpoint):
    read = []
    (checkpoint / "latest").write_bytes(bytes(12))
    verify(checkpoint, checksums=False, on_file=read.append)
    assert not read and is_whole(checkpoint, checksums=False) and not is_whole(checkpoint)


# --------------------------------------------------------------------------------------------------------------------
# Several checkpoints


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """A run that was set back: checkpoint-9 was written before checkpoint-5."""
    times = iter([100.0, 200.0, 300.0])
    monkeypatch.setattr(time, "time", lambda: next(times))
    for step in (3, 9, 5):
        make(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-12").mkdir()
    for name in ("checkpoint-ideas", "checkpoint-", ".checkpoint-15.incomplete"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-13").write_text("a file")
    return tmp_path


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def test_newest_is_the_one_written_last(run):
    assert names(checkpoints_of(run)) == ["checkpoint-5", "checkpoint-9", "checkpoint-3", "checkpoint-12"]
    assert newest_whole(run) == run / "checkpoint-5"


def test_torn_ones_are_passed_over(run):
    (run / "checkpoint-5" / "latest").write_bytes(bytes(12))
    assert newest_whole(run) == run / "checkpoint-9"
    assert newest_whole(run, checksums=False) == run / "checkpoint-5"
    (run / "checkpoint-9" / MANIFEST_NAME).unlink()
    assert newest_whole(run) == run / "checkpoint-3"
    (run / "checkpoint-3" / "latest").unlink()
    assert newest_whole(run) is None
    assert newest_whole(run / "absent") is None


def test_weights_alone_cannot_be_resumed(run, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 400.0)
    write_manifest(run / "checkpoint-12", LAYOUT, small_config(), PROGRESS, weights_only=True)
    assert names(checkpoints_of(run))[0] == "checkpoint-12" and is_whole(run / "checkpoint-12")
    assert newest_whole(run) == run / "checkpoint-5"


def test_a_clock_that_was_set_back_does_not_make_a_checkpoint_older(tmp_path):
    """What was written last is the newest, which is never deleted and which a run goes on from."""
    assert last_saved_at(tmp_path) == 0
    config, layout = small_config(), Topology(1, 0, -1, "float32")
    for step, not_before in ((10, 4e9), (20, 4e9 + 1)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        write_manifest(folder, layout, config, Progress(step=step), not_before=not_before)
    assert last_saved_at(tmp_path) == 4e9 + 1
    assert [path.name for path in checkpoints_of(tmp_path)] == ["checkpoint-20", "checkpoint-10"]
