"""What an earlier run has left in the output folder: refused, resumed, or deleted."""

import argparse
import re
import shutil
from pathlib import Path

from transformers import TrainerCallback

from ..checkpoint.topology import Topology, check_resumable, is_whole
from ..configuration_moe import MoEConfig
from ..errors import ConfigError
from ..parallel.processes import raise_together, rank
from .metrics import METRICS_NAME
from .trainer import EXPORT_NAME

_LEFT_BY_A_RUN = re.compile(
    rf"checkpoint-\d+|{EXPORT_NAME}|{re.escape(METRICS_NAME)}|trainer_state\.json|(train|eval|all)_results\.json"
)


def checked_output_folder(namespace: argparse.Namespace, topology: Topology, config: MoEConfig) -> str | None:
    """Return the checkpoint to resume from, or `None`; refuse to write over what an earlier run has left.

    Args:
        namespace: the parsed command line.
        topology: layout of this run.
        config: its model.

    Raises:
        ConfigError: the folder holds a checkpoint, an export or weights, or is no folder.
        CheckpointError: the checkpoint to resume from is torn, or of another layout or model.
    """
    output_dir = Path(namespace.output_dir or "trainer_output")
    if output_dir.exists() and not output_dir.is_dir():
        raise ConfigError(f"--output_dir {output_dir} is a file; give a folder.")
    resume_from = namespace.resume_from_checkpoint
    if resume_from is not None:
        if resume_from.lower() == "true":
            resume_from = str(_newest_checkpoint(output_dir))
        check_resumable(Path(resume_from), topology, config)
        return resume_from
    for flag in ("model_name_or_path", "tokenizer_name"):
        source = getattr(namespace, flag)
        if namespace.overwrite_output_dir and source and Path(source).resolve().is_relative_to(output_dir.resolve()):
            raise ConfigError(f"--overwrite_output_dir would delete --{flag} {source}; give another --output_dir.")
    held = [*_left_by_earlier_run(output_dir), *sorted(output_dir.glob("*.safetensors"))]
    if namespace.do_train and not namespace.overwrite_output_dir and held:
        raise ConfigError(
            f"--output_dir {output_dir} already holds {held[0].name}; give another folder, continue with "
            "--resume_from_checkpoint, or say --overwrite_output_dir to delete what an earlier run has left."
        )
    return None


class RemoveEarlierRun(TrainerCallback):
    """Deletes what a run writes, and nothing that the user may have put beside it, when training really begins.

    By then the optimizer and all reporters exist: whatever could have failed has.
    """

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if args.should_save:
            for path in _left_by_earlier_run(Path(args.output_dir)):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise_together(None)


def _newest_checkpoint(output_dir: Path) -> Path:
    """Return the newest whole checkpoint, or the newest of all, whose fault is then told."""
    numbered = [path for path in output_dir.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    checkpoints = sorted(numbered, key=lambda path: -int(path.name.removeprefix("checkpoint-")))
    if not checkpoints:
        raise ConfigError(f"--resume_from_checkpoint: there is no checkpoint-N in {output_dir}.")
    chosen = next((path for path in checkpoints if is_whole(path)), checkpoints[0])
    if chosen != checkpoints[0] and rank() == 0:
        print(f"{checkpoints[0].name} is not whole; resuming from {chosen.name}.", flush=True)
    return chosen


def _left_by_earlier_run(output_dir: Path) -> list[Path]:
    if not output_dir.is_dir():
        return []
    left = [path for path in output_dir.iterdir() if _LEFT_BY_A_RUN.fullmatch(path.name)]
    return sorted(left, key=lambda path: (path.is_file(), path.name))
