"""Exports work in other tools as they are: Transformers' pipeline, PEFT and lm_eval, the latter two where installed."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers_model import randomize_vectors
from launching import ROOT, environment
from small import save_tokenizer, small_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, pipeline

from moe_hf import MoEForCausalLM
from moe_hf.checkpoint.description import describe_model
from moe_hf.checkpoint.export import export_model

PROMPT = "w5 w6 w7"
TASKS = ROOT / "docs" / "lm_eval"


def export(folder: Path, **changes) -> Path:
    torch.manual_seed(3)
    model = MoEForCausalLM(small_config(**changes))
    randomize_vectors(model)
    export_model(model, folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return export(tmp_path_factory.mktemp("model") / "hf")


# --------------------------------------------------------------------------------------------------------------------
# Transformers


def greedy_ids(folder: Path, max_new_tokens: int) -> list[int]:
    """Take the likeliest token, one after the other, from whole forward passes."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    for _ in range(max_new_tokens):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0].tolist()


def test_pipeline(folder):
    generate = pipeline("text-generation", model=str(folder))
    assert type(generate.model) is MoEForCausalLM
    (answer,) = generate(PROMPT, max_new_tokens=6, do_sample=False, return_tensors=True)
    assert answer["generated_token_ids"] == greedy_ids(folder, 6)
    (answer,) = generate(PROMPT, max_new_tokens=6, do_sample=False)
    assert answer["generated_text"] == PROMPT + generate.tokenizer.decode(greedy_ids(folder, 6)[3:])


WITHOUT_THE_PACKAGE = """
import json, sys
sys.modules["moe_hf"] = None
from transformers import pipeline
folder, prompt = sys.argv[1:]
try:
    pipeline("text-generation", model=folder, trust_remote_code=False)
except ValueError as error:
    refusal = str(error)
assert not [name for name in sys.modules if "modeling_moe" in name]
generate = pipeline("text-generation", model=folder, trust_remote_code=True)
(answer,) = generate(prompt, max_new_tokens=6, do_sample=False, return_tensors=True)
print(json.dumps([refusal, type(generate.model).__module__, answer["generated_token_ids"]]))
"""


def test_pipeline_with_the_code_of_the_folder(folder):
    """On a machine without moe_hf the folder's own classes compute the same, once they are trusted and not before."""
    environ = environment() | {"HF_MODULES_CACHE": str(folder.parent / "modules")}
    command = [sys.executable, "-c", WITHOUT_THE_PACKAGE, str(folder), PROMPT]
    run = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    refusal, module, ids = json.loads(run.stdout.splitlines()[-1])
    assert "trust_remote_code=True" in refusal
    assert module.startswith("transformers_modules.") and module.endswith(".modeling_moe")
    assert ids == greedy_ids(folder, 6)


# --------------------------------------------------------------------------------------------------------------------
# PEFT

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLPS = ["up_proj", "down_proj", "gate_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
LORA = [
    {"target_modules": ATTENTION},
    {"target_modules": MLPS},
    {"target_modules": "all-linear"},
    {"target_modules": [], "target_parameters": EXPERTS},
    {"target_modules": ATTENTION, "target_parameters": [*EXPERTS, "mlp.gate.weight"]},
]
# How many tensors each adapts, in 4 layers of which 2 are sparse with a shared expert, a gate before `o_proj`.
ADAPTED = [16, 12 + 4, 16 + 12 + 4 + 2, 4, 16 + 6]


def lora(folder: Path, **targets):
    """Return the exported model with untrained adapters of rank 2."""
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(folder)
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=8, **targets))


def train(model, ids: torch.Tensor, steps: int) -> list[float]:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trainable, 1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def logits(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


@pytest.fixture(scope="module")
def gated_folder(tmp_path_factory) -> Path:
    return export(tmp_path_factory.mktemp("gated") / "hf", attention_gate="headwise")


@pytest.mark.parametrize(("targets", "num_adapted"), list(zip(LORA, ADAPTED, strict=True)))
def test_lora_trains_saves_reloads_and_merges(gated_folder, tmp_path, targets, num_adapted):
    model = lora(gated_folder, **targets)
    from peft import PeftModel

    plain = AutoModelForCausalLM.from_pretrained(gated_folder).state_dict()
    adapters = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(adapters) == 2 * num_adapted and all("lora_" in name for name in adapters)
    ids = torch.randint(3, 128, (4, 24))
    untrained = logits(model, ids)
    losses = train(model.train(), ids, 8)
    assert losses[-1] < losses[0] - 0.05
    trained = logits(model, ids)
    assert (trained - untrained).abs().max() > 0.1
    model.save_pretrained(tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} >= {"adapter_model.safetensors"}

    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(gated_folder), tmp_path / "adapter")
    assert torch.equal(logits(again, ids), trained)
    merged = again.merge_and_unload()
    assert type(merged) is MoEForCausalLM
    assert (logits(merged, ids) - trained).abs().max() < 1e-4 * trained.abs().max()
    changed = [name for name, tensor in merged.state_dict().items() if not tensor.equal(plain[name])]
    assert len(changed) == num_adapted and merged.state_dict().keys() == plain.keys()
    for name in changed:
        # One product of two thin matrices, and in stacked experts one for each of them.
        ranks = torch.linalg.matrix_rank((merged.state_dict()[name] - plain[name]).double(), rtol=1e-4)
        assert (ranks <= 2).all() and (ranks >= 1).all(), name

    export_model(merged, tmp_path / "merged")
    assert describe_model(tmp_path / "merged").problems == []
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(loaded, ids), logits(merged, ids))


@pytest.mark.parametrize(
    ("target_modules", "sentence"),
    [
        (["experts"], r"Target module MoEExperts\([\s\S]* is not supported"),
        (["mlp.gate"], r"Target module MoERouter\([\s\S]* is not supported"),
        (["gate_up_proj"], r"gate_up_proj.* not found in the base model"),
    ],
)
def test_peft_refuses_stacked_experts_as_modules(folder, target_modules, sentence):
    """They are tensors, not modules: `target_parameters` names them, as above."""
    with pytest.raises(ValueError, match=sentence):
        lora(folder, target_modules=target_modules)


# --------------------------------------------------------------------------------------------------------------------
# lm_eval


def documents() -> list[dict]:
    return [json.loads(line) for line in (TASKS / "moe_hf_python.jsonl").read_text().splitlines()]


def test_the_documented_tasks_are_of_one_piece():
    for document in documents():
        assert document.keys() == {"before", "choices", "answer"} and 0 <= document["answer"] < 4
        assert len(set(document["choices"])) == len(document["choices"]) == 4
    answers = [document["answer"] for document in documents()]
    assert all(answers.count(answer) == len(answers) / 4 for answer in range(4))  # a guess is right one time in four
    guide = (ROOT / "docs" / "other_tools.md").read_text()
    for path in TASKS.glob("*.yaml"):
        task = yaml.safe_load(path.read_text())
        assert task["task"] == path.stem and path.stem in guide
        assert (ROOT / task["dataset_kwargs"]["data_files"]["test"]).is_file()


def export_with_bytes(folder: Path) -> Path:
    """Export a model that reads any text: 256 bytes, and one token that begins and ends texts."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|end|>": 0} | {character: i + 1 for i, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    export(folder, vocab_size=len(vocabulary), max_position_embeddings=256)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>").save_pretrained(
        folder
    )
    return folder


def log_likelihood(model, before: str, text: str, vocabulary: dict[str, int]) -> float:
    """Return the log probability of the bytes of `text` after those of `before`, or after the token of the end."""
    encode = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str
    ids = [[vocabulary[c] for piece, _ in encode(part) for c in piece] if part else [0] for part in (before, text)]
    with torch.no_grad():
        logs = model(torch.tensor([ids[0] + ids[1]])).logits[0].double().log_softmax(-1)
    return sum(logs[len(ids[0]) - 1 + i, token].item() for i, token in enumerate(ids[1]))


def test_lm_eval_gives_the_numbers_of_the_formulas(tmp_path, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(ROOT)
    folder = export_with_bytes(tmp_path / "hf")
    answers = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "trust_remote_code": True},
        tasks=["moe_hf_python_choice", "moe_hf_python_perplexity"],
        task_manager=TaskManager(include_path=str(TASKS)),
        device="cpu",
        batch_size=4,
        bootstrap_iters=0,
    )["results"]
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    vocabulary = AutoTokenizer.from_pretrained(folder).get_vocab()
    num_right, bits, num_bytes = 0, 0.0, 0
    for document in documents():
        scores = [log_likelihood(model, document["before"], text, vocabulary) for text in document["choices"]]
        num_right += scores.index(max(scores)) == document["answer"]
        whole = document["before"] + document["choices"][document["answer"]]
        bits -= log_likelihood(model, "", whole, vocabulary) / math.log(2)
        num_bytes += len(whole.encode())
    assert answers["moe_hf_python_choice"]["acc,none"] == num_right / len(documents())
    assert answers["moe_hf_python_perplexity"]["bits_per_byte,none"] == pytest.approx(bits / num_bytes, rel=1e-4)
