"""The suites `memory` and `comm`: what ranks hold and send under ZeRO and expert parallelism, beside the formulas."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moe_hf import MoEConfig
from moe_hf.planning.setting import Setting, read_setting

from .engine_formulas import (
    LOGGED,
    OPERATIONS,
    STATES,
    ideal_states,
    predicted_messages,
    predicted_sent,
    predicted_states,
)
from .peers.registry import OURS
from .results import Row

ROOT = Path(__file__).resolve().parent.parent
FORMULA, ALL_REDUCE = "formula", "use_multi_rank_bucket_allreduce"

_MODEL = {
    "vocab_size": 512,
    "hidden_size": 128,
    "moe_intermediate_size": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}
_ROW_LENGTH = 64
_ACCUMULATION, _SEQUENCES = 2, 4
_TIMEOUT = 900

# Of all messages of a step: norms and flags of single numbers are less, and have no formula.
_NOT_PREDICTED = 1e-3


@dataclass(frozen=True)
class EngineCase:
    """One run.

    Args:
        ranks: processes.
        zero: stage.
        ep: ranks that share one set of experts; `None` is without AutoEP, every rank holding all.
        reduces: ZeRO 1 and 2 reduce a gradient to the rank that needs it, as in ds_configs, and do not all-reduce.
    """

    ranks: int
    zero: int
    ep: int | None
    reduces: bool = True

    @property
    def name(self) -> str:
        """For a reader, and for a folder."""
        all_reduced = "" if self.reduces else ", all-reduced"
        return f"ZeRO {self.zero}, EP {self.ep or 'off'}, {self.ranks} ranks{all_reduced}"

    @property
    def deepspeed_json(self) -> dict:
        """The DeepSpeed JSON; at ZeRO 3 with thresholds that suit so small a model."""
        config = {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "train_batch_size": "auto",
            "gradient_clipping": "auto",
            "bf16": {"enabled": "auto"},
            "zero_optimization": {"stage": self.zero, "reduce_bucket_size": 200_000},
            "comms_logger": LOGGED,
        }
        if self.zero == 3:
            config["zero_optimization"] |= {"stage3_param_persistence_threshold": 1000}
        else:
            config["zero_optimization"] |= {"use_multi_rank_bucket_allreduce": not self.reduces}
        if self.ep is not None:
            config["expert_parallel"] = {"enabled": True, "autoep_size": self.ep}
        return config

    @cached_property
    def setting(self) -> Setting:
        """As the formulas read it."""
        return read_setting(
            self.deepspeed_json,
            _MODEL["hidden_size"],
            self.ranks,
            "bf16",
            micro_batch=_SEQUENCES // self.ranks,
            sequence_length=_ROW_LENGTH,
            accumulation=_ACCUMULATION,
            checkpointing=False,
        )


def engine_cases(ranks: Iterable[int] = (2, 4)) -> list[EngineCase]:
    """Return ZeRO 1, 2 and 3 without AutoEP and with experts divided over 2 ranks, and over 4 where there are.

    And ZeRO 2 with DeepSpeed's default for gradients.
    """
    sizes = [(number, ep) for number in ranks for ep in (None, 2, 4) if ep is None or ep <= number]
    as_shipped = [EngineCase(number, zero, ep) for number, ep in sizes for zero in (1, 2, 3)]
    return as_shipped + [EngineCase(number, 2, None, reduces=False) for number in ranks]


def run_engines(cases: list[EngineCase], suites: set[str]) -> Iterator[Row]:
    """Train every case for three steps, and yield what was measured beside what the formulas say.

    Args:
        cases: the runs.
        suites: `"memory"`, `"comm"` or both.
    """
    config = MoEConfig(**_MODEL)
    with tempfile.TemporaryDirectory() as folder:
        _write_inputs(Path(folder), config)
        for ranks in dict.fromkeys(case.ranks for case in cases):
            together = [case for case in cases if case.ranks == ranks]
            print(f"{' and '.join(sorted(suites))}: {ranks} ranks", file=sys.stderr, flush=True)
            launch(ranks, [_command(case, Path(folder)) for case in together], Path(folder))
            for case in together:
                found = [json.loads((Path(folder) / case.name / f"rank_{r}.json").read_text()) for r in range(ranks)]
                if "memory" in suites:
                    yield from _memory_rows(case, config, found)
                if "comm" in suites:
                    yield from _comm_rows(case, config, found)
            if "comm" in suites:
                yield from _sent_rows(together, config, Path(folder))


def launch(ranks: int, cases: list[dict], folder: Path) -> None:
    """Run command lines of run_clm_moe.py over ranks on the CPU; each leaves its measurements in `folder/NAME`.

    Raises:
        RuntimeError: the launch ended with an error, whose last output is shown.
    """
    path = folder / f"cases_{ranks}.json"
    path.write_text(json.dumps(cases))
    words = ["--num_accelerators", ranks, "--module", "benchmarks.engine_worker", path, folder]
    done = subprocess.run(
        [sys.executable, "-m", "deepspeed.launcher.runner", *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=_TIMEOUT,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{ranks} ranks ended with {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


def _write_inputs(folder: Path, config: MoEConfig) -> None:
    (folder / "config.json").write_text(json.dumps(_MODEL))
    row = {"input_ids": [3 + i % 100 for i in range(_ROW_LENGTH)], "attention_mask": [1] * _ROW_LENGTH}
    text = json.dumps(row | {"labels": row["input_ids"]})
    (folder / "rows.jsonl").write_text("\n".join([text] * 64) + "\n")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(config.vocab_size)}, unk_token="w2"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1", unk_token="w2")
    tokenizer.save_pretrained(folder / "tokenizer")


def _command(case: EngineCase, folder: Path) -> dict:
    path = folder / f"{case.name}.json"
    path.write_text(json.dumps(case.deepspeed_json))
    flags = {
        "config_name": folder / "config.json",
        "tokenizer_name": folder / "tokenizer",
        "train_file": folder / "rows.jsonl",
        "validation_split_percentage": 0,
        "block_size": _ROW_LENGTH,
        "output_dir": folder / "out" / case.name,
        "deepspeed": path,
        "bf16": True,
        "max_steps": 3,
        "per_device_train_batch_size": _SEQUENCES // case.ranks,
        "gradient_accumulation_steps": _ACCUMULATION,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "do_train": True,
    }
    return {"name": case.name, "argv": [str(word) for name, value in flags.items() for word in (f"--{name}", value)]}


def _memory_rows(case: EngineCase, config: MoEConfig, ranks: list[dict]) -> Iterator[Row]:
    """Yield weights, gradients and optimizer states, each of the rank that is farthest from the formula."""
    for kind in STATES:
        pairs = [
            (found["held"][kind], predicted_states(config, case.setting, r)[kind]) for r, found in enumerate(ranks)
        ]
        row = _row("memory", case, kind, *max(pairs, key=lambda pair: abs(pair[0] / pair[1] - 1)))
        row.values["over_ideal"] = row.values["bytes"] / ideal_states(config, case.setting)[kind]
        yield row


def _comm_rows(case: EngineCase, config: MoEConfig, ranks: list[dict]) -> Iterator[Row]:
    """Yield every operation's bytes of one step, on average over ranks: experts get unequal numbers of tokens."""
    predicted = predicted_messages(config, case.setting)
    for operation in OPERATIONS:
        found = sum(rank["messages"].get(operation, 0) for rank in ranks) / len(ranks)
        if predicted[operation] or found > _NOT_PREDICTED * sum(predicted.values()):
            yield _row("comm", case, operation, found, predicted[operation])


def _sent_rows(cases: list[EngineCase], config: MoEConfig, folder: Path) -> Iterator[Row]:
    """Yield what all ranks have sent in one step, of pairs of cases that differ in how gradients are reduced."""
    for case in (case for case in cases if not case.reduces):
        for one, peer in ((replace(case, reduces=True), OURS), (case, ALL_REDUCE)):
            ranks = [json.loads((folder / one.name / f"rank_{r}.json").read_text()) for r in range(one.ranks)]
            sent, predicted = sum(rank["sent"] for rank in ranks), predicted_sent(config, one.setting)
            values = {"sent_bytes": sent, "sent_formula_bytes": predicted, "sent_over_formula": sent / predicted}
            name = f"{replace(case, reduces=True).name}: sent by all ranks"
            yield Row("comm", name, peer, "bf16", values=values)


def _row(suite: str, case: EngineCase, what: str, found: float, predicted: float) -> Row:
    over = found / predicted if predicted else float("inf")
    values = {"bytes": found, "formula_bytes": predicted, "over_formula": over}
    return Row(suite, f"{case.name}: {what}", FORMULA, "bf16", values=values)
