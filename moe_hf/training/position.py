"""How much of the data a run has seen."""

from torch.utils.data import Dataset
from transformers import TrainingArguments
from transformers.trainer_utils import has_length

from ..errors import ConfigError


class DataPosition:
    """Counts the rows that all ranks have trained on, in the order of the data.

    Rows with which the last batch of an epoch is filled up are not counted, and rows that it drops are: after each
    epoch the position is a multiple of the number of rows. So it says where to go on, whatever the batch size.

    Args:
        dataset: rows of one epoch; where their number is not known, all that were read count.
        args: of the run.
        num_readers: ranks that read different rows; all of them without a number.

    Attributes:
        samples_seen: the position.
        global_batch_size: rows of one whole optimizer step, over all ranks and accumulated micro-batches.
    """

    def __init__(self, dataset: Dataset | None, args: TrainingArguments, num_readers: int | None = None) -> None:
        self._rows_of_epoch = len(dataset) if dataset is not None and has_length(dataset) else None
        self._num_readers = num_readers or args.world_size
        self._read = 0
        self.samples_seen = 0
        self.global_batch_size = args.train_batch_size * args.gradient_accumulation_steps * self._num_readers

    def read(self, micro_batches: list[dict]) -> None:
        """Note what this rank has read for one optimizer step; all ranks read as many rows."""
        self._read = self._num_readers * sum(len(batch["input_ids"]) for batch in micro_batches)

    def step(self, ends_epoch: bool) -> None:
        """Count the step that was made of what was read last."""
        after = self.samples_seen + self._read
        if self._rows_of_epoch:
            end = (self.samples_seen // self._rows_of_epoch + 1) * self._rows_of_epoch
            after = end if ends_epoch else min(after, end)
        self.samples_seen = after

    def steps_of_this_size(self, steps_per_epoch: int, otherwise: int) -> int:
        """Return how many of this run's steps the position is worth, `otherwise` where an epoch has no known end."""
        if not self._rows_of_epoch:
            return otherwise
        epochs, rows = divmod(self.samples_seen, self._rows_of_epoch)
        return epochs * steps_per_epoch + rows // self.global_batch_size

    def place(self, accumulation_steps: int) -> tuple[int, int]:
        """Return what `place_in_data` says of this position and this run's batches."""
        return place_in_data(self.samples_seen, self._rows_of_epoch, self.global_batch_size, accumulation_steps)


def place_in_data(
    samples_seen: int, rows_of_epoch: int | None, global_batch_size: int, accumulation_steps: int
) -> tuple[int, int]:
    """Return how many epochs are over, and how many micro-batches of the next one each rank has to skip.

    Args:
        samples_seen: as `DataPosition` counts them, by this run or one before it.
        rows_of_epoch: `None` for a stream without an end.
        global_batch_size: rows of one optimizer step of this run.
        accumulation_steps: micro-batches of one optimizer step of this run.

    Raises:
        ConfigError: this run's steps would begin in the middle of what was seen.
    """
    epochs, rows = divmod(samples_seen, rows_of_epoch) if rows_of_epoch else (0, samples_seen)
    if rows % global_batch_size:
        raise ConfigError(
            f"The checkpoint stopped {rows} rows into an epoch, which is not a multiple of this run's "
            f"{global_batch_size} rows for each step; change --gradient_accumulation_steps or "
            "--per_device_train_batch_size so that it is, and no row is repeated or skipped."
        )
    return epochs, rows // global_batch_size * accumulation_steps
