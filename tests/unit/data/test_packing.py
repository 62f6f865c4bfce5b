"""Text to rows of tokens, through `build_datasets`; the expected rows are written out token by token."""

import json
from contextlib import contextmanager
from itertools import islice, takewhile
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.masking_utils import find_packed_sequence_indices

from moe_hf.data.arguments import DataArguments
from moe_hf.data.build import build_datasets, resolve_block_size
from moe_hf.data.streaming import TokenStream
from moe_hf.errors import DataError

# One token per character, so that everyone can count: "a" is 2, "b" is 3, ...
EOS, BOS = 0, 1
ALPHABET = "abcdefghijklmnopqrstuvwxyz \n"
IDS = {"<eos>": EOS, "<bos>": BOS} | {char: i + 2 for i, char in enumerate(ALPHABET)}
VOCAB_SIZE = len(IDS)
DOCUMENTS = ["abcde", "f", "ghijklmnopq", "rs", "tuv", "w", "xyz abc", "defg"]


def make_tokenizer(template: str = "$A", **special_tokens: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel(IDS, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<eos>", EOS), ("<bos>", BOS)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special_tokens)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """As with GPT-2, the eos token is also the padding."""
    return make_tokenizer(eos_token="<eos>", pad_token="<eos>")


@pytest.fixture
def build(tmp_path: Path, tokenizer):
    """Return a function that writes documents (or lines) to a file and builds the training rows from it.

    Of a stream, which has no end, it returns the rows of one epoch.
    """

    def build_rows(content, block_size: int = 4, use=tokenizer, vocab_size: int = VOCAB_SIZE, **kwargs):
        path = tmp_path / ("data.txt" if isinstance(content, str) else "data.jsonl")
        if isinstance(content, list):
            rows = (row if isinstance(row, dict) else {"text": row} for row in content)
            content = "".join(json.dumps(row) + "\n" for row in rows)
        content = content if isinstance(content, bytes) else content.encode()
        if not path.exists() or path.read_bytes() != content:  # the same file again may be read from the cache
            path.write_bytes(content)
        defaults = {
            "validation_split_percentage": 0,
            "cache_dir": str(tmp_path / "cache"),
        } | ({"streaming_shuffle_buffer": 0} if kwargs.get("streaming") else {})
        data_args = DataArguments(train_file=str(path), **(defaults | kwargs))
        train, _ = build_datasets(
            data_args, use, block_size=block_size, vocab_size=vocab_size, do_train=True, do_eval=False
        )
        return list(takewhile(lambda _: epoch_of(train) == 0, train)) if data_args.streaming else train

    return build_rows


def epoch_of(stream: TokenStream) -> int:
    """Return the epoch of the document that was read last."""
    return stream.current_states()[0]["documents"]["sources"][0]["epoch"]


def as_lists(rows) -> list[dict[str, list[int]]]:
    return [{name: [int(value) for value in values] for name, values in row.items()} for row in rows]


def tokens_of(text: str) -> list[int]:
    return [IDS[char] for char in text]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("append_eos", [False, True])
@pytest.mark.parametrize("block_size", [2, 4, 7, 30])
def test_blocks_are_the_joined_documents_cut(block_size, append_eos, streaming, build):
    joined = []
    for document in DOCUMENTS:
        joined += tokens_of(document)
        if append_eos:
            joined.append(EOS)
    expected = []
    while len(joined) >= block_size:
        expected.append({"input_ids": joined[:block_size]})
        joined = joined[block_size:]
    assert as_lists(build(DOCUMENTS, block_size, append_eos=append_eos, streaming=streaming)) == expected


@pytest.mark.parametrize("streaming", [False, True])
def test_documents_restart_positions_and_do_not_predict_each_other(streaming, build):
    block_size = 5
    tokens, document_of = [], []
    for number, document in enumerate(DOCUMENTS):
        for token in [*tokens_of(document), EOS]:
            tokens.append(token)
            document_of.append(number)
    rows = as_lists(build(DOCUMENTS, block_size, packing="documents", streaming=streaming))
    assert len(rows) == len(tokens) // block_size
    for i, row in enumerate(rows):
        ids = tokens[i * block_size : (i + 1) * block_size]
        documents = document_of[i * block_size : (i + 1) * block_size]
        positions, labels = [], []
        for j, document in enumerate(documents):
            is_first = j == 0 or documents[j - 1] != document
            positions.append(0 if is_first else positions[-1] + 1)
            labels.append(-100 if is_first else ids[j])
        assert row == {"input_ids": ids, "position_ids": positions, "labels": labels}
        # Transformers, which builds the attention mask from the positions, finds the same borders.
        found = find_packed_sequence_indices(torch.tensor([row["position_ids"]]))
        found = [0] * block_size if found is None else found[0].tolist()
        assert found == [document - documents[0] for document in documents]


@pytest.mark.parametrize("streaming", [False, True])
def test_pad_gives_each_document_its_own_row(streaming, build):
    rows = as_lists(build(["abc", "abcdefgh", "a"], block_size=5, packing="pad", streaming=streaming))
    a, b, c, d, e = tokens_of("abcde")
    assert rows == [
        # The document's own eos is a label, the padding with the same id is not.
        {"input_ids": [a, b, c, EOS, EOS], "attention_mask": [1, 1, 1, 1, 0], "labels": [a, b, c, EOS, -100]},
        {"input_ids": [a, b, c, d, e], "attention_mask": [1] * 5, "labels": [a, b, c, d, e]},
        {"input_ids": [a, EOS, EOS, EOS, EOS], "attention_mask": [1, 1, 0, 0, 0], "labels": [a, EOS, -100, -100, -100]},
    ]


@pytest.mark.parametrize("streaming", [False, True])
def test_lines_of_text_are_joined_as_they_are(streaming, build):
    text = "a title\n\n  some text\nmore text\n"
    # A tokenizer that begins texts with bos must not do so at every line.
    tokenizer = make_tokenizer("<bos> $A", eos_token="<eos>", bos_token="<bos>")
    rows = as_lists(build(text, 5, use=tokenizer, streaming=streaming))
    assert sum((row["input_ids"] for row in rows), []) == tokens_of(text)[: len(text) // 5 * 5]  # noqa: RUF017


def test_lines_of_text_are_documents_when_each_has_its_row(build):
    rows = as_lists(build("ab\n\ncd\n", 4, packing="pad"))
    assert [row["input_ids"] for row in rows] == [[*tokens_of("ab"), EOS, EOS], [*tokens_of("cd"), EOS, EOS]]


def test_short_lines_fill_long_blocks(build):
    """A thousand of these lines, the usual size of a batch, are less than one block."""
    text = "a\n" * 3000
    assert len(build(text, block_size=2500)) == len(build(text, block_size=2500, streaming=True)) == 2


def test_batches_lose_less_than_a_block_each_and_keep_the_order(build, monkeypatch):
    monkeypatch.setattr("moe_hf.data.packing._BLOCKS_PER_BATCH", 10)
    text = "".join(ALPHABET[i * i % 26] * (1 + i**3 % 7) + "\n" for i in range(1000))
    num_blocks = len(text) // 20
    rows = as_lists(build(text, block_size=20))
    assert 0.9 * num_blocks < len(rows) < num_blocks
    position = 0
    characters = {i: char for char, i in IDS.items()}
    for row in rows:
        block = "".join(characters[token] for token in row["input_ids"])
        found = text.index(block, position)
        assert found - position < 20
        position = found + 20


def test_several_processes_give_the_same_rows(build):
    alone = as_lists(build(DOCUMENTS * 3, packing="documents"))
    together = as_lists(build(DOCUMENTS * 3, packing="documents", preprocessing_num_workers=2, overwrite_cache=True))
    assert together == alone


def test_documents_without_text_disappear(build):
    rows = as_lists(build(["ab", "", " \n ", "c"], block_size=5))
    assert rows == [{"input_ids": [*tokens_of("ab"), EOS, *tokens_of("c"), EOS]}]


def test_line_breaks_at_the_end_of_a_document_belong_to_it(build):
    rows = as_lists(build(["a\n\n", "b"], block_size=6))
    assert rows == [{"input_ids": [*tokens_of("a\n\n"), EOS, *tokens_of("b"), EOS]}]


def test_eos_that_the_tokenizer_adds_is_not_doubled(build):
    tokenizer = make_tokenizer("<bos> $A <eos>", eos_token="<eos>", bos_token="<bos>")
    rows = as_lists(build(["ab", "c"], block_size=7, use=tokenizer))
    assert rows == [{"input_ids": [BOS, *tokens_of("ab"), EOS, BOS, *tokens_of("c"), EOS]}]


def test_missing_eos_is_refused_only_where_one_is_needed(build):
    tokenizer = make_tokenizer()
    with pytest.raises(DataError, match="append_eos=True needs an eos token"):
        build(DOCUMENTS, use=tokenizer)
    assert len(build(DOCUMENTS, use=tokenizer, append_eos=False)) > 0
    assert len(build("some text", use=tokenizer)) > 0


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("content", "kwargs", "message"),
    [
        (
            ["ab", "cd", None],
            {"validation_split_percentage": 34},
            "row 3 of the training data ('{}'): column 'text' holds null",
        ),
        (["ab", 7], {}, "row 2 of the training data ('{}'): column 'text' holds 7 (int) instead of a string"),
        ([{"n": 1}] * 3, {"text_column": "n"}, "row 1 of the training data ('{}'): column 'n' holds 1 (int)"),
        (["", "  ", "\n"], {}, "the training data ('{}') holds no text; give more text or a smaller block_size"),
        (["ab"], {"block_size": 9}, "the training data ('{}') holds 3 of the 9 tokens that one row needs"),
        (["ab", "az"], {"vocab_size": 20}, "row 2 of the training data ('{}') has the token id 27, but the model's vo"),
        (b'{"text": "a"}\n{"text": "\xe9"}\n', {}, "'{}', line 2: byte 0xe9 is not UTF-8"),
    ],
)
def test_unfit_text_is_refused_in_one_sentence(content, kwargs, message, streaming, build, tmp_path):
    with pytest.raises(DataError) as error:
        build(content, streaming=streaming, **kwargs)
    assert message.format(tmp_path / "data.jsonl") in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("workers", [None, 2])
def test_token_outside_the_vocabulary_is_found_in_a_late_row(workers, build):
    with pytest.raises(
        DataError, match=r"row 2001 of .* has the token id 27, but the model's vocab_size is 27; use the"
    ):
        build([*["ab"] * 2000, "z"], vocab_size=27, preprocessing_num_workers=workers)


@pytest.mark.parametrize("streaming", [False, True])
def test_tokenized_data_is_used_as_it_is(streaming, build):
    rows = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "attention_mask": [1, 1, 1], "source": "x"},
        {"input_ids": [8], "labels": [8], "attention_mask": [1], "source": "y"},
    ]
    assert as_lists(build(rows, streaming=streaming)) == [
        {name: row[name] for name in ("input_ids", "attention_mask", "labels")} for row in rows
    ]
    rows = [{"position_ids": [0, 0, 1], "input_ids": [5, 6, 7]}]
    assert as_lists(build(rows, streaming=streaming)) == rows


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"input_ids": [1, 2, 3, 4, 5]}, "has 5 tokens, more than block_size=4"),
        ({"input_ids": [1, VOCAB_SIZE]}, f"input_ids holds {VOCAB_SIZE}, which is not in the model's range of 0 to"),
        ({"input_ids": [1, -1]}, "input_ids holds -1"),
        ({"input_ids": []}, "input_ids must be a list of at least one integer"),
        ({"input_ids": None}, "input_ids must be a list of at least one integer"),
        ({"input_ids": [1, 2], "labels": [1]}, "1 labels for 2 input_ids"),
        ({"input_ids": [1], "labels": [-1]}, "labels holds -1"),
        ({"input_ids": [1], "attention_mask": [2]}, "attention_mask holds 2"),
        ({"input_ids": [1], "position_ids": [-3]}, "position_ids holds -3"),
    ],
)
def test_unfit_tokens_are_refused(wrong, message, streaming, build):
    good = {name: [1, 1] for name in wrong}
    with pytest.raises(DataError, match="row 3 of the training data") as error:
        build([good, good, wrong, good], streaming=streaming)
    assert message in str(error.value)


@pytest.mark.parametrize("ids", [["text", "text"], [[1.5], [2.5]], [[[1]], [[2]]]])
def test_input_ids_that_are_no_integers_are_refused(ids, build):
    with pytest.raises(DataError, match=r"row 1 of .*: input_ids must be a list of at least one integer"):
        build([{"input_ids": value} for value in ids])


def test_second_run_reads_the_cache(build, tmp_path):
    def cached() -> dict[Path, int]:
        return {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.arrow")}

    first = as_lists(build(DOCUMENTS))
    files = cached()
    assert files
    assert as_lists(build(DOCUMENTS)) == first
    assert cached() == files
    build(DOCUMENTS, overwrite_cache=True)
    assert cached() != files
    # Other text in the same file is not taken for the old one.
    assert as_lists(build(["zz", "yy"])) != first


def test_limits_count_packed_rows(build, tmp_path, tokenizer):
    assert len(build(DOCUMENTS, max_train_samples=3)) == 3
    assert len(build(DOCUMENTS, max_train_samples=1000)) == len(build(DOCUMENTS)) == 10
    data_args = DataArguments(validation_file=str(tmp_path / "data.jsonl"), max_eval_samples=2, cache_dir=str(tmp_path))
    nothing, validation = build_datasets(
        data_args, tokenizer, block_size=4, vocab_size=VOCAB_SIZE, do_train=False, do_eval=True
    )
    assert (nothing, len(validation)) == (None, 2)


def test_stream_is_shuffled_by_its_seed(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": char * 3}) + "\n" for char in ALPHABET[:26]))
    data_args = DataArguments(train_file=str(tmp_path / "a.jsonl"), streaming=True, validation_split_percentage=0)

    def first_tokens(seed: int) -> list[int]:
        kwargs = {"block_size": 4, "vocab_size": VOCAB_SIZE, "do_train": True, "do_eval": False, "seed": seed}
        return [int(row["input_ids"][0]) for row in islice(build_datasets(data_args, tokenizer, **kwargs)[0], 26)]

    assert first_tokens(1) == first_tokens(1)
    assert first_tokens(1) != first_tokens(2)
    assert sorted(first_tokens(1)) == list(range(2, 28))


def test_shuffled_stream_of_small_files_packs_across_files(tmp_path, tokenizer):
    for i in range(6):
        (tmp_path / f"part{i}.txt").write_text(ALPHABET[i] * 3)
    data_args = DataArguments(train_file=f"{tmp_path}/*.txt", streaming=True, validation_split_percentage=0)
    train, _ = build_datasets(data_args, tokenizer, block_size=4, vocab_size=VOCAB_SIZE, do_train=True, do_eval=False)
    tokens = [int(token) for row in islice(train, 9) for token in row["input_ids"]]
    # Two epochs of six files, each of three equal letters, and nothing is lost between them.
    assert sorted(tokens) == sorted(IDS[char] for char in ALPHABET[:6] for _ in range(6))
    assert all(len(set(tokens[i : i + 3])) == 1 for i in range(0, 36, 3))


def test_data_is_prepared_inside_the_given_context(tmp_path, tokenizer):
    events = []

    @contextmanager
    def main_process_first():
        events.append(list(tmp_path.rglob("*.arrow")))
        yield
        events.append(list(tmp_path.rglob("*.arrow")))

    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "abcdefgh"}))
    data_args = DataArguments(train_file=str(tmp_path / "a.jsonl"), cache_dir=str(tmp_path / "cache"))
    kwargs = {"block_size": 4, "vocab_size": VOCAB_SIZE, "do_train": True, "do_eval": False}
    build_datasets(data_args, tokenizer, **kwargs, is_main_process_first_context=main_process_first())
    before, after = events
    assert not before
    assert len(after) >= 3  # as read, tokenized, packed


def test_arguments_are_checked_before_anything_is_read(tokenizer):
    data_args = DataArguments(packing="unknown")
    with pytest.raises(DataError, match="packing='unknown'"):
        build_datasets(data_args, tokenizer, block_size=4, vocab_size=9, do_train=True, do_eval=False)


@pytest.mark.parametrize(
    ("given", "tokenizer_limit", "model_limit", "expected"),
    [
        (None, int(1e30), 4096, 1024),
        (None, int(1e30), 512, 512),
        (None, 256, 512, 256),
        (None, 256, None, 256),
        (2048, 1024, 4096, 2048),
        (4096, 1024, 4096, 4096),
        (4096, 1024, None, 4096),
    ],
)
def test_block_size(given, tokenizer_limit, model_limit, expected):
    tokenizer = make_tokenizer(model_max_length=tokenizer_limit)
    assert resolve_block_size(DataArguments(block_size=given), tokenizer, model_limit) == expected


def test_block_size_beyond_the_model_is_refused(tokenizer):
    with pytest.raises(
        DataError, match="block_size=513 is more than the model's max_position_embeddings=512; use at mo"
    ):
        resolve_block_size(DataArguments(block_size=513), tokenizer, 512)
