"""Load what the quickstart has exported as anybody would, check it against the trainer, and tell how it went."""

import json
import math
import sys
from pathlib import Path

import torch
from datasets import logging as datasets_logging
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import logging as transformers_logging

import moe_hf  # noqa: F401  (registers the architecture)
from moe_hf.data.arguments import DataArguments
from moe_hf.data.build import build_datasets
from moe_hf.data.collator import CausalLMCollator
from moe_hf.training.telemetry.jsonlines import METRICS_NAME

PROMPT = "def read_lines(path):\n"
TOLERANCE = 1e-3


def main(output_dir: Path) -> int:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets_logging.disable_progress_bar()
    export = output_dir / "hf"
    model = AutoModelForCausalLM.from_pretrained(export).eval()
    tokenizer = AutoTokenizer.from_pretrained(export)

    reported = json.loads((output_dir / "eval_results.json").read_text())["eval_loss"]
    measured = evaluation_loss(model, tokenizer)
    difference = abs(measured - reported)
    if difference > TOLERANCE:
        print(f"error: the export has loss {measured:.6f} but the trainer said {reported:.6f}.", file=sys.stderr)
        return 1
    print_summary(output_dir, model, measured, difference)
    print(generate(model, tokenizer))
    print(NEXT.format(export=export))
    return 0


@torch.no_grad()
def evaluation_loss(model, tokenizer) -> float:
    """Return the mean cross-entropy over the tokens that the trainer evaluated on."""
    arguments = DataArguments(max_eval_samples=128)
    vocab_size = model.config.vocab_size
    _, rows = build_datasets(arguments, tokenizer, block_size=256, vocab_size=vocab_size, do_train=False, do_eval=True)
    collate = CausalLMCollator(pad_token_id=tokenizer.pad_token_id)
    total, num_tokens = 0.0, 0
    for start in range(0, len(rows), 8):
        batch = collate([rows[i] for i in range(start, min(start + 8, len(rows)))])
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, :-1].float()
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
        num_tokens += (labels != -100).sum().item()
    return total / num_tokens


def generate(model, tokenizer) -> str:
    torch.manual_seed(0)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    tokens = model.generate(
        **inputs, max_new_tokens=80, do_sample=True, temperature=0.7, top_p=0.9, pad_token_id=tokenizer.pad_token_id
    )
    text = tokenizer.decode(tokens[0], skip_special_tokens=True)
    return "\nA sample, after a few minutes of learning Python:\n\n" + "\n".join(
        f"    {line}" for line in text.split("\n")
    )


def print_summary(output_dir: Path, model, loss: float, difference: float) -> None:
    entries = [json.loads(line) for line in (output_dir / METRICS_NAME).read_text().splitlines()]
    steps = [entry for entry in entries if "loss" in entry]
    speeds = sorted(entry["tokens_per_second"] for entry in steps)
    first, last = steps[0], steps[-1]
    rows = {
        "loss": f"{first['loss']:.3f} at step {first['step']} → {last['loss']:.3f} at step {last['step']}",
        "evaluation": f"loss {loss:.4f}, perplexity {math.exp(loss):.2f}",
        "export = trainer": f"yes, evaluation losses differ by {difference:.1e}",
        "throughput": f"{speeds[len(speeds) // 2]:,.0f} tokens/s (median over the run)",
        "parameters": f"{model.num_parameters():,}",
        "export": f"{output_dir / 'hf'}",
    }
    width = max(map(len, rows))
    print("\nSummary\n" + "\n".join(f"  {name:<{width}}  {value}" for name, value in rows.items()))


NEXT = """
Next:
  .venv/bin/moe-hf generate {export} --prompt 'class Stack:'
  .venv/bin/deepspeed --num_accelerators 2 run_clm_moe.py --config_name quickstart --num_experts 16 \\
      --deepspeed ds_configs/zero2_ep.json --do_train --max_steps 100 --output_dir runs/sixteen
  .venv/bin/deepspeed --num_accelerators 2 run_clm_moe.py --config_name quickstart --train_file 'mine/*.jsonl' \\
      --tokenizer_name {export} --deepspeed ds_configs/zero3_ep.json --do_train --output_dir runs/mine"""


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
