"""Wrong input ends every process at once with exit code 2 and one sentence, and touches nothing.

The cases are in `bad_input_cases.py`: command lines that train, with one thing wrong in each. A fork server starts them
all over two processes; some go through the deepspeed launcher too.
"""

import json
import signal
from pathlib import Path

import launching
import pytest
from bad_input import FROM_FOLDER, MODEL, TORN, Case, prepare, resuming, saved
from bad_input_cases import CASES
from fork_server import Ended, Patch, run_all
from small import deepspeed_json, save_small_model, save_tokenizer

MOST_SECONDS = 30.0

# What `CASES` are measured by: with their flags but without their mistakes everything is well up to the training.
BEGINS = (Patch("moe_hf.training.run.execute", raises="training begins"),)
SOUND = [
    Case("sound", {}, "training begins", patches=BEGINS),
    Case("sound_folder", FROM_FOLDER, "training begins", patches=BEGINS),
    resuming("sound_checkpoint", "training begins", saved(), patches=BEGINS),
    # Nothing but what a killed run has left: no checkpoint, and it is not in the way.
    Case(
        "sound_rubbish",
        {"resume_from_checkpoint": "auto"},
        "training begins",
        files={"out/metrics.jsonl": "", "out/.checkpoint-1.incomplete/checkpoint-1/latest": "global_step1"},
        patches=BEGINS,
    ),
    resuming("sound_torn_checkpoint", "training begins", TORN, {"resume_from_checkpoint": "auto"}, patches=BEGINS),
]
OVERWRITING = Case(
    "sound_overwriting", {"overwrite_output_dir": True}, "training begins", checkpoint=saved(), patches=BEGINS
)

# As when a file is there on the first of two machines only: rank 0 goes on and waits for a rank that does not come.
OTHER_MACHINE = Case(
    "rank_1_fails_before_the_group",
    {},
    "only rank 1 has seen this",
    nodes=2,
    patches=(
        Patch("moe_hf.training.checked_run.check_data_arguments", raises="only rank 1 has seen this", rank=1),
        Patch("moe_hf.parallel.failure._PATIENCE_SECONDS", value=3.0),
    ),
)

LAUNCHED = [
    case for case in CASES if case.name in ("misspelt_section", "too_little_text", "smoothing_of_1_in_a_pipeline")
]


def contents(folder: Path) -> dict[Path, bytes | None]:
    """Return every file and folder below `folder`, with what the files hold."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def common(tmp_path_factory) -> Path:
    """A folder whose sub-folder `common` holds what `FLAGS` names; the cases' folders stand beside it."""
    folder = tmp_path_factory.mktemp("bad_input")
    common = folder / "common"
    save_small_model(common / "model")
    save_tokenizer(common / "tokenizer")
    (common / "model.json").write_text(json.dumps(MODEL))
    (common / "deepspeed.json").write_text(json.dumps(deepspeed_json(2, 2)))
    text = " ".join(f"w{i}" for i in range(3, 100))
    (common / "text.jsonl").write_text(f'{{"text": "{text}"}}\n')
    return folder


@pytest.fixture(scope="module")
def ended(request, common) -> dict[str, tuple[Ended, bool]]:
    """How each selected case has ended, and whether its folder is as it was."""
    selected = [item.callspec.params["case"] for item in request.session.items if _reads_ended(item, request)]
    folders = {case.name: common / case.name for case in selected}
    for folder in folders.values():
        folder.mkdir()
    runs = [prepare(case, folders[case.name]) for case in selected]
    before = {name: contents(folder) for name, folder in folders.items()}
    (common / "server").mkdir()
    results = run_all(runs, common / "server")
    return {name: (results[name], contents(folder) == before[name]) for name, folder in folders.items()}


def _reads_ended(item: pytest.Item, request) -> bool:
    return item.path == request.path and "ended" in item.fixturenames


def told(run: Ended) -> list[str]:
    """Return the sentences that one rank or another has printed."""
    return [line for text in run.stdout + run.stderr for line in text.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize("case", SOUND, ids=lambda case: case.name)
def test_without_the_mistake_training_begins(case, ended):
    run, _ = ended[case.name]
    assert told(run) == ["error: training begins"], run.stderr


@pytest.mark.parametrize("case", [OVERWRITING], ids=lambda case: case.name)
def test_overwriting_deletes_nothing_before_training_begins(case, ended, common):
    assert told(ended[case.name][0]) == ["error: training begins"]
    assert [path.name for path in (common / case.name / "out").iterdir()] == ["checkpoint-3"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_all_ranks_end_with_one_sentence(case, ended):
    run, is_untouched = ended[case.name]
    assert "Traceback" not in "".join(run.stdout + run.stderr), run.stderr
    assert run.exit_codes == [2] * case.ranks, run.stderr
    assert run.seconds < MOST_SECONDS
    (sentence,) = told(run)
    assert case.says in sentence
    assert run.stderr[0].endswith(sentence + "\n")
    assert is_untouched


@pytest.mark.parametrize("case", [OTHER_MACHINE], ids=lambda case: case.name)
def test_rank_speaks_when_rank_0_knows_of_nothing(case, ended):
    run, _ = ended[case.name]
    assert run.exit_codes == [-signal.SIGTERM, 2]
    assert told(run) == run.stderr[1].splitlines() == [f"error: {case.says}"]


@pytest.mark.slow  # the launcher is seen to end like this in test_training.py too
@pytest.mark.parametrize("case", LAUNCHED, ids=lambda case: case.name)
def test_launcher_ends_with_one_sentence(case, common):
    folder = common / f"launched_{case.name}"
    folder.mkdir()
    run = prepare(case, folder)
    before = contents(folder)
    done = launching.deepspeed(2, launching.ROOT / "run_clm_moe.py", *run.argv, timeout=120, cwd=folder)
    assert done.returncode == 2, done.stderr
    assert (done.stdout + done.stderr).count(case.says) == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert contents(folder) == before
