"""When flash attention is chosen, what is said where it cannot be, and that packed documents stay apart under it."""

import json
from itertools import pairwise

import pytest
import torch
from small import flags, make_rows, recipe, save_small_model, small_config
from transformers import modeling_flash_attention_utils as flash_utils

from moe_hf.errors import ConfigError
from moe_hf.parallel.failure import FailureRelay
from moe_hf.training import flash_attention
from moe_hf.training.flash_attention import choose_attention, document_bounds
from moe_hf.training.run import build_trainer

AMPERE, TURING, HOPPER, BLACKWELL = (8, 0), (7, 5), (9, 0), (10, 0)


@pytest.fixture
def machine(monkeypatch):
    """Function that makes this a machine with a GPU of some capability, or none, and with some of the packages."""

    def make(capability: tuple[int, int] | None, *packages: str) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        two, three = ("flash_attention_2" in packages), ("flash_attention_3" in packages)
        monkeypatch.setattr(flash_attention, "is_flash_attn_2_available", lambda: two)
        monkeypatch.setattr(flash_attention, "is_flash_attn_3_available", lambda: three)
        installed = {"flash_attention_2": lambda: two, "flash_attention_3": lambda: three}
        monkeypatch.setattr(flash_attention, "_IS_INSTALLED", installed)
        monkeypatch.setattr(flash_attention, "is_kernels_available", lambda: "kernels" in packages)

    return make


@pytest.mark.parametrize(
    ("capability", "packages", "in_16_bits", "changes", "chosen"),
    [
        (None, ["flash_attention_2"], True, {}, "sdpa"),
        (AMPERE, [], True, {}, "sdpa"),
        (AMPERE, ["flash_attention_2"], True, {}, "flash_attention_2"),
        (AMPERE, ["flash_attention_2"], False, {}, "sdpa"),
        (TURING, ["flash_attention_2"], True, {}, "sdpa"),
        (HOPPER, ["flash_attention_2", "flash_attention_3"], True, {}, "flash_attention_3"),
        (HOPPER, ["flash_attention_2", "flash_attention_3"], True, {"attention_dropout": 0.1}, "flash_attention_2"),
        (AMPERE, ["flash_attention_2", "flash_attention_3"], True, {}, "flash_attention_2"),
        (BLACKWELL, ["flash_attention_2", "flash_attention_3"], True, {}, "flash_attention_2"),
        (AMPERE, ["flash_attention_2"], True, {"head_dim": 12}, "sdpa"),
        (AMPERE, ["flash_attention_2"], True, {"head_dim": 264}, "sdpa"),
        # With the package that fetches kernels nothing is chosen that nobody asked for.
        (AMPERE, ["kernels"], True, {}, "sdpa"),
    ],
)
def test_the_best_that_fits_is_chosen(capability, packages, in_16_bits, changes, chosen, machine):
    machine(capability, *packages)
    assert choose_attention(None, small_config(**changes), in_16_bits) == chosen


def test_what_is_asked_for_wins(machine):
    machine(HOPPER, "flash_attention_2", "flash_attention_3")
    for asked in ("sdpa", "eager", "flash_attention_2", "flex_attention"):
        assert choose_attention(asked, small_config(), in_16_bits=True) == asked
    machine(AMPERE, "kernels")
    assert choose_attention("flash_attention_2", small_config(), in_16_bits=True) == "flash_attention_2"


@pytest.mark.parametrize(
    ("asked", "capability", "packages", "in_16_bits", "sentence"),
    [
        ("flash_attention_2", AMPERE, [], True, r"needs flash-attn: pip install 'moe_hf\[flash-attn\]', or use sdpa"),
        ("flash_attention_3", HOPPER, ["flash_attention_2"], True, "needs flash-attn-3, which is not installed"),
        ("flash_attention_2", None, ["flash_attention_2"], True, "needs a GPU and torch sees none; use sdpa"),
        ("flash_attention_2", AMPERE, ["flash_attention_2"], False, "in 16 bits only; add --bf16 or --fp16"),
    ],
)
def test_what_cannot_work_is_one_sentence(asked, capability, packages, in_16_bits, sentence, machine):
    machine(capability, *packages)
    with pytest.raises(ConfigError, match=f"^--attn_implementation {asked} .*{sentence}"):
        choose_attention(asked, small_config(), in_16_bits)


def test_the_sentence_comes_before_the_run(tmp_path):
    words = ["--config_name", "quickstart", "--do_train", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ConfigError, match="needs a GPU"):
        build_trainer([*words, "--attn_implementation", "flash_attention_2", "--bf16"], FailureRelay())


def test_bounds_are_those_of_the_documents_of_all_rows():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5], [0, 0, 1, 2, 3, 0]])
    bounds = document_bounds({"input_ids": positions, "position_ids": positions})
    assert bounds["cu_seq_lens_q"].tolist() == bounds["cu_seq_lens_k"].tolist() == [0, 3, 5, 6, 12, 13, 17, 18]
    assert bounds["cu_seq_lens_q"].dtype == torch.int32
    assert bounds["max_length_q"] == bounds["max_length_k"] == 6
    # Rows may begin anywhere in a document.
    assert document_bounds({"position_ids": torch.tensor([[7, 8, 0], [8, 9, 10]])})["cu_seq_lens_q"].tolist() == [
        0,
        2,
        3,
        6,
    ]


def test_padded_rows_and_plain_ones_have_no_bounds():
    ids = torch.ones(2, 4, dtype=torch.int64)
    assert document_bounds({"input_ids": ids}) == {}
    assert document_bounds({"input_ids": ids, "position_ids": ids, "attention_mask": ids}) == {}


def slow_flash(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
    """Attend within each row `(B, S, heads, D)` by the formula; what the package's function of this name returns."""
    rows = [attend_causally(*row, softmax_scale) for row in zip(q, k, v, strict=True)]
    return torch.stack(rows)


def slow_flash_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False
):
    """Attend within each of the pieces of `(tokens, heads, D)` by the formula."""
    ends = cu_seqlens_q.tolist()
    assert ends[-1] == len(q) and max_seqlen_q == max(b - a for a, b in pairwise(ends))
    pieces = [attend_causally(q[a:b], k[a:b], v[a:b], softmax_scale) for a, b in pairwise(ends)]
    return torch.cat(pieces)


def attend_causally(q, k, v, scale):
    """Return `(S, heads, D)`."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    past = torch.ones(len(q), len(q)).tril().bool()
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~past, float("-inf")).softmax(-1), v)


def losses_of_packed_run(folder, name: str) -> list[float]:
    """Train and evaluate on rows packed by document, two in a batch."""
    words = {"model_name_or_path": folder / "model", "train_file": folder / "text.jsonl", "output_dir": folder / name}
    words |= {"validation_file": folder / "text.jsonl", "packing": "documents", "do_eval": True, "block_size": 16}
    trainer = build_trainer(
        flags(recipe([]), 2, **words, max_eval_samples=5, per_device_eval_batch_size=2), FailureRelay()
    )
    if name == "flash":
        trainer.model.config._attn_implementation = "flash_attention_2"
    trainer.train()
    trainer.evaluate()
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines for key in ("loss", "eval_loss") if key in line]


def test_packed_documents_stay_apart_in_batches_of_several_rows(tmp_path, monkeypatch, no_state_of_earlier_runs):
    """The kernels are replaced by their formula; what calls them is Transformers' own."""
    save_small_model(tmp_path / "model")
    texts = [" ".join(f"w{token}" for token in row["input_ids"]) for row in make_rows(30)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    expected = losses_of_packed_run(tmp_path, "sdpa")

    monkeypatch.setattr(flash_utils, "_loaded_implementation", "flash_attention_2")
    monkeypatch.setattr(flash_utils, "_flash_fn", slow_flash)
    monkeypatch.setattr(flash_utils, "_flash_varlen_fn", slow_flash_varlen)
    for name, value in (("_flash_with_kvcache_fn", None), ("_pad_fn", None), ("_unpad_fn", None)):
        monkeypatch.setattr(flash_utils, name, value, raising=False)
    processing = flash_utils._lazy_define_process_function(slow_flash_varlen)
    for name in ("_process_flash_kwargs_fn", "_process_with_kvcache_kwargs_fn"):
        monkeypatch.setattr(flash_utils, name, processing, raising=False)
    assert len(expected) == 7
    assert losses_of_packed_run(tmp_path, "flash") == pytest.approx(expected, rel=1e-5)
