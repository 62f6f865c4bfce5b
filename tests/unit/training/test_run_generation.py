"""`moe-hf generate` writes what the model that a run has exported predicts, and says which folder it cannot use."""

import shutil

import pytest
import torch

from moe_hf import MoEForCausalLM, cli

pytestmark = pytest.mark.usefixtures("no_state_of_earlier_runs")


def test_export_writes_text(lab, evaluated, capsys):
    cli.main(
        [
            "generate",
            str(lab.folder / "evaluated" / "hf"),
            *("--prompt", "w5 w6"),
            *("--max_new_tokens", "5"),
            *("--temperature", "0"),
        ]
    )
    printed = capsys.readouterr().out.split()
    model = MoEForCausalLM.from_pretrained(lab.folder / "evaluated" / "hf").eval()
    tokens = [5, 6]
    while len(tokens) < 7 and tokens[-1] != 1:
        tokens.append(model(torch.tensor([tokens])).logits[0, -1].argmax().item())
    assert printed == [f"w{token}" for token in tokens if token not in (0, 1)]
    assert len(printed) > 2


def test_generate_reads_prompts_until_the_input_ends(lab, evaluated, capsys, monkeypatch):
    prompts = iter(["w5", "w7 w8"])

    def type_prompt(shown: str) -> str:
        try:
            return next(prompts)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", type_prompt)
    cli.main(["generate", str(lab.folder / "evaluated" / "hf"), "--max_new_tokens", "2", "--seed", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["w5", "w7"]
    assert lines[1].startswith("w7 w8 ")


@pytest.mark.parametrize(
    ("damaged", "words", "named"),
    [
        (None, ["--prompt", "w5", "--max_new_tokens", "0"], "max_new_tokens"),
        (None, ["--prompt", ""], "prompt"),
        ("model.safetensors", ["--prompt", "w5"], "damaged/hf"),
        ("config.json", ["--prompt", "w5"], "damaged/hf"),
        ("tokenizer.json", ["--prompt", "w5"], "damaged/hf"),
    ],
)
def test_generate_says_what_it_cannot_use(lab, evaluated, tmp_path, capsys, damaged, words, named):
    folder = tmp_path / "damaged" / "hf"
    shutil.copytree(lab.folder / "evaluated" / "hf", folder)
    if damaged:
        (folder / damaged).write_text("{")
    with pytest.raises(SystemExit) as ended:
        cli.main(["generate", str(folder), *words])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and named in line


@pytest.mark.parametrize("wrong", ["missing", "evaluated/checkpoint-3"])
def test_generate_refuses_a_folder_without_an_export(lab, evaluated, capsys, wrong):
    with pytest.raises(SystemExit) as ended:
        cli.main(["generate", str(lab.folder / wrong), "--prompt", "w5"])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and line.endswith("give OUTPUT_DIR/hf of a run.")
