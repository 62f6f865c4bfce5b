"""When heat maps are drawn, what is in them, and that wandb and TensorBoard really get them."""

import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import wandb
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import IMAGES, EventAccumulator
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, WandbCallback

from moe_hf.reporting import figures
from moe_hf.training.telemetry.images import RouterImages
from moe_hf.training.telemetry.loads import LatestLoads

LOADS = {"layer_10": [0.125, 0.125, 0.25, 0.5], "layer_2": [0.25, 0.25, 0.25, 0.25]}


class Run:
    """A run that logs every `logging_steps` steps and draws every `router_image_steps`."""

    def __init__(self, folder: Path, every: int, *, step: int = 0, is_main: bool = True, callbacks=()) -> None:
        self.folder = folder / "router_images"
        self.args = SimpleNamespace(output_dir=str(folder), router_image_steps=every)
        self.state = TrainerState(global_step=step, is_world_process_zero=is_main)
        self.loads = LatestLoads(LOADS, LOADS)
        self.images = RouterImages(self.loads, list(callbacks))
        self.images.on_train_begin(self.args, self.state, None)

    def log_until(self, last: int, logging_steps: int) -> "Run":
        while self.state.global_step < last:
            self.state.global_step += logging_steps
            self.log({"loss": 1.0})
        return self

    def log(self, logs: dict) -> None:
        self.images.on_log(self.args, self.state, None, logs=logs)

    @property
    def steps(self) -> list[int]:
        """Steps of the images, by their files' names."""
        return [
            int(path.name.removeprefix("load-step-").removesuffix(".png")) for path in sorted(self.folder.glob("*"))
        ]


def assert_same_picture(one: Image.Image, path: Path) -> None:
    np.testing.assert_array_equal(np.asarray(one.convert("RGB")), np.asarray(Image.open(path).convert("RGB")))


@pytest.fixture
def drawn(monkeypatch) -> list[tuple]:
    """What is handed to the drawing, which takes long and is not done."""
    calls = []

    def draw(loads, layer_names, title):
        calls.append((loads.tolist(), layer_names, title))
        return Figure(figsize=(1, 1))

    monkeypatch.setattr(figures, "heat_map", draw)
    return calls


@pytest.mark.parametrize(
    ("every", "logging_steps", "steps"),
    [
        (20, 10, [20, 40, 60]),
        (10, 10, [10, 20, 30, 40, 50, 60]),
        (20, 1, [20, 40, 60]),
        (25, 10, [30, 50]),  # step 25 is in the entry of step 30
        (4, 20, [20, 40, 60]),  # several of them are in one entry
        (100, 10, []),
        (0, 10, []),
    ],
)
def test_images_come_with_the_entry_at_or_after_their_step(tmp_path, drawn, every, logging_steps, steps):
    assert Run(tmp_path, every).log_until(60, logging_steps).steps == steps
    assert len(drawn) == len(steps)


def test_resumed_runs_keep_the_steps(tmp_path, drawn):
    """The entry of step 55 has no image: step 40 was before."""
    assert Run(tmp_path, 20, step=45).log_until(85, 10).steps == [65, 85]


def test_other_ranks_and_other_entries_draw_nothing(tmp_path, drawn):
    assert Run(tmp_path, 10, is_main=False).log_until(20, 10).steps == []
    run = Run(tmp_path, 10, step=9)
    run.state.global_step = 10
    for logs in ({"eval_loss": 1.0}, {"train_runtime": 1.0}, {}):
        run.log(logs)
    run.loads.train = None  # a dense model
    run.log({"loss": 1.0})
    assert run.steps == []


def test_image_shows_every_layer_in_order_with_the_steps_of_its_loads(tmp_path, drawn):
    Run(tmp_path, 20).log_until(40, 10)
    loads = [LOADS["layer_2"], LOADS["layer_10"]]
    assert drawn == [
        (loads, ["layer 2", "layer 10"], f"Load of the experts over its mean, steps {span}")
        for span in ("11 to 20", "31 to 40")
    ]


def test_png_is_an_image_that_differs_with_the_loads(tmp_path):
    Run(tmp_path, 10).log_until(10, 10)
    other = Run(tmp_path / "other", 10)
    other.loads.train = {"layer_2": [0.25] * 4, "layer_10": [0.25] * 4}
    other.log_until(10, 10)
    pixels = [
        np.asarray(Image.open(folder / "router_images" / "load-step-000010.png").convert("RGB"))
        for folder in (tmp_path, tmp_path / "other")
    ]
    assert pixels[0].shape == pixels[1].shape and min(pixels[0].shape[:2]) > 100
    assert (pixels[0] != pixels[1]).any()


def test_training_does_not_die_of_an_image_that_cannot_be_written(tmp_path, drawn):
    (tmp_path / "router_images").write_text("a file")
    Run(tmp_path, 10).log_until(20, 10)


def test_tensorboard_holds_the_images(tmp_path):
    callback = TensorBoardCallback(SummaryWriter(tmp_path / "events"))
    Run(tmp_path, 20, callbacks=[callback]).log_until(40, 10)
    callback.on_train_end(None, None, None)
    events = EventAccumulator(str(tmp_path / "events"), size_guidance={IMAGES: 0}).Reload()
    images = events.Images("router/expert_load")
    assert [image.step for image in images] == [20, 40]
    shown = Image.open(io.BytesIO(images[0].encoded_image_string)).convert("RGB")
    assert_same_picture(shown, tmp_path / "router_images" / "load-step-000020.png")


def test_tensorboard_without_a_writer_gets_nothing(tmp_path, drawn):
    """On other ranks there is none, and after training it is closed."""
    assert Run(tmp_path, 10, callbacks=[TensorBoardCallback()]).log_until(10, 10).steps == [10]


def test_wandb_offline_holds_the_images(tmp_path, wandb_folder):
    callback = WandbCallback()
    args = TrainingArguments(str(tmp_path / "out"), report_to=[], use_cpu=True)
    callback.setup(args, TrainerState(is_world_process_zero=True), model=None)
    Run(tmp_path, 20, callbacks=[callback]).log_until(40, 10)
    wandb.finish()
    images = list(wandb_folder.glob("offline-run-*/files/media/images/router/expert_load_*.png"))
    images.sort(key=lambda path: int(path.name.split("_")[2]))  # expert_load_N_HASH.png, N its place in the history
    for image, drawn in zip(images, sorted((tmp_path / "router_images").glob("*.png")), strict=True):
        assert_same_picture(Image.open(image), drawn)


def test_wandb_without_a_run_gets_nothing(tmp_path, drawn):
    assert Run(tmp_path, 10, callbacks=[WandbCallback()]).log_until(10, 10).steps == [10]
