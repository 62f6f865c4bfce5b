"""What an earlier run has left in the output folder: refused, or deleted."""

import argparse
import re
import shutil
from pathlib import Path

from transformers import TrainerCallback

from ..checkpoint.manifest import EXPORT_NAME
from ..errors import ConfigError
from ..parallel.processes import raise_together
from .telemetry.images import IMAGES_NAME
from .telemetry.jsonlines import METRICS_NAME
from .telemetry.profiler import PROFILE_NAME

_LEFT_BY_A_RUN = re.compile(
    rf"checkpoint-\d+|\.checkpoint-\d+\.(incomplete|replaced)|{EXPORT_NAME}|{re.escape(METRICS_NAME)}|{IMAGES_NAME}|{PROFILE_NAME}"
    r"|trainer_state\.json|(train|eval|all)_results\.json"
)


def check_output_folder(namespace: argparse.Namespace) -> None:
    """Refuse to write over what an earlier run has left, unless this run goes on from there or is told to.

    Args:
        namespace: the parsed command line.

    Raises:
        ConfigError: the folder holds a checkpoint, an export or weights, or is no folder.
    """
    output_dir = Path(namespace.output_dir or "trainer_output")
    if output_dir.exists() and not output_dir.is_dir():
        raise ConfigError(f"--output_dir {output_dir} is a file; give a folder.")
    for flag in ("model_name_or_path", "tokenizer_name"):
        source = getattr(namespace, flag)
        if namespace.overwrite_output_dir and source and Path(source).resolve().is_relative_to(output_dir.resolve()):
            raise ConfigError(f"--overwrite_output_dir would delete --{flag} {source}; give another --output_dir.")
    if not namespace.do_train or namespace.overwrite_output_dir or namespace.resume_from_checkpoint is not None:
        return
    held = [*_left_by_earlier_run(output_dir), *sorted(output_dir.glob("*.safetensors"))]
    # Hidden ones are what a killed run has not finished writing; they are removed in any case.
    held = [path for path in held if not path.name.startswith(".")]
    if held:
        raise ConfigError(
            f"--output_dir {output_dir} already holds {held[0].name}; give another folder, continue with "
            "--resume_from_checkpoint auto, or say --overwrite_output_dir to delete what an earlier run has left."
        )


class RemoveEarlierRun(TrainerCallback):
    """Deletes what a run writes, and nothing that the user may have put beside it, when training really begins.

    By then the optimizer and all reporters exist: whatever could have failed has.
    """

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if args.should_save:
            for path in _left_by_earlier_run(Path(args.output_dir)):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise_together(None)


def _left_by_earlier_run(output_dir: Path) -> list[Path]:
    if not output_dir.is_dir():
        return []
    left = [path for path in output_dir.iterdir() if _LEFT_BY_A_RUN.fullmatch(path.name)]
    return sorted(left, key=lambda path: (path.is_file(), path.name))
