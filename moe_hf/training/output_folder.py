"""What an earlier run has left in the output folder: refused, resumed, or deleted."""

import argparse
import re
import shutil
from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint

from ..checkpoint.topology import Topology, check_resumable
from ..configuration_moe import MoEConfig
from ..errors import ConfigError
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
            resume_from = get_last_checkpoint(str(output_dir)) if output_dir.is_dir() else None
            if resume_from is None:
                raise ConfigError(f"--resume_from_checkpoint: there is no checkpoint-N in {output_dir}.")
        check_resumable(Path(resume_from), topology, config)
        return resume_from
    held = [*_left_by_earlier_run(output_dir), *sorted(output_dir.glob("*.safetensors"))]
    if namespace.do_train and not namespace.overwrite_output_dir and held:
        raise ConfigError(
            f"--output_dir {output_dir} already holds {held[0].name}; give another folder, continue with "
            "--resume_from_checkpoint, or say --overwrite_output_dir to delete what an earlier run has left."
        )
    return None


def remove_earlier_run(output_dir: Path) -> None:
    """Delete what a run writes, and nothing that the user may have put beside it."""
    for path in _left_by_earlier_run(output_dir):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _left_by_earlier_run(output_dir: Path) -> list[Path]:
    if not output_dir.is_dir():
        return []
    left = [path for path in output_dir.iterdir() if _LEFT_BY_A_RUN.fullmatch(path.name)]
    return sorted(left, key=lambda path: (path.is_file(), path.name))
