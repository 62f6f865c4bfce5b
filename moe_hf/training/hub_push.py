"""Pushing from training: whole exports, from rank 0, while the other ranks and the next steps go on.

`Trainer` would push the output folder, which holds checkpoints and logs; what belongs on the hub is its export.
"""

import argparse
import os
import shutil
import sys
import tempfile
import threading
from pathlib import Path

from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging

from ..checkpoint.hub import (
    Pushed,
    PushError,
    check_repository,
    open_repository,
    push_export,
    push_staged,
    stage_export,
)
from ..errors import ConfigError, UserError

logger = logging.get_logger(__name__)

_STAGING_PREFIX = ".push-"


def check_hub_arguments(namespace: argparse.Namespace) -> None:
    """Refuse flags of the hub that contradict each other or have no effect; asks nothing of the hub.

    Raises:
        ConfigError: a strategy that pushes checkpoints, a name of another form than ORG/NAME, or nothing to push.
    """
    if not namespace.push_to_hub:
        if namespace.hub_model_id is not None:
            raise ConfigError(f"--hub_model_id {namespace.hub_model_id} has no effect without --push_to_hub.")
        return
    if not namespace.do_train:
        raise ConfigError("--push_to_hub pushes what was trained; add --do_train, or run: moe-hf push DIR ORG/NAME.")
    strategy = str(getattr(namespace.hub_strategy, "value", namespace.hub_strategy))
    if strategy not in (HubStrategy.END.value, HubStrategy.EVERY_SAVE.value):
        raise ConfigError(
            f"hub_strategy={strategy} is not supported, because only whole models are pushed; use end or every_save."
        )
    if namespace.hub_model_id is None:
        raise ConfigError("--push_to_hub does not say where to; add --hub_model_id ORG/NAME.")
    check_repository(namespace.hub_model_id)
    if namespace.hub_token and "RANK" in os.environ and any(namespace.hub_token in word for word in sys.argv):
        raise ConfigError(
            "--hub_token is printed by the launcher with its command line; set HF_TOKEN, or run hf auth login."
        )


class HubPusher:
    """Pushes the exports of one run; lives on rank 0.

    Args:
        args: with `hub_model_id`, `hub_strategy`, `hub_private_repo`, `hub_revision`, `hub_always_push`, `hub_token`.
    """

    def __init__(self, args: TrainingArguments) -> None:
        self._args = args
        self._output_dir = Path(args.output_dir)
        self._running: threading.Thread | None = None

    def open(self) -> None:
        """Create the repository, so that a wrong name or login is known before training and not after it.

        Raises:
            PushError: the hub does not let us write there.
        """
        for left in self._output_dir.glob(f"{_STAGING_PREFIX}*"):  # by a run that was killed
            shutil.rmtree(left, ignore_errors=True)
        where = self._where()
        open_repository(where.pop("repo_id"), **where)

    def push_checkpoint(self, folder: Path, step: int) -> None:
        """Push the export of a checkpoint in the background; a failure is a warning, since the next push has it all.

        Args:
            folder: of the export; it may be deleted as soon as this returns.
            step: for the commit's summary.
        """
        if self._args.hub_strategy != HubStrategy.EVERY_SAVE:
            return
        if self._running is not None and self._running.is_alive() and not self._args.hub_always_push:
            logger.warning(f"Step {step} is not pushed to the hub: an earlier push is still under way.")
            return
        try:
            staging = self._stage(folder)
        except (UserError, OSError) as error:
            logger.warning(f"Step {step} is not pushed to the hub: {error}")
            return
        # A daemon: a run that is told to make room must not wait for an upload.
        self._running = threading.Thread(
            target=self._push_and_remove, args=(self._running, staging, step), name="hub-push", daemon=True
        )
        self._running.start()

    def push(self, folder: Path) -> Pushed:
        """Push the final export and wait until it is there.

        Raises:
            PushError: it is not; the export itself stays where it is.
        """
        if self._running is not None:
            self._running.join()
        try:
            pushed = push_export(folder, commit_message="End of training", **self._where())
        except PushError as error:
            repo_id = self._args.hub_model_id
            raise PushError(
                f"{str(error).rstrip('.')}; the finished export is {folder}, and is pushed by: "
                f"moe-hf push {folder} {repo_id}."
            ) from None
        print(f"pushed {len(pushed.files)} files to {pushed.url}, commit {pushed.commit}", flush=True)
        return pushed

    def _where(self) -> dict:
        return {
            "repo_id": self._args.hub_model_id,
            "private": self._args.hub_private_repo,
            "revision": self._args.hub_revision,
            "token": self._args.hub_token,
        }

    def _stage(self, folder: Path) -> Path:
        staging = Path(tempfile.mkdtemp(prefix=_STAGING_PREFIX, dir=self._output_dir))
        try:
            stage_export(folder, staging, repo_id=self._args.hub_model_id, outlives_folder=True)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        return staging

    def _push_and_remove(self, earlier: threading.Thread | None, staging: Path, step: int) -> None:
        if earlier is not None:
            earlier.join()
        try:
            push_staged(staging, commit_message=f"Training in progress, step {step}", **self._where())
        except UserError as error:
            logger.warning(f"Step {step} is not pushed to the hub: {error}")
        finally:
            shutil.rmtree(staging, ignore_errors=True)
