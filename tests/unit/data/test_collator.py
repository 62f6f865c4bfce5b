"""The collator: what is padding, what is a label, and when there is a mask."""

import numpy as np
import pytest
import torch

from moe_hf.data.collator import CausalLMCollator
from moe_hf.errors import DataError

PAD = 0


def test_rows_of_one_length_get_no_mask_and_are_their_own_labels():
    batch = CausalLMCollator(PAD)([{"input_ids": [5, PAD, 6]}, {"input_ids": [7, 8, PAD]}])
    assert set(batch) == {"input_ids", "labels"}
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    # The pad token occurs inside the text (it is often the eos token too), and there it is a label.
    assert batch["labels"].tolist() == batch["input_ids"].tolist() == [[5, PAD, 6], [7, 8, PAD]]


def test_shorter_rows_are_padded_on_the_right():
    batch = CausalLMCollator(PAD)([{"input_ids": [5, PAD]}, {"input_ids": [7, 8, 9]}])
    assert batch["input_ids"].tolist() == [[5, PAD, PAD], [7, 8, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [[5, PAD, -100], [7, 8, 9]]


def test_given_labels_and_mask_are_kept_and_padded():
    rows = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "attention_mask": [1, 1, 0]},
        {"input_ids": [8], "labels": [8], "attention_mask": [1]},
    ]
    batch = CausalLMCollator(PAD)(rows)
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 0, 0]]


def test_masked_tokens_are_no_labels():
    batch = CausalLMCollator(PAD)([{"input_ids": [5, 6], "attention_mask": [1, 0]}])
    assert batch["labels"].tolist() == [[5, -100]]


@pytest.mark.parametrize(("multiple", "width"), [(None, 5), (1, 5), (4, 8), (5, 5), (8, 8)])
def test_width_is_rounded_up_to_a_multiple(multiple, width):
    batch = CausalLMCollator(PAD, pad_to_multiple_of=multiple)([{"input_ids": [3] * 5}, {"input_ids": [3] * 2}])
    assert batch["input_ids"].shape == (2, width)
    assert batch["attention_mask"].sum(dim=1).tolist() == [5, 2]


def test_packed_documents_keep_their_positions_and_get_no_mask():
    rows = [{"input_ids": np.array([5, 6, 7]), "position_ids": [0, 1, 0], "labels": [-100, 6, -100]}]
    batch = CausalLMCollator(PAD)(rows)
    assert set(batch) == {"input_ids", "position_ids", "labels"}
    assert batch["position_ids"].tolist() == [[0, 1, 0]]


def test_packed_documents_of_unequal_length_are_refused():
    rows = [{"input_ids": [5, 6, 7], "position_ids": [0, 1, 0]}, {"input_ids": [5], "position_ids": [0]}]
    with pytest.raises(DataError, match="rows with position_ids have 1 to 3 tokens"):
        CausalLMCollator(PAD)(rows)
