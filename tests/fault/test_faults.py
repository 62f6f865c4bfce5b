"""Signals, full disks and torn checkpoints: each ends with its own exit code and word, and the next start goes on."""

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_server import Blow, Damage, Ended, Start, logged_steps, run_chains
from small import NUM_STEPS

from moe_hf.checkpoint.manifest import checkpoints_of, is_whole, read_manifest

SHARD = "global_step6/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"  # of the second rank
WEIGHTS = "hf/model.safetensors"
RESET = ("--reset_optimizer", "True", "--max_steps", "2")
# No checkpoints but those that a signal asks for, over several epochs of ten steps.
UNSAVED = {"max_steps": 24, "save_strategy": "no"}
SIGNALLED = {
    "term_to_one": (2, Blow("log", step=3, number=signal.SIGTERM, ranks=(1,)), {}),
    "usr1_to_all": (3, Blow("log", step=5, number=signal.SIGUSR1), {"eval_strategy": "steps", "eval_steps": 1}),
    # As the launcher passes it on: to the workers that read the data too.
    "term_to_trees": (2, Blow("log", step=4, number=signal.SIGTERM, tree=True), {"dataloader_num_workers": 1}),
}


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory) -> Iterator[Path | None]:
    """A disk with room for one checkpoint but not for two, where we may mount one."""
    folder = tmp_path_factory.mktemp("disk")
    mount = ["mount", "-t", "tmpfs", "-o", "size=1800k", "tmpfs", str(folder)]
    is_mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    yield folder if is_mounted else None
    if is_mounted:
        subprocess.run(["umount", folder], check=True)


@pytest.fixture(scope="module")
def ended(lab, tmp_path_factory, small_disk) -> dict[str, list[Ended]]:
    """How all starts have ended, by the name of the chain."""
    evaluation = {"validation_file": lab.folder / "rows.jsonl", "max_eval_samples": 4, "do_eval": True}
    chains = [
        lab.chain("reference_2", 2),
        lab.chain("unsaved_2", 2, **UNSAVED),
        lab.chain("unsaved_3", 3, **UNSAVED),
        lab.chain("full_0", 2, Start(file_limits={"0": 100_000}), Start()),
        lab.chain("full_1", 3, Start(file_limits={"1": 100_000}), Start()),
        lab.chain("torn", 2, *torn_starts(lab.folder / "torn"), save_total_limit=5),
    ]
    for name, (zero, blow, others) in SIGNALLED.items():
        others = others | (evaluation if "eval_steps" in others else {})
        chains.append(lab.chain(name, zero, Start(blow), Start(), **UNSAVED, **others))
    if small_disk is not None:
        chains.append(lab.chain("small_disk", 2, output_dir=small_disk / "out"))
    return run_chains(chains, tmp_path_factory.mktemp("faults"))


def torn_starts(output_dir: Path) -> list[Start]:
    """What happens to the checkpoints of a finished run, one thing after the other."""

    def start(how: str, file: str, *words: str) -> Start:
        return Start(damages=(Damage(file, how),), words=words)

    last = ("--resume_from_checkpoint", str(output_dir / "checkpoint-6"))
    before = ("--resume_from_checkpoint", str(output_dir / "checkpoint-5"))
    shard, weights = f"checkpoint-6/{SHARD}", f"checkpoint-6/{WEIGHTS}"
    return [
        Start(),
        start("flip", weights, *last),
        start("flip", shard, *last, "--reset_optimizer", "True"),
        start("flip", weights, *last),  # it is now as it was
        start("cut", shard, *last),
        start("remove", "checkpoint-6/trainer_state.json", "--resume_from_checkpoint", "true"),
        start("flip", shard),
        Start(words=("--deepspeed", str(output_dir.parent / "zero3.json"), *before, *RESET)),
    ]


def assert_says(run: Ended, *fragments: str) -> None:
    """The run has ended on all ranks with exit code 2 and one sentence."""
    assert run.exit_codes == [2, 2], run.stderr
    said = [line for text in run.stdout + run.stderr for line in text.splitlines() if line.startswith("error: ")]
    assert len(said) == 1, said
    assert all(fragment in said[0] for fragment in fragments), said
    assert "Traceback" not in "".join(run.stderr), run.stderr


# --------------------------------------------------------------------------------------------------------------------
# Signals


@pytest.mark.parametrize("name", SIGNALLED)
def test_signal_saves_and_the_next_start_goes_on(lab, ended, name):
    stopped, last = ended[name]
    zero, blow, _ = SIGNALLED[name]
    assert stopped.exit_codes == [75, 75], stopped.stderr
    (sentence,) = [line for text in stopped.stderr for line in text.splitlines() if line.startswith("Stopped by ")]
    step = int(sentence.split("after step ")[1].split(";")[0])
    assert sentence == (
        f"Stopped by {signal.Signals(blow.number).name} after step {step}; the checkpoint is "
        f"{lab.folder / name}/checkpoint-{step}. Go on with --resume_from_checkpoint auto."
    )
    # The step that was being made when the signal came, or the one after.
    assert blow.step < step < 24
    assert "Traceback" not in "".join(stopped.stderr)
    assert [path.name for path in checkpoints_of(lab.folder / name)] == [f"checkpoint-{step}"]
    assert is_whole(lab.folder / name / f"checkpoint-{step}", part="all")
    assert last.exit_codes == [0, 0], last.stderr
    assert logged_steps(last)[0] == f"{step + 1}/24"
    lab.assert_same_weights(name, f"unsaved_{zero}")


def test_place_in_the_data_is_recorded(lab, ended):
    """Forty rows, four for each step; what a checkpoint says does not depend on how often the run was started."""
    for name in SIGNALLED:
        (checkpoint,) = checkpoints_of(lab.folder / name)
        progress = read_manifest(checkpoint).progress
        assert progress.samples_seen == 4 * progress.step and progress.global_batch_size == 4


# --------------------------------------------------------------------------------------------------------------------
# Full disks


@pytest.mark.parametrize("name", ["full_0", "full_1"])
def test_rank_that_cannot_write_ends_all_and_what_was_saved_stays(lab, ended, name):
    full, last = ended[name]
    assert_says(full, f"Could not write {lab.folder / name}/checkpoint-2: ", "MB are free on its disk")
    # The second start found the first checkpoint alone, and went on from there.
    assert last.exit_codes == [0, 0], last.stderr
    assert logged_steps(last)[0] == f"2/{NUM_STEPS}"
    assert not list((lab.folder / name).glob(".*"))


def test_full_disk_ends_all_and_what_was_saved_stays(ended, small_disk):
    if small_disk is None:
        pytest.skip("mounting needs more rights; the ranks that cannot write are tested in any case")
    (full,) = ended["small_disk"]
    assert_says(full, f"Could not write {small_disk}/out/checkpoint-2: ", "MB are free on its disk")
    assert checkpoints_of(small_disk / "out") == [small_disk / "out" / "checkpoint-1"]
    assert is_whole(small_disk / "out" / "checkpoint-1", part="all")
    assert not list((small_disk / "out").glob(".*"))


# --------------------------------------------------------------------------------------------------------------------
# Torn checkpoints


def test_torn_checkpoints_are_named_and_another_is_offered_or_taken(lab, ended):
    folder = lab.folder / "torn"
    first, resumed, without_weights, flipped, cut, newest, automatic, _ = ended["torn"]
    torn, offer = f"{folder}/checkpoint-6 is torn: ", f"; resume from {folder}/checkpoint-5."
    assert first.exit_codes == [0, 0], first.stderr
    # With DeepSpeed the export is not what a run resumes from, ...
    assert resumed.exit_codes == [0, 0] and not logged_steps(resumed), resumed.stderr
    # ... but with --reset_optimizer it is.
    assert_says(without_weights, f"{torn}{WEIGHTS} is not what was saved, its SHA-256 differs{offer}")
    assert_says(flipped, f"{torn}{SHARD} is not what was saved, its SHA-256 differs{offer}")
    assert_says(cut, f"{torn}{SHARD} has ", " bytes instead of ", offer)
    for run, fault in ((newest, " has "), (automatic, " is not what was saved, its SHA-256 differs.")):
        assert run.exit_codes == [0, 0], run.stderr
        (said,) = [line for line in (run.stdout[0] + run.stdout[1]).splitlines() if "is torn" in line]
        assert said.startswith(torn + SHARD + fault)
        assert run.stdout[0].count(f"Resuming from {folder}/checkpoint-5.\n") == 1
        assert logged_steps(run) == ["6/6"]


def test_weights_of_a_checkpoint_start_another_layout(lab, ended):
    """The last start of the chain: ZeRO 3 from a checkpoint of ZeRO 2, of which it takes the weights."""
    started = ended["torn"][-1]
    assert started.exit_codes == [0, 0], started.stderr
    assert logged_steps(started) == ["1/2", "2/2"]
    saved = read_manifest(lab.folder / "torn" / "checkpoint-2")
    assert (saved.topology.zero_stage, saved.progress.samples_seen) == (3, 8)
    # Weights that were trained for five steps lose less than those that were not at all.
    of_start = float(started.stdout[0].split("| loss ")[1].split()[0])
    of_reference = float(ended["reference_2"][0].stdout[0].split("| loss ")[1].split()[0])
    assert of_start < of_reference - 0.1
    # The file that it was told to start from is still there.
    assert is_whole(lab.folder / "torn" / "checkpoint-5", part="all")
