"""Checkpoints appear whole, replace others only when they are, and old ones go last."""

import os
import shutil
import time
from itertools import count
from pathlib import Path

import pytest
from small import small_config

from moe_hf.checkpoint import folders
from moe_hf.checkpoint.manifest import Progress, is_whole, read_manifest
from moe_hf.checkpoint.topology import Topology
from moe_hf.errors import CheckpointError
from moe_hf.training import saving

LAYOUT = Topology(world_size=1, expert_parallel_size=0, zero_stage=2, dtype="float32")


def save(checkpoint: Path, content: str = "state", weights_only: bool = False) -> None:
    """Save a checkpoint as the trainer does."""
    staging = saving.begin(checkpoint)
    folder = staging / checkpoint.name / "global_step7"
    folder.mkdir(parents=True)
    (folder / "shard.pt").write_text(content)
    saving.write_latest(staging / checkpoint.name)
    saving.finish(checkpoint, LAYOUT, small_config(), Progress(step=7), weights_only=weights_only)


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Every checkpoint is saved a second after the one before."""
    seconds = count(1000)
    monkeypatch.setattr(time, "time", lambda: float(next(seconds)))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_checkpoint_is_there_when_it_is_whole(tmp_path):
    checkpoint = tmp_path / "checkpoint-7"
    staging = saving.begin(checkpoint)
    assert names(tmp_path) == [staging.name] == [".checkpoint-7.incomplete"]
    save(checkpoint)
    assert names(tmp_path) == ["checkpoint-7"]
    assert sorted(read_manifest(checkpoint).files) == ["global_step7/shard.pt", "latest"]
    assert (checkpoint / "latest").read_text() == "global_step7"
    assert is_whole(checkpoint, part="all")


def test_everything_is_on_the_disk_before_it_is_named(tmp_path, monkeypatch):
    """Also the manifest, which the rename then makes true."""
    done = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(os.readlink(f"/proc/self/fd/{fd}")), sync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append(f"> {b}"), replace(a, b))[1])
    save(tmp_path / "checkpoint-7")
    named = done.index(f"> {tmp_path / 'checkpoint-7'}")
    written = tmp_path / ".checkpoint-7.incomplete" / "checkpoint-7"
    for path in ("global_step7/shard.pt", "global_step7", "latest", "manifest.json", ""):
        assert str(written / path) in done[:named], path
    assert str(tmp_path) in done[named:]
    # The manifest is written after what it describes has been synced.
    assert done.index(str(written / "latest")) < done.index(f"> {written / 'manifest.json'}")


def test_checkpoint_of_the_same_step_is_replaced(tmp_path):
    checkpoint = tmp_path / "checkpoint-7"
    save(checkpoint, "old")
    (checkpoint / "notes.txt").write_text("of the old one")
    save(checkpoint, "new")
    assert (checkpoint / "global_step7" / "shard.pt").read_text() == "new"
    assert names(tmp_path) == ["checkpoint-7"] and not (checkpoint / "notes.txt").exists()


def test_checkpoint_stays_while_another_is_written_in_its_place(tmp_path):
    checkpoint = tmp_path / "checkpoint-7"
    save(checkpoint, "old")
    saving.begin(checkpoint)
    assert is_whole(checkpoint)


@pytest.mark.parametrize("killed_after", [1, 2])
def test_killed_while_replacing_one_of_the_two_is_left(tmp_path, monkeypatch, killed_after):
    """The old one is moved aside, the new one moved in: whatever is missing, one of them comes back."""
    checkpoint = tmp_path / "checkpoint-7"
    save(checkpoint, "old")
    moves, replace = [], os.replace

    def replace_then_die(source, target):
        if Path(source).name.endswith("manifest.json"):
            return replace(source, target)
        if len(moves) == killed_after:
            raise KeyboardInterrupt
        moves.append(source)
        return replace(source, target)

    def die(folder, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", replace_then_die)
    monkeypatch.setattr(folders.shutil, "rmtree", shutil.rmtree if killed_after == 1 else die)
    with pytest.raises(KeyboardInterrupt):
        save(checkpoint, "new")
    monkeypatch.undo()
    assert checkpoint.exists() == (killed_after == 2)
    for _ in range(2):  # by one process, and by another that comes a little later
        saving.restore_replaced(tmp_path)
    assert is_whole(checkpoint)
    assert (checkpoint / "global_step7" / "shard.pt").read_text() == ("old" if killed_after == 1 else "new")
    saving.remove_leftovers(tmp_path)
    assert names(tmp_path) == ["checkpoint-7"]


def test_leftovers_of_killed_runs_are_deleted_and_nothing_else(tmp_path):
    for name in (".checkpoint-3.incomplete/checkpoint-3", ".checkpoint-9.incomplete", ".cache", ".checkpoint-x"):
        (tmp_path / name).mkdir(parents=True)
    save(tmp_path / "checkpoint-7")
    assert names(tmp_path) == [".cache", ".checkpoint-x", "checkpoint-7"]


def test_what_another_rank_has_written_must_be_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "_PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(saving, "_gather", lambda value: [value, {"elsewhere.pt": 5}])
    with pytest.raises(CheckpointError, match=r"elsewhere\.pt, which another rank has written; --output_dir must be"):
        save(tmp_path / "checkpoint-7")
    assert not (tmp_path / "checkpoint-7").exists()


def test_file_that_comes_late_is_waited_for(tmp_path, monkeypatch):
    """Network file systems show what another machine has written after a while, and its size after another."""
    path, looks = tmp_path / "late", []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        path.write_text("x" * len(looks))

    monkeypatch.setattr(time, "sleep", sleep)
    assert saving._appears(path, size=3) and len(looks) == 3


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("[enforce fail]\n at . x")])
def test_error_says_what_why_and_how_full_the_disk_is(tmp_path, error):
    sentence = str(saving.could_not_write(tmp_path / "checkpoint-7", error))
    reason = " ".join(str(error).split())
    assert sentence.startswith(f"Could not write {tmp_path}/checkpoint-7: {reason} (")
    assert sentence.endswith(" MB are free on its disk).")


# --------------------------------------------------------------------------------------------------------------------
# Rotation


@pytest.fixture
def run(tmp_path) -> Path:
    """A run that was set back: checkpoint-8 was written before checkpoint-5."""
    for step in (2, 4, 6, 8, 5):
        save(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-ideas").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("limit", "best", "kept"),
    [
        (None, None, {2, 4, 6, 8, 5}),
        (0, None, {2, 4, 6, 8, 5}),
        (9, None, {2, 4, 6, 8, 5}),
        (3, None, {5, 8, 6}),
        (1, None, {5}),
        (1, 2, {5, 2}),  # the newest is for going on, the best is asked for
        (2, 2, {5, 2}),
        (3, 2, {5, 8, 2}),
        (2, 5, {5, 8}),
        (2, 77, {5, 8}),
    ],
)
def test_newest_and_best_are_kept(run, limit, best, kept):
    saving.rotate(run, limit, best and str(run / f"checkpoint-{best}"))
    assert set(names(run)) == {f"checkpoint-{step}" for step in kept} | {"checkpoint-ideas"}


def test_torn_ones_do_not_count_as_kept(run):
    (run / "checkpoint-5" / "latest").unlink()
    (run / "checkpoint-8" / "manifest.json").unlink()
    saving.rotate(run, 2, None)
    assert names(run) == ["checkpoint-4", "checkpoint-6", "checkpoint-ideas"]


def test_nothing_is_deleted_where_nothing_is_whole(run):
    before = names(run)
    for step in (2, 4, 6, 8, 5):
        (run / f"checkpoint-{step}" / "latest").unlink()
    saving.rotate(run, 1, None)
    assert names(run) == before


def test_weights_alone_are_rotated_too(run):
    for step in (8, 9):
        save(run / f"checkpoint-{step}", weights_only=True)
    saving.rotate(run, 2, None)
    assert names(run) == ["checkpoint-8", "checkpoint-9", "checkpoint-ideas"]


def test_one_process_shares_its_disk_with_itself(tmp_path):
    saving.check_shared(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()
