"""The part of the Trainer that reads streams: each process its own part, and after a stop exactly the next rows."""

import argparse
from pathlib import Path

from torch.utils.data import DataLoader
from transformers import TrainingArguments

from ..data.arguments import DataArguments
from ..data.stream_position import has_position, read_position, write_position
from ..data.streaming import StreamLoader, TokenStream
from ..errors import CheckpointError, ConfigError
from .preemption import spare_workers
from .sequence_parallel import SequenceParallelTrainer


def check_streaming(namespace: argparse.Namespace, data_args: DataArguments, num_readers: int) -> None:
    """Refuse what does not go with an endless training set, before there is a process group.

    Args:
        namespace: of the command line.
        data_args: of the run.
        num_readers: processes that read rows of their own.

    Raises:
        ConfigError: Nobody says when to stop, or some processes would read more parts than others.
    """
    if not (data_args.streaming and namespace.do_train):
        return
    if namespace.max_steps <= 0:
        raise ConfigError("--streaming reads without end; say how long to train with --max_steps.")
    parts = data_args.streaming_partitions
    if parts is not None and parts % num_readers:
        raise ConfigError(
            f"streaming_partitions={parts} cannot be dealt out evenly to {num_readers} processes; use a multiple of "
            f"{num_readers}."
        )


def lay_out(
    stream: TokenStream, args: TrainingArguments, num_parts: int | None, num_readers: int | None = None
) -> None:
    """Divide a stream over the processes, into `num_parts` or as many as there are loader workers.

    Args:
        stream: to be divided.
        args: of the run.
        num_parts: parts of the stream.
        num_readers: processes that read different parts, by default all; as many in a row read the same.

    Raises:
        DataError: Nothing to begin with in a part of this process.
    """
    num_readers = num_readers or args.world_size
    num_parts = num_parts or num_readers * max(1, args.dataloader_num_workers)
    stream.set_layout(num_parts, args.process_index * num_readers // args.world_size, num_readers)
    if args.resume_from_checkpoint is None:
        stream.check_start()


class StreamingTrainer(SequenceParallelTrainer):
    """`Trainer` that reads a `TokenStream` as it is divided, and keeps the place in it in every checkpoint."""

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self._stream = self.train_dataset if isinstance(self.train_dataset, TokenStream) else None
        self._stream_loader: StreamLoader | None = None
        self._stream_states: dict[int, dict] = {}

    def get_train_dataloader(self) -> DataLoader:
        """As in `Trainer`, but Accelerate does not divide a stream once more."""
        if self._stream is None:
            return super().get_train_dataloader()
        self._stream_loader = StreamLoader(
            self._stream,
            self.data_collator,
            self._train_batch_size,
            self.args.dataloader_num_workers,
            device=self.args.device,
            pin_memory=self.args.dataloader_pin_memory,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            multiprocessing_context=self.args.dataloader_multiprocessing_context,
        )
        self._stream_loader.load_states(self._stream_states)
        spare_workers(self._stream_loader)
        return self._stream_loader

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self._stream_loader is not None:
            reader, num_readers = self._stream.reader
            if self.args.process_index == reader * self.args.world_size // num_readers:  # the first that reads it
                write_position(Path(output_dir), reader, self._stream, self._stream_loader.states)

    def _restore_stream(self, checkpoint: Path) -> None:
        """Let the stream go on where a checkpoint has stopped.

        Raises:
            UserError: The place cannot be found.
        """
        if self.args.ignore_data_skip:
            return
        if self._stream is not None:
            self._stream_states = read_position(checkpoint, self._stream, *self._stream.reader)
        elif has_position(checkpoint):
            raise CheckpointError(
                f"{checkpoint} was reading a stream, and its place means nothing to stored data; resume with "
                "--streaming, or begin the data anew with --ignore_data_skip."
            )

    def _run_epoch(self, **kwargs) -> None:
        checkpoint = kwargs["resume_from_checkpoint"]
        if self._stream is not None and checkpoint is not None:
            # The stream begins where it stopped: nothing is to be skipped. What is left is a part of the one epoch
            # that Trainer takes an endless data set for.
            self._load_rng_state(checkpoint)
            done = self.state.global_step / self.state.max_steps
            kwargs |= {"resume_from_checkpoint": None, "epoch": done}
        super()._run_epoch(**kwargs)
