"""Rows of tokens to one batch of tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..errors import DataError
from ..language_head import IGNORED_LABEL


@dataclass
class CausalLMCollator:
    """Stack rows, padding on the right where they differ in length.

    Packed blocks come out without an `attention_mask`: they have no padding, and only without a mask does the model
    read the borders of documents from `position_ids`.

    Args:
        pad_token_id (`int`): Fills `input_ids`; its labels are ignored, so any id of the vocabulary will do.
        pad_to_multiple_of (`int`, *optional*): Round the padded length up to a multiple of this.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, torch.Tensor]:
        """Collate rows that all have the same columns.

        Args:
            rows (`Sequence[Mapping]`): `input_ids` and, optionally, `attention_mask`, `labels`, `position_ids`, each
                with one integer per token. Missing labels are the tokens themselves, -100 where the mask is 0.

        Returns:
            `dict[str, torch.Tensor]`: `input_ids` and `labels`, and `attention_mask` and `position_ids` as described
            above, each `torch.LongTensor` of shape `(batch_size, sequence_length)`.

        Raises:
            DataError: Rows with `position_ids`, but without a mask, differ in length.
        """
        lengths = [len(row["input_ids"]) for row in rows]
        width = self._padded_length(max(lengths))
        names = [name for name in ("input_ids", "attention_mask", "labels", "position_ids") if name in rows[0]]
        filler = {"input_ids": self.pad_token_id, "labels": IGNORED_LABEL, "attention_mask": 0, "position_ids": 0}
        batch = {name: _stack([row[name] for row in rows], width, filler[name]) for name in names}
        if "attention_mask" not in batch and min(lengths) < width:
            if "position_ids" in batch:
                raise DataError(
                    f"rows with position_ids have {min(lengths)} to {width} tokens: the mask that padding needs would "
                    "hide the borders of documents; give rows of one length, or leave out position_ids"
                )
            batch["attention_mask"] = _stack([[1] * length for length in lengths], width, 0)
        if "labels" not in batch:
            batch["labels"] = batch["input_ids"].clone()
            if "attention_mask" in batch:
                batch["labels"].masked_fill_(batch["attention_mask"] == 0, IGNORED_LABEL)
        return batch

    def _padded_length(self, longest: int) -> int:
        multiple = self.pad_to_multiple_of or 1
        return -(-longest // multiple) * multiple


def _stack(rows: Sequence[Sequence[int]], width: int, filler: int) -> torch.Tensor:
    stacked = np.full((len(rows), width), filler, dtype=np.int64)
    for i, row in enumerate(rows):
        stacked[i, : len(row)] = row
    return torch.from_numpy(stacked)
