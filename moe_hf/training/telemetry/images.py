"""Heat maps of the experts' load while training: PNG files, and images in wandb and TensorBoard."""

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, WandbCallback
from transformers.utils import logging

from .loads import LatestLoads, Loads

if TYPE_CHECKING:
    from matplotlib.figure import Figure

IMAGES_NAME = "router_images"
_TAG = "router/expert_load"
_DOTS_PER_INCH = 150

logger = logging.get_logger(__name__)


class RouterImages(TrainerCallback):
    """Draw the load of all experts, layers × experts over the mean, every `router_image_steps` steps.

    A load is that since the last log entry, so an image is drawn with the first training entry at or after its step and
    is named by the step of the entry: `router_images/load-step-000200.png` in the output folder. Steps for which there
    is one entry only share an image.

    Args:
        loads: what is drawn.
        callbacks: the trainer's, the list itself; those of wandb and TensorBoard in it are given the images too.
    """

    def __init__(self, loads: LatestLoads, callbacks: list[TrainerCallback]) -> None:
        self._loads = loads
        self._callbacks = callbacks
        self._last_step = 0

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._last_step = state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if not logs or "loss" not in logs:
            return
        first, self._last_step = self._last_step + 1, state.global_step
        every, loads = args.router_image_steps, self._loads.of(logs)
        if not (state.is_world_process_zero and loads and every and self._last_step // every > (first - 1) // every):
            return
        figure = draw_loads(loads, f"Load of the experts over its mean, steps {first} to {self._last_step}")
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=_DOTS_PER_INCH)
        path = Path(args.output_dir) / IMAGES_NAME / f"load-step-{self._last_step:06d}.png"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png.getvalue())
        except OSError as error:
            logger.warning_once(f"{path.parent} cannot be written: {error.strerror}.")
        self._show(png, self._last_step)

    def _show(self, png: io.BytesIO, step: int) -> None:
        """Hand the image to the loggers that take images."""
        from PIL import Image

        image = Image.open(png).convert("RGB")
        for callback in self._callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                callback.tb_writer.add_image(_TAG, np.asarray(image), step, dataformats="HWC")
                callback.tb_writer.flush()
            elif isinstance(callback, WandbCallback):
                import wandb

                if wandb.run is not None:
                    # The step is a metric of its own there, as in WandbCallback.
                    wandb.run.log({_TAG: wandb.Image(image), "train/global_step": step})


def draw_loads(loads: Loads, title: str) -> "Figure":
    """Return the heat map of the loads of all layers, in the order of the layers."""
    # Here, because most runs draw none.
    from ...reporting.figures import heat_map

    names = sorted(loads, key=lambda name: int(name.removeprefix("layer_")))
    rows = np.array([loads[name] for name in names])
    return heat_map(rows, [name.replace("_", " ") for name in names], title)
