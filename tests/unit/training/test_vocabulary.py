"""Vocabularies rounded up, and tokenizers as GPT-2's: no padding token, and one token that begins and ends texts."""

import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GPT2Tokenizer

from moe_hf import MoEConfig, MoEForCausalLM
from moe_hf.data.arguments import DEFAULT_SHUFFLE_BUFFER, DataArguments
from moe_hf.data.build import build_datasets
from moe_hf.errors import ConfigError, DataError
from moe_hf.parallel.failure import FailureRelay
from moe_hf.training.arguments import ModelArguments
from moe_hf.training.run import train_and_export
from moe_hf.training.vocabulary import never_generate_padding, pad_vocabulary

NUM_TOKENS = 50_257
EOS = NUM_TOKENS - 1
TEXTS = ["the cat sat", "a dog", "the end of it all"]

pytestmark = pytest.mark.usefixtures("no_state_of_earlier_runs")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> str:
    """A folder as GPT-2's: bytes, what is merged of them, and as many tokens as the real one."""
    folder = tmp_path_factory.mktemp("gpt2")
    printable = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256))]
    letters = printable + [chr(256 + i) for i in range(256 - len(printable))]
    merges = [("t", "h"), ("th", "e"), ("Ġ", "d"), ("a", "t")]
    words = letters + ["".join(pair) for pair in merges]
    words += [f"<unused{i}>" for i in range(EOS - len(words))] + ["<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    return str(folder)


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return str(path)


@pytest.mark.parametrize(
    ("multiple", "expected"), [(128, 50_304), (64, 50_304), (1, NUM_TOKENS), (NUM_TOKENS, NUM_TOKENS), (1000, 51_000)]
)
def test_vocabulary_is_rounded_up(multiple, expected, gpt2):
    model_args = ModelArguments(pad_vocab_to_multiple_of=multiple, config_overrides="head_dim=4")
    pad_vocabulary(model_args, gpt2)
    assert model_args.config_overrides == f"head_dim=4,vocab_size={expected}"


def test_without_the_flag_nothing_changes(gpt2):
    model_args = ModelArguments()
    pad_vocabulary(model_args, gpt2)
    assert model_args == ModelArguments()


@pytest.mark.parametrize(
    ("changes", "tokenizer", "message"),
    [
        ({"pad_vocab_to_multiple_of": 0}, "x", "pad_vocab_to_multiple_of=0 is out of range"),
        ({"model_name_or_path": "m"}, "x", "cannot change the vocabulary of the weights in model_name_or_path='m'"),
        ({"config_overrides": "vocab_size=9"}, "x", "and vocab_size in config_overrides='vocab_size=9': give one"),
        ({}, None, "name one with --tokenizer_name"),
    ],
)
def test_flag_that_cannot_be_followed(changes, tokenizer, message):
    with pytest.raises(ConfigError, match=message):
        pad_vocabulary(ModelArguments(**({"pad_vocab_to_multiple_of": 128} | changes)), tokenizer)


def test_tokenizer_that_is_not_there():
    with pytest.raises(DataError, match="The tokenizer /none cannot be loaded"):
        pad_vocabulary(ModelArguments(pad_vocab_to_multiple_of=128), "/none")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("packing", ["blocks", "documents", "pad"])
def test_tokenizer_of_gpt2_packs_as_it_is(packing, streaming, gpt2, text, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(gpt2)
    assert isinstance(tokenizer, GPT2Tokenizer) and len(tokenizer) == NUM_TOKENS
    assert tokenizer.pad_token_id is None and tokenizer.bos_token_id == tokenizer.eos_token_id == EOS
    data_args = DataArguments(
        train_file=text,
        packing=packing,
        streaming=streaming,
        streaming_shuffle_buffer=0 if streaming else DEFAULT_SHUFFLE_BUFFER,
        validation_split_percentage=0,
        cache_dir=str(tmp_path / "cache"),
    )
    train, _ = build_datasets(data_args, tokenizer, block_size=12, vocab_size=50_304, do_train=True, do_eval=False)
    documents = [[*tokenizer(text)["input_ids"], EOS] for text in TEXTS]
    joined = sum(documents, [])  # noqa: RUF017
    rows = [{name: [int(v) for v in values] for name, values in row.items()} for row in islice(train, 2)]
    if packing == "pad":
        assert rows[0]["input_ids"] == documents[0] + [EOS] * (12 - len(documents[0]))
        # The document's own end is learned, although it is the same token as the padding.
        assert rows[0]["labels"] == documents[0] + [-100] * (12 - len(documents[0]))
    else:
        assert [row["input_ids"] for row in rows] == [joined[:12], joined[12:24]]
    if packing == "documents":
        first, second = len(documents[0]), len(documents[1])
        assert rows[0]["position_ids"] == [*range(first), *range(second)][:12]
        assert [i for i, label in enumerate(rows[0]["labels"]) if label == -100] == [0, first]


def test_run_with_a_padded_vocabulary_generates_only_tokens(gpt2, text, tmp_path):
    overrides = "hidden_size=16,num_hidden_layers=2,num_attention_heads=2,intermediate_size=16,head_dim=8"
    (tmp_path / "config.json").write_text(json.dumps({"num_experts": 4, "moe_intermediate_size": 8}))
    flags = {
        "config_name": tmp_path / "config.json",
        "config_overrides": overrides + ",num_key_value_heads=2,max_position_embeddings=32,tie_word_embeddings=True",
        "pad_vocab_to_multiple_of": 128,
        "tokenizer_name": gpt2,
        "train_file": text,
        "validation_split_percentage": 0,
        "streaming": True,
        "block_size": 8,
        "max_steps": 1,
        "per_device_train_batch_size": 1,
        "output_dir": tmp_path / "out",
        "use_cpu": True,
        "do_train": True,
        "disable_tqdm": True,
    }
    train_and_export([str(word) for name, value in flags.items() for word in (f"--{name}", value)], FailureRelay())
    model = MoEForCausalLM.from_pretrained(tmp_path / "out" / "hf")
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == 50_304
    with torch.no_grad():  # the padding is now what the model likes best
        model.get_output_embeddings().weight[NUM_TOKENS:] = 0
        model.get_output_embeddings().weight[:NUM_TOKENS] = -1e-3
    prompt = torch.tensor([[5, 6, 7]])
    assert model.generate(prompt, max_new_tokens=8, do_sample=True, top_k=0).max() < NUM_TOKENS
    assert AutoTokenizer.from_pretrained(tmp_path / "out" / "hf").eos_token_id == EOS


def test_nothing_is_suppressed_where_nothing_is_padded():
    model = MoEForCausalLM(MoEConfig(vocab_size=128, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    never_generate_padding(model, 128)
    assert model.generation_config.suppress_tokens is None
    never_generate_padding(model, 126)
    assert model.generation_config.suppress_tokens == [126, 127]
