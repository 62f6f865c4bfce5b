"""What `moe-hf plan` predicts against real engines: bytes that every rank holds, and what DeepSpeed logs of messages.

The model and the options here were not looked at when the formulas were written. --slow runs the rest of ZeRO x EP x
precision on two ranks, and four ranks, where experts have replicas over which ZeRO shares their states.
"""

import json
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import pytest
from launching import run_cases
from small import deepspeed_json, flags, recipe, save_small_model, small_config

from benchmarks.engine_formulas import LOGGED, OPERATIONS, predicted_messages, predicted_states
from moe_hf.parallel.parallel_sizes import with_parallel_sizes
from moe_hf.planning.setting import read_setting

ROW_LENGTH = 40
MODEL = {
    "vocab_size": 384,
    "hidden_size": 80,
    "intermediate_size": 200,
    "moe_intermediate_size": 56,
    "num_hidden_layers": 5,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "shared_expert_intermediate_size": 0,
    "shared_expert_gate": False,
    "attention_gate": "headwise",
}
# By how much a prediction may be wrong.
STATES, MESSAGES = 0.05, 0.02

FAR = {"stage3_param_persistence_threshold": 100}
# Weights are let go of and gathered again.
NEAR = FAR | {"stage3_max_reuse_distance": 30_000, "stage3_prefetch_bucket_size": 7_000}
NEVER = {"stage3_param_persistence_threshold": 1_000, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}


@dataclass(frozen=True)
class Cell:
    """One run; `ep` `None` is AutoEP off."""

    ranks: int
    zero: int
    ep: int | None
    dtype: str
    checkpointing: bool = False
    options: dict = field(default_factory=dict, hash=False)
    sections: dict = field(default_factory=dict, hash=False)
    slow: bool = True
    tp: int = 1

    @property
    def name(self) -> str:
        more = "".join(f"-{key}" for key in [*self.options, *self.sections]) + f"-tp{self.tp}" * (self.tp > 1)
        ep = "off" if self.ep is None else self.ep
        return f"ranks{self.ranks}-zero{self.zero}-ep_{ep}-{self.dtype}{'-ckpt' * self.checkpointing}{more}"

    @property
    def json(self) -> dict:
        config = deepspeed_json(self.zero, self.ep, comms_logger=LOGGED, **self.sections)
        config["zero_optimization"] |= {"reduce_bucket_size": 30_000} | self.options
        return with_parallel_sizes(config, tensor=self.tp)

    @property
    def readers(self) -> int:
        """Ranks with rows of their own."""
        return self.ranks // self.tp

    @cached_property
    def config(self):
        return small_config(**MODEL)

    @cached_property
    def setting(self):
        return read_setting(
            self.json,
            MODEL["hidden_size"],
            self.ranks,
            self.dtype,
            micro_batch=4 // self.readers,
            sequence_length=ROW_LENGTH,
            accumulation=2,
            checkpointing=self.checkpointing,
        )


CELLS = [
    Cell(2, 0, None, "bf16", slow=False),
    Cell(2, 1, 2, "bf16", checkpointing=True, slow=False),
    Cell(2, 2, None, "fp32", slow=False),
    Cell(2, 2, None, "fp32", options={"use_multi_rank_bucket_allreduce": False}, slow=False),
    Cell(2, 2, 2, "bf16", slow=False),
    Cell(2, 3, None, "bf16", checkpointing=True, options=NEAR, slow=False),
    Cell(2, 3, 2, "bf16", checkpointing=True, options=NEVER, slow=False),
    Cell(2, 3, 2, "fp32", options=FAR, slow=False),
    Cell(2, 0, None, "fp32"),
    Cell(2, 1, None, "bf16"),
    Cell(2, 1, None, "fp32", checkpointing=True),
    Cell(2, 1, 2, "fp32"),
    Cell(2, 2, None, "bf16", options={"use_multi_rank_bucket_allreduce": False}),
    Cell(2, 2, 2, "fp32", checkpointing=True),
    Cell(2, 2, None, "bf16", sections={"data_types": {"grad_accum_dtype": "fp32"}}),
    Cell(2, 3, None, "fp32", options=NEVER),
    Cell(2, 3, None, "bf16", sections={"data_types": {"grad_accum_dtype": "fp32"}}),
    *(Cell(4, zero, ep, "bf16", zero > 1) for zero in (1, 2, 3) for ep in (None, 2, 4)),
    Cell(4, 2, 2, "fp32", checkpointing=True, options={"use_multi_rank_bucket_allreduce": False}),
    Cell(4, 3, 2, "fp32", checkpointing=True, options=NEAR),
    Cell(4, 3, 1, "bf16", options=NEVER),
    Cell(2, 1, None, "fp32", tp=2),
    Cell(2, 2, 2, "bf16", checkpointing=True, tp=2),
    Cell(2, 3, None, "bf16", options=FAR, tp=2),
    Cell(4, 3, None, "bf16", options=FAR, tp=2),
    Cell(4, 1, 2, "bf16", tp=2),
    Cell(4, 2, 2, "bf16", tp=2),
    Cell(4, 3, 4, "fp32", checkpointing=True, options=FAR, tp=2),
]
DEFAULT = [cell for cell in CELLS if not cell.slow]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The folder of the model, and beside it rows that are equally long, so that the number of tokens is known."""
    folder = tmp_path_factory.mktemp("planned")
    save_small_model(folder / "model", **MODEL)
    row = {"input_ids": [3 + i % 100 for i in range(ROW_LENGTH)], "attention_mask": [1] * ROW_LENGTH}
    text = json.dumps(row | {"labels": row["input_ids"]})
    (folder / "rows.jsonl").write_text("\n".join([text] * 64) + "\n")
    return folder


def measure(cells: list[Cell], model: Path, folder: Path) -> dict[str, list[dict]]:
    """Train every cell and return what each of its ranks has written down."""
    cases = []
    for cell in cells:
        path = folder / f"{cell.name}.json"
        path.write_text(json.dumps(cell.json))
        words = flags(
            replace(recipe([], 2), num_steps=3),
            cell.readers,
            model_name_or_path=model / "model",
            train_file=model / "rows.jsonl",
            output_dir=folder / "out" / cell.name,
            deepspeed=path,
            block_size=ROW_LENGTH,
            bf16=cell.dtype == "bf16",
            gradient_checkpointing=cell.checkpointing,
            report_to="none",
        )
        cases.append({"name": cell.name, "argv": words})
    run_cases(cells[0].ranks, cases, folder, module="benchmarks.engine_worker")
    return {
        cell.name: [json.loads((folder / cell.name / f"rank_{r}.json").read_text()) for r in range(cell.ranks)]
        for cell in cells
    }


@pytest.fixture(scope="module")
def measured(model, tmp_path_factory) -> dict[str, list[dict]]:
    return measure(DEFAULT, model, tmp_path_factory.mktemp("measured"))


@pytest.fixture(
    scope="module", params=[(2, 1), (4, 1), (2, 2), (4, 2)], ids=lambda sizes: "ranks{}-tp{}".format(*sizes)
)
def rest(request, model, tmp_path_factory) -> tuple[list[Cell], dict[str, list[dict]]]:
    """DeepSpeed keeps its tensor-parallel groups for the whole launch."""
    cells = [cell for cell in CELLS if cell.slow and (cell.ranks, cell.tp) == request.param]
    return cells, measure(cells, model, tmp_path_factory.mktemp("measured"))


@pytest.mark.parametrize("cell", DEFAULT, ids=lambda cell: cell.name)
def test_states_are_as_predicted(cell, measured):
    assert_states(cell, measured[cell.name])


@pytest.mark.parametrize("cell", DEFAULT, ids=lambda cell: cell.name)
def test_messages_are_as_predicted(cell, measured):
    assert_messages(cell, measured[cell.name])


def test_reducing_sends_less_than_all_reducing(measured):
    """As shipped configurations do under ZeRO 2; the weights that are gathered afterwards are the same bytes."""
    shipped = Cell(2, 2, None, "fp32", options={"use_multi_rank_bucket_allreduce": False})
    default = replace(shipped, options={})
    sent, sent_by_default = (sum(rank["sent"] for rank in measured[cell.name]) for cell in (shipped, default))
    gathered = predicted_messages(shipped.config, shipped.setting)["all_gather_into_tensor"]
    # gloo's reduce scatters and gathers at one rank: (W - 1) (1 + 1 / W) times the bytes instead of 2 (W - 1) times.
    assert sent - 2 * gathered == pytest.approx(0.75 * (sent_by_default - 2 * gathered), rel=0.02)


@pytest.mark.slow
def test_the_rest_of_the_matrix_is_as_predicted(rest):
    cells, ranks_of = rest
    for cell in cells:
        assert_states(cell, ranks_of[cell.name])
        assert_messages(cell, ranks_of[cell.name])


def assert_states(cell: Cell, ranks: list[dict]) -> None:
    """Compare weights, gradients and optimizer states, each by itself, on every rank."""
    for rank, found in enumerate(ranks):
        for kind, predicted in predicted_states(cell.config, cell.setting, rank).items():
            assert predicted == pytest.approx(found["held"][kind], rel=STATES), (cell.name, rank, kind)


def assert_messages(cell: Cell, ranks: list[dict]) -> None:
    """Compare every operation's bytes in one step, on average over ranks: experts get unequal numbers of tokens."""
    predicted = predicted_messages(cell.config, cell.setting)
    of_step = sum(predicted.values())
    for operation in OPERATIONS:
        found = sum(rank["messages"].get(operation, 0) for rank in ranks) / len(ranks)
        # Norms and flags of single numbers are not predicted.
        assert predicted[operation] == pytest.approx(found, rel=MESSAGES, abs=1e-3 * of_step), (cell.name, operation)
