"""A layout on fewer processes keeps what it consists of."""

import pytest

from moe_hf.doctor.layout import Layout, best_ranks, fewest_ranks, layout_of, shrunk, with_layout


@pytest.mark.parametrize(
    ("layout", "fewest"),
    [
        (Layout(1), 1),
        (Layout(8), 2),
        (Layout(16, expert=8), 2),
        (Layout(8, expert=1), 2),
        (Layout(16, expert=4, pipeline=2), 4),
        (Layout(8, expert=2, tensor=4), 4),
        (Layout(8, expert=2, sequence=2), 2),
        (Layout(16, tensor=2, pipeline=2), 8),
    ],
)
def test_the_fewest_processes_that_show_every_kind(layout, fewest):
    assert fewest_ranks(layout) == fewest


@pytest.mark.parametrize(
    ("layout", "at_most", "best"),
    [
        (Layout(2, expert=2), 2, 2),
        (Layout(16, expert=8), 2, 2),
        (Layout(16, expert=8), 4, 4),  # replicas of experts too
        (Layout(8, expert=8), 4, 2),  # there are none
        (Layout(16, expert=4, pipeline=2), 4, 4),
        (Layout(16, expert=4, pipeline=2), 8, 8),
        (Layout(16, expert=4, pipeline=2), 2, 4),  # fewer would not show it
        (Layout(4, expert=2), 8, 4),
    ],
)
def test_how_many_processes_a_self_test_takes(layout, at_most, best):
    assert best_ranks(layout, at_most) == best


@pytest.mark.parametrize(
    ("layout", "ranks", "experts", "expected"),
    [
        (Layout(16, expert=8), 16, 8, Layout(16, expert=8)),
        (Layout(16, expert=8), 2, 8, Layout(2, expert=2)),
        (Layout(16, expert=8), 4, 8, Layout(4, expert=2)),  # and two replicas, as the run has
        (Layout(8, expert=8), 4, 8, Layout(4, expert=4)),
        (Layout(16, expert=8), 4, 1, Layout(4, expert=1)),
        (Layout(16, expert=8), 1, 8, Layout(1, expert=1)),
        (Layout(6, expert=3), 2, 6, Layout(2, expert=2)),
        (Layout(16, expert=4, pipeline=2), 4, 8, Layout(4, expert=2, pipeline=2)),
        (Layout(8, expert=2, tensor=4), 4, 8, Layout(4, expert=2, tensor=2)),
        (Layout(8, tensor=2, pipeline=2), 2, 8, Layout(2, tensor=2)),
        (Layout(8), 2, 8, Layout(2)),
    ],
)
def test_a_shrunk_layout(layout, ranks, experts, expected):
    assert shrunk(layout, ranks, experts) == expected


def test_every_shrunk_layout_is_one():
    for ranks in (1, 2, 3, 4, 6, 8, 12):
        for expert in (0, 1, 2, 4, 8):
            for tensor in (1, 2, 4):
                for pipeline in (1, 2):
                    small = shrunk(Layout(16, expert, tensor, 1, pipeline), ranks, 8)
                    assert small.ranks == ranks and small.data * small.tensor * small.pipeline == ranks
                    assert (small.expert > 0) == (expert > 0)
                    sharing = small.ranks // (small.tensor * small.pipeline)
                    assert not expert or 8 % small.expert == sharing % small.expert == 0, small


def test_a_layout_is_what_the_json_says():
    config = {"zero_optimization": {"stage": 1}, "expert_parallel": {"enabled": True, "autoep_size": 4}}
    config["pipeline"] = {"stages": 2}
    layout = layout_of(config, 16)
    assert layout == Layout(16, expert=4, pipeline=2) and layout.data == 8
    assert layout.describe() == "16 processes, EP 4, PP 2"
    small = Layout(4, expert=2, pipeline=2)
    assert layout_of(with_layout(config, small), 4) == small
    assert layout_of(with_layout(config, Layout(2)), 2) == Layout(2)
