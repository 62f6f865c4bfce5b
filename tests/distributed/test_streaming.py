"""Streams over real processes: whose documents are whose, and what a resumed run reads."""

import json
from pathlib import Path

import pytest
from fork_server import Ended, Run, run_all
from launching import WORKER, run_cases
from small import deepspeed_json
from streams import BLOCK_SIZE, number_of, text_of, write_files

STREAMING_WORKER = WORKER.with_name("streaming_worker.py")
NUM_STEPS, SAVED_STEP = 12, 5
# Eight files of three documents: with four parts, an epoch of each part is two files, which are six steps.
FILES = [3] * 8
EPOCH = 6


class Lab:
    """Runs each launch once, when its first result is asked for."""

    def __init__(self, folder: Path, model: Path, with_four: bool) -> None:
        self._folder, self._model, self._with_four = folder, model, with_four
        self._launched: set[int] = set()
        self._text = write_files(folder / "files", FILES)
        mixture = [
            {"train_file": self._text, "weight": 2},
            {"train_file": write_files(folder / "others", [9, 8], first=1000), "weight": 1},
        ]
        (folder / "mixture.json").write_text(json.dumps(mixture))
        (folder / "deepspeed.json").write_text(json.dumps(deepspeed_json(3, 2)))

    def words(self, name: str, **changes) -> dict:
        flags = {
            "model_name_or_path": self._model,
            "train_file": self._text,
            "streaming": True,
            "streaming_shuffle_buffer": 4,
            "validation_split_percentage": 0,
            "packing": "pad",
            "block_size": BLOCK_SIZE,
            "output_dir": self._folder / name / "out",
            "deepspeed": self._folder / "deepspeed.json",
            "bf16": False,
            "max_steps": NUM_STEPS,
            "per_device_train_batch_size": 1,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "steps",
            "save_steps": SAVED_STEP,
            "disable_tqdm": True,
            "do_train": True,
        } | changes
        words = [(f"--{flag}", str(value)) for flag, value in flags.items() if value is not None]
        return {"name": name, "argv": [word for pair in words for word in pair]}

    def checkpoint(self, name: str) -> Path:
        return self._folder / name / "out" / f"checkpoint-{SAVED_STEP}"

    def launch(self, ranks: int) -> None:
        if ranks in self._launched:
            return
        self._launched.add(ranks)
        if ranks == 4:
            resumed = self.words("four_resumed", resume_from_checkpoint=self.checkpoint("four"))
            cases = [self.words("four"), resumed]
        else:
            mixed = {
                "train_file": None,
                "dataset_mixture": self._folder / "mixture.json",
                "packing": "documents",
                "dataloader_num_workers": 2,
            }
            twice = {"per_device_train_batch_size": 2}
            cases = [
                self.words("two", streaming_partitions=4, **twice),
                self.words("mixed", **mixed),
                self.words("mixed_resumed", resume_from_checkpoint=self.checkpoint("mixed"), **mixed),
            ]
            if self._with_four:
                self.launch(4)
                of_four = twice | {"resume_from_checkpoint": self.checkpoint("four")}
                stored = of_four | {"streaming": None, "streaming_shuffle_buffer": None}
                cases += [self.words("two_from_four", **of_four), self.words("stored", **stored)]
        run_cases(ranks, cases, self._folder, worker=STREAMING_WORKER)

    def results(self, name: str, ranks: int) -> list[dict]:
        """Return what each rank has recorded."""
        self.launch(ranks)
        return [json.loads((self._folder / name / f"rank_{rank}.json").read_text()) for rank in range(ranks)]

    def documents(self, name: str, ranks: int) -> list[list[int]]:
        """Return the documents that each rank has trained on, in their order."""
        return [
            [number_of(row) for batch in result["batches"] for row in batch] for result in self.results(name, ranks)
        ]


@pytest.fixture(scope="module")
def lab(request, tmp_path_factory, small_model) -> Lab:
    return Lab(tmp_path_factory.mktemp("streams"), small_model, request.config.getoption("--slow"))


# Four processes on two cores take minutes.
FOUR = pytest.param("four", 4, marks=pytest.mark.slow)


@pytest.mark.parametrize(("name", "ranks"), [FOUR, ("two", 2)])
def test_no_two_ranks_see_the_same_document_in_an_epoch(name, ranks, lab):
    seen = lab.documents(name, ranks)
    length = EPOCH * 4 // ranks
    epochs = [[set(own[i : i + length]) for own in seen] for i in (0, length)]
    for epoch in epochs:
        assert sum(map(len, epoch)) == sum(FILES)
        assert set.union(*epoch) == set(range(sum(FILES)))
    assert [own[:length] for own in seen] != [own[length:] for own in seen], "both epochs have one order"


@pytest.mark.parametrize(("name", "ranks"), [FOUR, ("mixed", 2)])
def test_resumed_run_reads_exactly_the_next_rows(name, ranks, lab):
    whole, resumed = lab.results(name, ranks), lab.results(f"{name}_resumed", ranks)
    for rank in range(ranks):
        assert len(resumed[rank]["batches"]) == NUM_STEPS - SAVED_STEP
        assert resumed[rank]["batches"] == whole[rank]["batches"][SAVED_STEP:]
        for step, loss in resumed[rank]["losses"].items():
            assert loss == whole[rank]["losses"][step]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two", "two_from_four"])
def test_half_as_many_ranks_train_on_the_same_rows_at_each_step(name, lab):
    """`two` from the beginning, `two_from_four` after the checkpoint of four ranks."""

    def steps(name: str, ranks: int) -> list[list[int]]:
        size = 4 // ranks
        seen = lab.documents(name, ranks)
        return [sorted(n for own in seen for n in own[i : i + size]) for i in range(0, len(seen[0]), size)]

    first = SAVED_STEP if name == "two_from_four" else 0
    assert steps(name, 2) == steps("four", 4)[first:]
    losses, others = lab.results(name, 2)[0]["losses"], lab.results("four", 4)[0]["losses"]
    for step, loss in losses.items():
        assert loss == pytest.approx(others[step], rel=1e-5)


@pytest.mark.slow
def test_place_in_a_stream_means_nothing_to_stored_data(lab):
    for result in lab.results("stored", 2):
        assert "was reading a stream, and its place means nothing to stored data" in result["error"]
        assert not result["batches"]


# A row that cannot be used, in the middle of what the second process reads; the first knows nothing of it.
BAD_ROW = 40
ENDS = {
    "bad_row": ({"train_file": "bad/*.jsonl"}, f"row {BAD_ROW + 1} of the training data ('../bad/*.jsonl'): column"),
    "bad_row_of_a_worker": (
        {"train_file": "bad/*.jsonl", "dataloader_num_workers": 1},
        f"row {BAD_ROW + 1} of the training data ('../bad/*.jsonl'): column 'text' holds null",
    ),
    "few_documents": (
        {"train_file": "few/*.jsonl"},
        "part 2 of 2 of the training data ('../few/*.jsonl') has no docum",
    ),
    "no_end": ({"max_steps": None}, "--streaming reads without end; say how long to train with --max_steps"),
    "uneven": ({"streaming_partitions": 3}, "streaming_partitions=3 cannot be dealt out evenly to 2 processes"),
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory, small_model) -> dict[str, Ended]:
    """How runs over two processes have ended, none of which could go on."""
    folder = tmp_path_factory.mktemp("ends")
    write_files(folder / "bad", [200, 200])
    lines = [text_of(number) for number in range(BAD_ROW)] + [None] + [text_of(number) for number in range(160)]
    (folder / "bad" / "part01.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    write_files(folder / "few", [1])
    (folder / "deepspeed.json").write_text(json.dumps(deepspeed_json(2, 2)))
    (folder / "server").mkdir()
    runs = []
    for name, (changes, _) in ENDS.items():
        flags = {
            "model_name_or_path": small_model,
            "train_file": "bad/*.jsonl",
            "streaming": True,
            "streaming_shuffle_buffer": 0,
            "validation_split_percentage": 0,
            "packing": "pad",
            "block_size": BLOCK_SIZE,
            "output_dir": "out",
            "deepspeed": "../deepspeed.json",
            "max_steps": 100,
            "per_device_train_batch_size": 2,
            "save_strategy": "no",
            "disable_tqdm": True,
            "do_train": True,
        } | changes
        flags["train_file"] = f"../{flags['train_file']}"
        (folder / name).mkdir()
        words = [(f"--{flag}", str(value)) for flag, value in flags.items() if value is not None]
        runs.append(Run(name, [word for pair in words for word in pair], str(folder / name)))
    return run_all(runs, folder / "server")


@pytest.mark.parametrize("name", ENDS)
def test_all_ranks_end_with_one_sentence(name, ended):
    run = ended[name]
    assert run.exit_codes == [2, 2], run.stderr
    lines = [line for stream in run.stderr for line in stream.splitlines()]
    (sentence,) = [line for line in lines if line.startswith("error: ")]
    assert sentence.startswith(f"error: {ENDS[name][1]}")
    assert "Traceback" not in "".join(run.stdout + run.stderr)
