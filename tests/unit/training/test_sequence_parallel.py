"""Who reads which rows, and flags that do not go with shared ones."""

from itertools import islice
from types import SimpleNamespace

import pytest
from streams import number_of, source_of, stream_of, write_files

from moe_hf.errors import ConfigError
from moe_hf.training.arguments import parse_arguments
from moe_hf.training.sequence_parallel import SequenceParallelTrainer, check_sequence_flags, reader
from moe_hf.training.stream_training import lay_out


def test_neighbours_are_one_reader():
    of_ranks = [
        reader(SimpleNamespace(process_index=rank, world_size=8, sequence_parallel_size=4)) for rank in range(8)
    ]
    assert of_ranks == [(0, 2)] * 4 + [(1, 2)] * 4
    for size in (None, 1):
        assert reader(SimpleNamespace(process_index=3, world_size=8, sequence_parallel_size=size)) == (3, 8)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--average_tokens_across_devices", "False"], "average_tokens_across_devices=False would weigh pieces"),
        (
            ["--train_sampling_strategy", "batch_rebalance"],
            "batch_rebalance gives every rank rows of its own, but with",
        ),
    ],
)
def test_flags_that_count_or_read_otherwise(words, message):
    namespace = parse_arguments(["--output_dir", "out", *words])
    with pytest.raises(ConfigError, match=message):
        check_sequence_flags(namespace, 2)
    check_sequence_flags(namespace, 1)
    check_sequence_flags(parse_arguments(["--output_dir", "out"]), 2)


def test_the_batch_is_counted_in_rows(monkeypatch):
    args = SimpleNamespace(world_size=8, sequence_parallel_size=4)
    monkeypatch.setattr("transformers.Trainer.get_total_train_batch_size", lambda self, args: 3 * 5 * args.world_size)
    trainer = object.__new__(SequenceParallelTrainer)
    assert trainer.get_total_train_batch_size(args) == 3 * 5 * 2


def test_neighbours_read_the_same_part_of_a_stream(tmp_path):
    pattern, documents = write_files(tmp_path / "files", [4, 4]), []
    for rank in range(4):
        stream = stream_of(tmp_path, [source_of(tmp_path, pattern)])
        args = {"process_index": rank, "world_size": 4, "sequence_parallel_size": 2, "dataloader_num_workers": 0}
        lay_out(stream, SimpleNamespace(**args, resume_from_checkpoint=None), None, num_readers=2)
        documents.append([number_of(row["input_ids"]) for row in islice(stream, 4)])
    first, same, second, same_again = documents
    assert first == same and second == same_again
    assert sorted(first + second) == [*range(8)]
