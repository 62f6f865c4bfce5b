"""Sizes of the kinds of parallelism: read from the JSON, replaced by flags, compared with the number of ranks."""

import pytest

from moe_hf.errors import ConfigError
from moe_hf.parallel.parallel_sizes import ParallelSizes, check_only_one, parallel_sizes, with_parallel_sizes

JSON = {
    "tensor_parallel": {"autotp_size": 2},
    "sequence_parallel_size": 4,
    "pipeline": {"stages": 3, "seed_layers": True},
}


def test_sizes_are_read_from_the_json():
    assert parallel_sizes(JSON) == ParallelSizes(tensor=2, sequence=4, pipeline=3)
    assert parallel_sizes({}) == parallel_sizes(None) == ParallelSizes(1, 1, 1)


def test_flags_replace_what_the_json_says():
    assert parallel_sizes(with_parallel_sizes({}, tensor=2, sequence=4, pipeline=3)) == parallel_sizes(JSON)
    changed = with_parallel_sizes(JSON, tensor=None, sequence=8, pipeline=5)
    assert parallel_sizes(changed) == ParallelSizes(tensor=2, sequence=8, pipeline=5)
    assert changed["pipeline"]["seed_layers"] and JSON["pipeline"]["stages"] == 3, "a copy, with what else there was"


def test_one_switches_off_and_leaves_no_key_behind():
    off = with_parallel_sizes(JSON, tensor=1, sequence=1, pipeline=1)
    assert off == {"pipeline": {"seed_layers": True}}


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"sequence_parallel_size": 0}, "sequence_parallel_size=0 must be a positive integer"),
        ({"pipeline": {"stages": True}}, "pipeline.stages=true must be a positive integer"),
        ({"tensor_parallel": {"autotp_size": "2"}}, 'tensor_parallel.autotp_size="2" must be'),
        ({"tensor_parallel": 2}, "tensor_parallel=2 must be an object"),
    ],
)
def test_sizes_are_positive_integers(config, sentence):
    with pytest.raises(ConfigError, match=sentence):
        parallel_sizes(config)


def test_flags_are_positive_integers_too():
    with pytest.raises(ConfigError, match="tensor_parallel_size=-1 must be a positive integer; 1 switches it off"):
        with_parallel_sizes({}, tensor=-1)


def test_what_is_left_reads_different_rows():
    assert ParallelSizes().data_parallel_size(6) == 6
    assert ParallelSizes(tensor=2, pipeline=4).data_parallel_size(16) == 2
    sentence = "world_size=6 is no multiple of tensor_parallel_size=2 x pipeline_parallel_size=2 = 4; start a multiple"
    with pytest.raises(ConfigError, match=sentence):
        ParallelSizes(tensor=2, pipeline=2).data_parallel_size(6)
    with pytest.raises(ConfigError, match="world_size=6 is no multiple of sequence_parallel_size=4; start a multiple"):
        ParallelSizes(sequence=4).data_parallel_size(6)


@pytest.mark.parametrize("kinds", [("tensor", "sequence"), ("tensor", "pipeline"), ("sequence", "pipeline")])
def test_two_kinds_are_not_in_one_run(kinds):
    first, second = kinds
    with pytest.raises(ConfigError, match=f"^{first}_parallel_size=2 and {second}_parallel_size=4 do not combine"):
        check_only_one(with_parallel_sizes({}, **{first: 2, second: 4}))
    for kind in kinds:
        check_only_one(with_parallel_sizes({}, **{kind: 2}))
