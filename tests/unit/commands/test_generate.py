"""`moe-hf generate` continues texts from a flag, a pipe and a terminal, and runs nothing that a folder brings."""

import io
import json
import os
import pickle
import pty
import select
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from launching import ROOT, environment, hear_ctrl_c
from safetensors.torch import load_file, save_file
from small import save_tokenizer, small_config
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from moe_hf import MoEForCausalLM, cli
from moe_hf.checkpoint.export import export_model

PROMPT = "w5 w6 w7"


def make_folder(folder: Path, model_type: str = "moe_hf", **changes) -> Path:
    """Save a model with the tokenizer of the words `w0 … w127`; `save_pretrained` is what native exports look like."""
    torch.manual_seed(3)
    if model_type == "moe_hf":
        export_model(MoEForCausalLM(small_config(**changes)), folder)
    else:
        sizes = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
        sizes |= {"eos_token_id": 1, "bos_token_id": None, "pad_token_id": 0, "initializer_range": 0.3}
        AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes)).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("model") / "hf")


def expected_text(folder: Path, prompt: str, max_new_tokens: int) -> str:
    """Generate greedily without a stream, a cache or sampling: the likeliest token, one after the other."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    for _ in range(max_new_tokens):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        if ids[0, -1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[0], skip_special_tokens=True)


def fails(capsys, *words: str | Path) -> str:
    """Run the command, which must end with exit code 2 and one sentence, and return it."""
    with pytest.raises(SystemExit) as end:
        cli.main(["generate", *map(str, words)])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


@pytest.mark.parametrize("model_type", ["moe_hf", "mixtral", "qwen3_moe", "llama"])
def test_the_likeliest_text_of_every_kind_of_folder(tmp_path, capsys, model_type):
    folder = make_folder(tmp_path / "hf", model_type)
    capsys.readouterr()
    cli.main(["generate", str(folder), "--prompt", PROMPT, "--max_new_tokens", "9", "--temperature", "0"])
    text = capsys.readouterr().out
    assert text == expected_text(folder, PROMPT, 9) + "\n" and text.startswith(PROMPT)


def test_both_spellings_of_a_flag(folder, capsys):
    texts = []
    for flag in ("--max_new_tokens", "--max-new-tokens"):
        cli.main(["generate", str(folder), "--prompt", PROMPT, flag, "4", "--temperature", "0"])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == expected_text(folder, PROMPT, 4) + "\n"


def test_the_seed_decides_and_temperature_matters(folder, capsys):
    def text(*words: str) -> str:
        cli.main(["generate", str(folder), "--prompt", PROMPT, "--max_new_tokens", "12", *words])
        return capsys.readouterr().out

    assert text("--temperature", "5") == text("--temperature", "5", "--seed", "0")
    assert text("--temperature", "5") != text("--temperature", "5", "--seed", "1")
    assert text("--temperature", "1e-4") == text("--temperature", "0") != text("--temperature", "5")


def test_every_line_of_a_pipe_is_a_prompt(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("w5 w6\n\nw9\nw10 w11"))
    cli.main(["generate", str(folder), "--max_new_tokens", "5", "--temperature", "0"])
    texts = [expected_text(folder, prompt, 5) for prompt in ("w5 w6", "w9", "w10 w11")]
    assert capsys.readouterr().out == "\n".join(texts) + "\n"


def test_a_model_whose_experts_choose_is_refused_in_one_sentence(tmp_path, capsys):
    folder = make_folder(tmp_path / "hf", router_balancing="expert_choice")
    with pytest.raises(SystemExit) as end:
        cli.main(["generate", str(folder), "--prompt", PROMPT])
    error = capsys.readouterr().err
    assert end.value.code == 2 and "cannot generate: its experts choose" in error and error.count("\n") == 1


def test_the_text_comes_while_it_is_made(folder, monkeypatch):
    """What is printed grows with every token, long before the last."""
    printed, seen = io.StringIO(), []
    monkeypatch.setattr("sys.stdout", printed)
    forward = MoEForCausalLM.forward

    def watch(self, *args, **kwargs):
        seen.append(len(printed.getvalue()))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(MoEForCausalLM, "forward", watch)
    cli.main(["generate", str(folder), "--prompt", PROMPT, "--max_new_tokens", "8", "--temperature", "0"])
    assert len(seen) == 8 and seen[0] > 0 and all(a < b for a, b in pairwise(seen[1:]))


def test_an_interrupted_text_is_there_to_its_last_token(folder, capsys, monkeypatch):
    forward, calls = MoEForCausalLM.forward, []

    def interrupt(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            signal.raise_signal(signal.SIGINT)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(MoEForCausalLM, "forward", interrupt)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        cli.main(["generate", str(folder), "--prompt", PROMPT, "--temperature", "0"])
    monkeypatch.undo()
    assert capsys.readouterr().out == expected_text(folder, PROMPT, 5) + "\n"


def test_it_stops_at_the_last_position(folder, capsys):
    """The model has 64 positions: after 60 tokens four more, then none."""
    prompt = " ".join(["w5"] * 60)
    cli.main(["generate", str(folder), "--prompt", prompt, "--temperature", "3"])
    text = capsys.readouterr().out
    assert text.startswith(prompt) and len(text.split()) <= 64
    cli.main(["generate", str(folder), "--prompt", " ".join(["w5"] * 63), "--temperature", "0"])
    assert capsys.readouterr().out == expected_text(folder, " ".join(["w5"] * 63), 1) + "\n"
    sentence = fails(capsys, folder, "--prompt", " ".join(["w5"] * 64))
    assert sentence == "error: The prompt has 64 tokens but the model has 64 positions; give at most 63 tokens.\n"


def test_a_pipe_ends_at_a_wrong_prompt_but_keeps_what_was_before(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("w9\n" + "w5 " * 70 + "\nw9\n"))
    with pytest.raises(SystemExit) as end:
        cli.main(["generate", str(folder), "--max_new_tokens", "5", "--temperature", "0"])
    assert end.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == expected_text(folder, "w9", 5) + "\n"
    assert captured.err.startswith("error: The prompt has 70 tokens")


def test_bytes_that_are_no_text_are_refused(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\n"), encoding="utf-8"))
    assert fails(capsys, folder) == "error: The standard input is not valid UTF-8 (invalid start byte); give text.\n"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--max_new_tokens", "0"], "--max_new_tokens 0 must be at least 1."),
        (["--temperature", "-1"], "--temperature -1.0 must be 0 or a positive number."),
        (["--temperature", "nan"], "--temperature nan must be 0 or a positive number."),
        (["--temperature", "inf"], "--temperature inf must be 0 or a positive number."),
        (["--seed", "-1"], "--seed -1 must be between 0 and 4294967295."),
        (["--prompt", ""], "--prompt is empty; give a text to continue, or leave the flag away."),
        (["--prompt", "  "], "The prompt has no tokens; give a text to continue."),
    ],
)
def test_wrong_flags_are_refused(folder, capsys, words, sentence):
    assert fails(capsys, folder, *words) == f"error: {sentence}\n"


# --------------------------------------------------------------------------------------------------------------------
# Folders


def without_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def with_a_torn_file(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def without_one_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.experts.down_proj"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def with_a_broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


def with_another_tokenizer(folder: Path) -> None:
    """One with more tokens than the model has rows."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"]["w5"] = 1000
    path.write_text(json.dumps(tokenizer))


def as_an_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere", "peft_type": "LORA"}')


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (without_tokenizer, "{} has no tokenizer; copy tokenizer.json and tokenizer_config.json into it."),
        (without_weights, "{} has no model.safetensors; weights are read from safetensors only, never from pickles."),
        (with_a_torn_file, "{}/model.safetensors is damaged"),
        (without_one_tensor, "{} is incomplete: it has no model.layers.1.mlp.experts.down_proj (moe-hf inspect"),
        (with_a_broken_tokenizer, "{} cannot be loaded: "),
        (with_another_tokenizer, "The tokenizer gives token 1000 but the model has 128; use the tokenizer it was"),
        (as_an_adapter, "{} holds a PEFT adapter; merge it"),
    ],
)
def test_wrong_folders_are_refused(tmp_path, capsys, spoil, sentence):
    folder = make_folder(tmp_path / "hf")
    spoil(folder)
    assert fails(capsys, folder, "--prompt", PROMPT).startswith(f"error: {sentence.format(folder)}")


def test_a_run_folder_is_told_where_the_export_is(tmp_path, capsys):
    make_folder(tmp_path / "hf")
    assert "give OUTPUT_DIR/hf of a run" in fails(capsys, tmp_path, "--prompt", PROMPT)
    assert "give OUTPUT_DIR/hf of a run" in fails(capsys, tmp_path / "nowhere", "--prompt", PROMPT)


def test_nothing_of_the_folder_is_executed(tmp_path, capsys):
    """Neither the classes that an export carries, nor generation code, nor a pickle beside the weights."""
    folder, mark = make_folder(tmp_path / "hf"), tmp_path / "executed"
    expected = expected_text(folder, PROMPT, 4)
    leave_mark = f"open({str(mark)!r}, 'w').close()\n"
    for name in ("modeling_moe.py", "configuration_moe.py", "routing.py"):
        assert (folder / name).is_file()
        (folder / name).write_text(leave_mark)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(f"{leave_mark}def generate(**kwargs): pass\n")

    class Evil:
        def __reduce__(self):
            return (Path.touch, (mark,))

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    cli.main(["generate", str(folder), "--prompt", PROMPT, "--max_new_tokens", "4", "--temperature", "0"])
    assert capsys.readouterr().out == expected + "\n"
    without_weights(folder)
    assert "never from pickles" in fails(capsys, folder, "--prompt", PROMPT)
    assert not mark.exists()


# --------------------------------------------------------------------------------------------------------------------
# A terminal


class Terminal:
    """A program behind a pseudo-terminal, typed at and read from as a person does."""

    def __init__(self, *words: str | Path) -> None:
        self._end, slave = pty.openpty()
        command = [sys.executable, "-m", "moe_hf", *map(str, words)]
        environ = environment() | {"TERM": "dumb", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=environ, start_new_session=True, preexec_fn=_take_tty
        )
        os.close(slave)
        self.screen = ""

    def type(self, text: str) -> None:
        os.write(self._end, text.encode())

    def read_until(self, text: str, seconds: float = 60) -> str:
        """Return what has come on the screen since the last call, up to and with `text`."""
        deadline = time.monotonic() + seconds
        while text not in self.screen:
            assert time.monotonic() < deadline, f"waited for {text!r}, the screen shows {self.screen!r}"
            if select.select([self._end], [], [], 0.2)[0]:
                try:
                    self.screen += os.read(self._end, 4096).decode()
                except OSError:
                    raise AssertionError(f"the program has ended; the screen shows {self.screen!r}") from None
        shown, _, self.screen = self.screen.partition(text)
        return shown + text

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._end)


def _take_tty() -> None:
    import fcntl
    import termios

    hear_ctrl_c()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_a_terminal(tmp_path):
    """Prompts, a wrong one, Ctrl-C while it writes and while one types, and Ctrl-D, in one process."""
    folder = make_folder(tmp_path / "hf", max_position_embeddings=100_000)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": None}))
    terminal = Terminal("generate", folder, "--max_new_tokens", "50000", "--temperature", "5")
    try:
        terminal.read_until("prompt> ")
        terminal.type("w5 w6\n")
        terminal.read_until("\r\nw5 w6 w")  # the echo, then the stream
        terminal.type("\x03")
        started = time.monotonic()
        assert "Traceback" not in terminal.read_until("prompt> ")
        assert time.monotonic() - started < 10
        terminal.type("w9 half a line")
        terminal.read_until("line")
        time.sleep(0.5)  # Python's input() can miss a signal between a key and its wait for the next
        terminal.type("\x03")
        assert "Traceback" not in terminal.read_until("\nprompt> ")
        terminal.type(" \n")
        assert "error: The prompt has no tokens" in terminal.read_until("prompt> ")
        terminal.type("w7\n")
        terminal.read_until("\r\nw7 w")
        terminal.type("\x03")
        terminal.read_until("prompt> ")
        terminal.type("\x04")
        assert terminal.process.wait(timeout=30) == 0
    finally:
        terminal.close()
