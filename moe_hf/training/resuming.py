"""The checkpoint that a run goes on from: the one it names, or the newest whole one."""

import argparse
from pathlib import Path

import torch.distributed as dist

from ..checkpoint.manifest import EXPORT_NAME, checkpoints_of, read_manifest, resumed_part, verify
from ..checkpoint.resume import check_architecture, check_resumable, check_whole, with_offer, without_offer
from ..checkpoint.topology import Topology
from ..configuration_moe import MoEConfig
from ..errors import CheckpointError, ConfigError
from ..parallel.processes import rank, world_size
from .saving import restore_replaced

AUTO, NEWEST = "auto", "true"


class ResumeChoice:
    """Finds the checkpoint to resume from, in two steps.

    Before there is a process group, sizes are compared, which each process does by itself. Then all processes read the
    files together.

    Args:
        namespace: the parsed command line; `resume_from_checkpoint` is a folder, `true` for the newest whole checkpoint
            of the output folder, or `auto`, which starts anew where there is none.
        topology: layout of this run.
        config: its model.

    Raises:
        ConfigError: there is no checkpoint.
        CheckpointError: the checkpoint to resume from is torn, or of another layout or model.
    """

    def __init__(self, namespace: argparse.Namespace, topology: Topology, config: MoEConfig) -> None:
        self._wanted = namespace.resume_from_checkpoint
        self._topology, self._config = topology, config
        # With --reset_optimizer only the weights are used, and those from the export.
        self._part = "export" if namespace.reset_optimizer else None
        self._output_dir = Path(namespace.output_dir or "trainer_output")
        self._candidates: list[Path] = []
        self._passed_over: CheckpointError | None = None
        if self._wanted is None:
            if namespace.reset_optimizer:
                raise ConfigError("--reset_optimizer needs --resume_from_checkpoint, whose weights it starts from.")
        elif self._wanted.lower() in (AUTO, NEWEST):
            self._wanted = self._wanted.lower()
            self._candidates = self._newest_first()
        else:
            self._candidates = [Path(self._wanted)]
        if self._candidates:
            self._check(self._candidates[0])

    def verified(self) -> Path | None:
        """Return the first candidate of which every byte is as it was saved, or `None` (a collective call)."""
        for checkpoint in self._candidates:
            error = self._damage(checkpoint)
            if error is None:
                if self._passed_over is not None:
                    self._check(checkpoint)
                    _say(str(self._passed_over))
                if self._wanted in (AUTO, NEWEST):
                    _say(f"Resuming from {checkpoint}.")
                return checkpoint
            self._passed_over = self._passed_over or error
        if self._passed_over is not None and self._wanted != AUTO:
            if self._wanted == NEWEST:
                raise without_offer(self._passed_over)
            raise with_offer(self._passed_over, self._candidates[0])
        if self._wanted == AUTO:
            _say(f"{self._passed_over or f'There is no whole checkpoint in {self._output_dir}.'} Starting anew.")
        return None

    def _newest_first(self) -> list[Path]:
        """Return the checkpoints of the output folder that are whole as far as sizes tell."""
        restore_replaced(self._output_dir)
        checkpoints = checkpoints_of(self._output_dir)
        candidates = []
        for checkpoint in checkpoints:
            try:
                manifest = verify(checkpoint, checksums=False, part=self._part_of(checkpoint))
            except CheckpointError as error:
                if not candidates:
                    self._passed_over = self._passed_over or error
                continue
            if self._part is not None or not manifest.weights_only:
                candidates.append(checkpoint)
        if self._wanted == NEWEST and not candidates:
            if self._passed_over is not None:
                raise without_offer(self._passed_over)
            raise ConfigError(
                f"--resume_from_checkpoint true: there is no checkpoint-N in {self._output_dir} to go on from; "
                "auto starts anew where there is none."
            )
        return candidates

    def _part_of(self, checkpoint: Path) -> str:
        return self._part or resumed_part(read_manifest(checkpoint))

    def _check(self, checkpoint: Path) -> None:
        if self._part is None:
            check_resumable(checkpoint, self._topology, self._config)
            return
        if not checkpoint.is_dir():
            raise CheckpointError(f"There is no checkpoint at {checkpoint}; give a checkpoint-N folder.")
        check_whole(checkpoint, part=self._part)
        if not (checkpoint / EXPORT_NAME / "config.json").is_file():
            raise CheckpointError(f"{checkpoint} has no {EXPORT_NAME} folder, whose weights --reset_optimizer takes.")
        check_architecture(checkpoint, read_manifest(checkpoint), self._config)

    def _damage(self, checkpoint: Path) -> CheckpointError | None:
        """Read all files of a checkpoint, each rank a part of them; return what the lowest rank has found."""
        try:
            verify(checkpoint, part=self._part_of(checkpoint), share=(rank(), world_size()))
            error = None
        except CheckpointError as met:
            error = met
        errors = [error]
        if dist.is_initialized() and world_size() > 1:
            errors = [None] * world_size()
            dist.all_gather_object(errors, error)
        return next((error for error in errors if error is not None), None)


def _say(sentence: str) -> None:
    if rank() == 0:
        print(sentence, flush=True)
