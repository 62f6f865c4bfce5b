"""The runs of the self-test: what of a run they keep, and the command lines that they are started with."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path

from ..configuration_moe import MoEConfig
from ..parallel.deepspeed_config import Config
from ..training.checked_run import CheckedRun
from .layout import Layout, layout_of, shrunk, with_layout
from .one_process import Recipe
from .twin import make_rows, twin_of, write_rows, write_twin

NUM_STEPS, SAVED_STEP = 4, 2
EXACT, TRAIN, RESUME = "exact", "train", "resume"
_BLOCK_SIZE = 32
_BUCKET_SIZE = 1_000_000
# DeepSpeed's default of 16 skips the first steps of a small model.
_FP16_SCALE_POWER = 8
# Numbers of the run that are others here.
_SET_BY_FLAGS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
)


@dataclass(frozen=True)
class Trial:
    """A run scaled down.

    Args:
        config: of the small model.
        deepspeed_json: of the run, in the layout of the trial.
        layout: processes and what they share.
        recipe: batches and numbers of the optimizer.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`, in which the run trains.
        gradient_checkpointing: whether the run recomputes activations.
    """

    config: MoEConfig
    deepspeed_json: Config
    layout: Layout
    recipe: Recipe
    dtype: str
    gradient_checkpointing: bool

    def describe(self) -> str:
        """Return what is tried, such as `2 processes, EP 2, ZeRO 3, 4 layers (4 sparse), 8 experts, k 2`."""
        config = self.config
        zero = self.deepspeed_json["zero_optimization"].get("stage", 0)
        layers = f"{config.num_hidden_layers} layers ({config.num_sparse_layers} sparse)"
        experts = f"{config.num_experts} experts, k {config.num_experts_per_tok}"
        return f"{self.layout.describe()}, ZeRO {zero}, {layers}, {experts}, float32" + (
            "" if self.dtype == "float32" else f" and {self.dtype}"
        )

    @property
    def exact(self) -> str:
        """Name of the run in float32, which is compared with one process."""
        return TRAIN if self.dtype == "float32" else EXACT

    def rows(self) -> list[dict]:
        """Return the rows that every run of the trial reads, from the first one."""
        return make_rows(self.recipe.num_rows, self.config.vocab_size, 2 * self.layout.sequence)


def trial_of(run: CheckedRun, num_ranks: int) -> Trial:
    """Scale a run down to `num_ranks` processes.

    Args:
        run: with a DeepSpeed JSON.
        num_ranks: processes of the trial, at most those of the run.
    """
    namespace, wanted = run.namespace, layout_of(run.deepspeed_json, run.topology.world_size)
    layout = shrunk(wanted, num_ranks, run.config.num_experts)
    recipe = Recipe(
        num_steps=NUM_STEPS,
        micro_batches_per_step=min(2, namespace.gradient_accumulation_steps),
        data_ranks=layout.data,
        rows_per_rank=2 if layout.data < 4 else 1,
    )
    checkpointing = bool(namespace.gradient_checkpointing)
    config = twin_of(run.config, least_layers=layout.pipeline)
    return Trial(config, _scaled_json(run.deepspeed_json, layout), layout, recipe, run.topology.dtype, checkpointing)


def _scaled_json(config: Config, layout: Layout) -> Config:
    """Return the DeepSpeed JSON of the trial: as the run's, without numbers that belong to its size."""
    config = with_layout(copy.deepcopy(config), layout)
    # Optimizers of DeepSpeed compile for minutes, and make other steps than the one process's AdamW.
    config.pop("optimizer", None)
    config |= dict.fromkeys(_SET_BY_FLAGS, "auto")
    for name, more in (("bf16", {}), ("fp16", {"initial_scale_power": _FP16_SCALE_POWER})):
        config[name] = config.get(name, {}) | {"enabled": "auto"} | more
    zero = config["zero_optimization"]
    if zero.get("reduce_bucket_size", "auto") != "auto":
        # Every rank allocates as much.
        zero["reduce_bucket_size"] = min(zero["reduce_bucket_size"], _BUCKET_SIZE)
    if zero.get("offload_optimizer", {}).get("device", "none") != "none":
        config["zero_force_ds_cpu_optimizer"] = False
    return config


def write_plan(trial: Trial, folder: Path) -> Path:
    """Write model, rows, JSON and the command lines of all runs to `folder`; return the path of the plan."""
    write_twin(trial.config, folder / "model")
    write_rows(trial.rows(), folder / "rows.jsonl")
    (folder / "deepspeed.json").write_text(json.dumps(trial.deepspeed_json, indent=2))
    saves = {"save_strategy": "steps", "save_steps": SAVED_STEP}
    in_its_dtype = {"bf16": trial.dtype == "bfloat16", "fp16": trial.dtype == "float16"}
    runs = {EXACT: {"save_strategy": "no"}} if trial.exact == EXACT else {}
    runs[TRAIN] = saves | in_its_dtype
    checkpoint = folder / TRAIN / f"checkpoint-{SAVED_STEP}"
    runs[RESUME] = saves | in_its_dtype | {"save_steps": NUM_STEPS, "resume_from_checkpoint": checkpoint}
    # Its parts of tensors and layers are put together by the export only.
    gathers = trial.layout.tensor == trial.layout.pipeline == 1
    cases = [
        {"name": name, "argv": command_line(trial, folder, name, **flags), "gathers": gathers}
        for name, flags in runs.items()
    ]
    plan = folder / "plan.json"
    plan.write_text(json.dumps({"cases": cases}, indent=2))
    return plan


def command_line(trial: Trial, folder: Path, name: str, **others) -> list[str]:
    """Return the words after `run_clm_moe.py` for one run, which writes to `folder/NAME`."""
    recipe = trial.recipe
    flags = {
        "model_name_or_path": folder / "model",
        "train_file": folder / "rows.jsonl",
        "validation_split_percentage": 0,
        "output_dir": folder / name,
        "deepspeed": folder / "deepspeed.json",
        "block_size": _BLOCK_SIZE,
        "max_steps": recipe.num_steps,
        "per_device_train_batch_size": recipe.rows_per_rank,
        "gradient_accumulation_steps": recipe.micro_batches_per_step,
        "gradient_checkpointing": trial.gradient_checkpointing,
        "learning_rate": recipe.learning_rate,
        "weight_decay": recipe.weight_decay,
        "adam_epsilon": recipe.adam_epsilon,
        "max_grad_norm": recipe.max_grad_norm,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "disable_tqdm": True,
        "report_to": "none",
        "do_train": True,
    } | others
    return [str(word) for flag, value in flags.items() for word in (f"--{flag}", value)]
