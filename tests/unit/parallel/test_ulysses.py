"""How a batch is cut; what attention makes of the pieces is shown by ranks (distributed/test_sequence_parallel.py)."""

from types import SimpleNamespace

import pytest
import torch
from small import small_config

from moe_hf import MoEForCausalLM
from moe_hf.parallel import ulysses
from moe_hf.training.sequence_parallel import SequenceParallelTrainer

BATCH = {
    "input_ids": torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 0, 0]]),
    "labels": torch.tensor([[5, -100, 7, 8, 9, 10], [11, 12, 13, 14, -100, -100]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]),
}
PACKED = {
    "input_ids": torch.arange(12).reshape(2, 6),
    "labels": torch.arange(12).reshape(2, 6),
    "position_ids": torch.tensor([[0, 1, 0, 1, 2, 3], [0, 1, 2, 3, 0, 1]]),
}


@pytest.fixture
def pieces(monkeypatch):
    """Function from a batch to the pieces of so many ranks."""

    def of(batch: dict, size: int) -> list[dict]:
        monkeypatch.setattr(ulysses.dist, "get_world_size", lambda group: size)
        cuts = []
        for rank in range(size):
            monkeypatch.setattr(ulysses.dist, "get_rank", lambda group, rank=rank: rank)
            cuts.append(ulysses.cut(batch, None))
        return cuts

    return of


@pytest.mark.parametrize("size", [2, 3])
def test_pieces_join_to_the_batch(pieces, size):
    of_ranks = pieces(BATCH, size)
    joined = {name: torch.cat([piece[name] for piece in of_ranks], dim=1) for name in of_ranks[0] if name[-1] != "e"}
    for name, tensor in BATCH.items():
        assert torch.equal(joined[name], tensor)
    assert joined["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    # The last label of a piece is the first token of the next.
    assert joined["shift_labels"].tolist() == [[-100, 7, 8, 9, 10, -100], [12, 13, 14, -100, -100, -100]]
    for piece in of_ranks:
        assert all(piece[name].shape == (2, 6 // size) and piece[name].is_contiguous() for name in joined)
        assert piece["shared_sequence"].attention_mask is BATCH["attention_mask"]


def test_documents_keep_their_positions(pieces):
    for rank, piece in enumerate(pieces(PACKED, 2)):
        assert torch.equal(piece["position_ids"], PACKED["position_ids"][:, 3 * rank : 3 * rank + 3])
        assert piece["shared_sequence"].position_ids is PACKED["position_ids"]
        assert piece["shared_sequence"].attention_mask is None and "attention_mask" not in piece


@pytest.mark.parametrize("implementation", ["sdpa", "flash_attention_2"])
def test_flash_attention_is_told_of_all_documents(pieces, monkeypatch, implementation):
    pieces(PACKED, 2)
    config = SimpleNamespace(_attn_implementation=implementation)
    accelerator = SimpleNamespace(unwrap_model=lambda model: SimpleNamespace(config=config))
    trainer = SimpleNamespace(accelerator=accelerator, model=None, _sequence_group=None)
    piece = SequenceParallelTrainer._cut(trainer, PACKED)
    if implementation == "sdpa":
        assert "cu_seq_lens_q" not in piece
    else:
        assert piece["cu_seq_lens_q"].tolist() == piece["cu_seq_lens_k"].tolist() == [0, 2, 6, 10, 12]
        assert piece["max_length_q"] == 4


@pytest.mark.parametrize("skip_logits", [True, False])
def test_labels_of_pieces_are_not_shifted_again(pieces, skip_logits):
    """Each loss is a sum over its labels; without attention over the border, here between documents, they add up."""
    torch.manual_seed(0)
    model = MoEForCausalLM(small_config(router_balancing="none", router_z_loss_coef=0.0)).eval()
    batch = {name: tensor[:1] for name, tensor in PACKED.items()} | {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}
    whole = model(**batch, skip_logits=skip_logits, num_items_in_batch=5, use_cache=False).loss
    parts = [
        model(
            **{name: value for name, value in piece.items() if name != "shared_sequence"},
            skip_logits=skip_logits,
            num_items_in_batch=5,
            use_cache=False,
        ).loss
        for piece in pieces(batch, 2)
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_repeated_heads_of_keys_are_repeated_in_shared_rows_only():
    """Ulysses tells the module that its rank has fewer groups, and the module attends by itself again afterwards."""
    sequence = ulysses.UlyssesSequence(None, None, torch.arange(6).expand(2, 6))
    seen = []

    def attend_with_half_the_groups(module, query, key, value, mask, **kwargs):
        seen.append(mask)
        module.num_key_value_groups = 2
        return torch.arange(2.0 * 3 * 32).reshape(2, 3, 32), None

    sequence._ulysses, sequence._mask = attend_with_half_the_groups, "whole"
    module, query = SimpleNamespace(num_key_value_groups=4), torch.zeros(2, 4, 3, 8)
    output, _ = sequence.attend(None, module, query, query[:, :1], query[:, :1], "of the piece")
    assert module.num_key_value_groups == 4 and seen == ["whole"]
    assert output.shape == (2, 3, 4, 8) and torch.equal(output[1, 2, 3], torch.arange(184.0, 192.0))
