"""Heat maps show each expert's load relative to the mean of its layer."""

import io

import numpy as np
import pytest
from matplotlib.colors import to_rgba
from metrics_files import MadeUpRun, write_run

from moe_hf.reporting.figures import heat_map
from moe_hf.reporting.heat_maps import draw_load_by_layer, draw_load_over_time, shown_layers, slice_times
from moe_hf.reporting.runs import read_runs
from moe_hf.reporting.style import time_axis

LOADS = np.array([[1.0, 2.0, 3.0, 2.0], [0.0, 0.0, 8.0, 0.0], [0.2, 0.2, 0.2, np.nan]])


def test_heat_map_draws_load_over_mean():
    figure = heat_map(LOADS, ["layer 1", "layer $3$", "layer_7"], "Load at step 200")
    axes = figure.axes[0]
    image = axes.images[0].get_array()
    np.testing.assert_allclose(image[0], [0.5, 1.0, 1.5, 1.0])
    assert image[1, 2] == 4 and (np.asarray(image[1, [0, 1, 3]]) < 0.01).all()
    np.testing.assert_allclose(image[2, :3], 1.0)
    assert image.mask[2].tolist() == [False, False, False, True]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["layer 1", "layer $3$", "layer_7"]
    assert axes.get_title(loc="left") == "Load at step 200"


def test_colours_are_centred_at_the_mean():
    image = heat_map(LOADS, ["a", "b", "c"], "").axes[0].images[0]
    less, mean, more, nothing = (image.cmap(image.norm(value)) for value in (0.5, 1.0, 2.0, 1e-9))
    assert min(mean[:3]) > 0.9  # white
    assert less[2] > less[0] and more[0] > more[2]  # blue, red
    assert nothing == to_rgba("black")
    assert image.norm(2.0) - image.norm(1.0) == pytest.approx(image.norm(1.0) - image.norm(0.5))


@pytest.mark.parametrize("shape", [(1, 2), (48, 128), (2, 256)])
def test_heat_map_of_any_size_is_a_picture(shape):
    figure = heat_map(np.ones(shape), [f"layer {i}" for i in range(shape[0])], "a title " * 20)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=50)
    assert file.getvalue().startswith(b"\x89PNG")


def test_one_panel_for_each_layer_and_an_even_choice_of_many(tmp_path):
    few, many = read_runs(
        [
            write_run(tmp_path / "few", MadeUpRun(num_entries=4, sparse_layers=(1, 3))),
            write_run(tmp_path / "many", MadeUpRun(num_entries=8, sparse_layers=tuple(range(10)), num_layers=10)),
        ]
    )
    assert shown_layers(few) == [1, 3] and shown_layers(many) == [0, 3, 6, 9]
    figure = draw_load_over_time([few, many], time_axis([few, many]))
    titles = [axes.get_title(loc="left") for axes in figure.axes if axes.get_title(loc="left")]
    assert titles == ["layer 1", "layer 3", "layer 0", "layer 3", "layer 6", "layer 9"]
    picture = figure.axes[0].collections[0].get_array()
    loads = few.training.loads[1]
    np.testing.assert_allclose(picture.data, np.clip(loads / loads.mean(axis=1, keepdims=True), 1 / 4, 4).T, rtol=1e-6)


def test_moments_are_the_same_for_all_and_a_shorter_run_has_ended(tmp_path):
    kinds = [MadeUpRun(num_entries=entries, sparse_layers=tuple(range(6)), num_layers=6) for entries in (9, 5)]
    runs = read_runs([write_run(tmp_path / str(number), kind) for number, kind in enumerate(kinds)])
    axis = time_axis(runs)
    # Entries 1, 3, 5, 7 and 9 of nine.
    np.testing.assert_allclose(slice_times(runs, axis), np.array([1, 3, 5, 7, 9]) * 655_360 / 1e6)
    rows = [row.axes for row in draw_load_by_layer(runs, axis).subfigs]
    assert [len(axes.images) for axes in rows[0][:5]] == [1, 1, 1, 1, 1]
    assert [len(axes.images) for axes in rows[1][:5]] == [1, 1, 1, 0, 0]
    loads = np.stack([of_layer[4] for of_layer in runs[1].training.loads.values()])
    expected = np.clip(loads / loads.mean(axis=1, keepdims=True), 1 / 4, 4)
    np.testing.assert_allclose(rows[1][2].images[0].get_array(), expected, rtol=1e-6)
