"""Optimizer and weights at rest in host memory or on NVMe: the run is the one of one process, and can be resumed.

The model is wide enough that DeepSpeed moves its optimizer and its experts to NVMe; norms and other small weights stay
in memory, as they do in every model. One launch of two ranks runs all cells, resumed ones included. Most need --slow,
all on NVMe do, because DeepSpeed compiles its operator first.
"""

import copy
import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import oracle
import pytest
import torch
from deepspeed.ops.op_builder import AsyncIOBuilder
from launching import ROOT, run_cases
from safetensors.torch import load_file
from small import NUM_STEPS, deepspeed_json, flags, recipe, save_small_model

from moe_hf import MoEForCausalLM
from moe_hf.checkpoint.convert import write_model
from moe_hf.checkpoint.offline import open_exportable
from moe_hf.checkpoint.sharded import ShardedCheckpoint

HAS_LIBAIO = AsyncIOBuilder().is_compatible()
WORKER = ROOT / "tests" / "distributed" / "offload_worker.py"
SAVED_STEP = 3
LOSS_TOLERANCE, WEIGHT_TOLERANCE = {False: 2e-6, True: 5e-3}, 1e-5
RATE = {False: 1e-3, True: 3e-5}
WIDE = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 2,
    "initializer_range": 0.05,
}
NVME_OPTIMIZER = {"device": "nvme", "buffer_count": 4}
NVME_WEIGHTS = {"device": "nvme", "buffer_count": 8, "buffer_size": 600_000, "max_in_cpu": 0}
CPU = {"device": "cpu"}


@dataclass(frozen=True)
class Cell:
    """A layout of two ranks, and what of it rests where; `ep` `None` is AutoEP off."""

    name: str
    zero: int
    ep: int | None
    optimizer: dict | None
    weights: dict | None = None
    bf16: bool = False
    others: dict = field(default_factory=dict)
    resumes: str | None = None

    @property
    def is_slow(self) -> bool:
        """The others, all on NVMe among them, take minutes."""
        return self.name not in ("cpu_zero2_ep", "cpu_both_ep", "cpu_both_ep_resumed")

    @property
    def uses_nvme(self) -> bool:
        """Whether anything rests on NVMe."""
        return any(section and section["device"] == "nvme" for section in (self.optimizer, self.weights))

    @property
    def config(self) -> dict:
        """The DeepSpeed JSON."""
        config = deepspeed_json(self.zero, self.ep, zero_force_ds_cpu_optimizer=False)
        zero = config["zero_optimization"] | copy.deepcopy(self.others)
        zero |= {} if self.optimizer is None else {"offload_optimizer": dict(self.optimizer)}
        zero |= {} if self.weights is None else {"offload_param": dict(self.weights), "stage3_max_reuse_distance": 0}
        return config | {"zero_optimization": zero}


def _cells() -> list[Cell]:
    """Return every layout, then runs that resume from them: each from its own, some from another's."""
    pipelines = NVME_OPTIMIZER | {"buffer_count": 12, "pipeline_read": True, "pipeline_write": True}
    pieces = {"sub_group_size": 300_000}
    cells = [
        Cell("nvme_both_ep", 3, 2, NVME_OPTIMIZER, NVME_WEIGHTS),
        Cell("nvme_both", 3, None, NVME_OPTIMIZER, NVME_WEIGHTS, others=pieces),
        Cell("nvme_optimizer", 3, None, NVME_OPTIMIZER),
        Cell("nvme_optimizer_ep", 3, 2, NVME_OPTIMIZER),
        Cell("nvme_bf16", 3, None, NVME_OPTIMIZER, NVME_WEIGHTS, bf16=True),
        Cell("nvme_bf16_ep", 3, 2, NVME_OPTIMIZER, NVME_WEIGHTS, bf16=True),
        Cell("nvme_pipelines_ep", 3, 2, pipelines, NVME_WEIGHTS, others=pieces),
    ]
    for ep, suffix in ((None, ""), (2, "_ep")):
        cells += [Cell(f"cpu_zero{zero}{suffix}", zero, ep, CPU) for zero in (1, 2, 3)]
        cells += [Cell(f"cpu_both{suffix}", 3, ep, CPU, CPU)]
    return [
        *cells,
        *(replace(cell, name=f"{cell.name}_resumed", resumes=cell.name) for cell in cells),
        Cell("nvme_to_plain", 3, 2, None, resumes="nvme_both_ep"),
        Cell("nvme_to_cpu", 3, 2, CPU, CPU, resumes="nvme_both_ep"),
        Cell("cpu_to_nvme", 3, 2, NVME_OPTIMIZER, NVME_WEIGHTS, resumes="cpu_both_ep"),
        Cell("nvme_to_zero2", 2, None, None, resumes="nvme_both_ep"),
        Cell("zero2_to_nvme", 3, None, NVME_OPTIMIZER, NVME_WEIGHTS, resumes="cpu_zero2_ep"),
    ]


ALL = _cells()
BY_NAME = {cell.name: cell for cell in ALL}
WHOLE = [cell for cell in ALL if cell.resumes is None]
ON_NVME = [cell for cell in WHOLE if cell.optimizer and cell.optimizer["device"] == "nvme"]


def each(cells: list[Cell]) -> pytest.MarkDecorator:
    """Return what runs a test for every one of these cells, for slow ones if asked."""

    def marks(cell: Cell) -> list[pytest.MarkDecorator]:
        without = pytest.mark.skipif(not HAS_LIBAIO and "nvme" in cell.name, reason="needs the headers of libaio")
        return [without, pytest.mark.slow] if cell.is_slow else [without]

    return pytest.mark.parametrize("cell", [pytest.param(c, id=c.name, marks=marks(c)) for c in cells])


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wide_model")
    save_small_model(folder, **WIDE)
    return folder


@pytest.fixture(scope="module")
def lab(request, wide_model, rows_file, tmp_path_factory) -> Path:
    """Folder with the output of every cell, and in `results` what the worker has recorded of it."""
    folder = tmp_path_factory.mktemp("offload")
    (folder / "disk").mkdir()
    chosen = [cell for cell in ALL if request.config.getoption("--slow") or not cell.is_slow]
    chosen = [cell for cell in chosen if HAS_LIBAIO or "nvme" not in cell.name]

    def case(cell: Cell) -> dict:
        path = folder / f"{cell.name}.json"
        path.write_text(json.dumps(cell.config))
        words = {
            "model_name_or_path": wide_model,
            "train_file": rows_file,
            "output_dir": folder / cell.name,
            "deepspeed": path,
            "bf16": cell.bf16,
            "save_strategy": "steps",
            "save_steps": SAVED_STEP,
        }
        if cell.uses_nvme:
            words["nvme_path"] = folder / "disk"
        if cell.resumes is not None:
            words["resume_from_checkpoint"] = folder / cell.resumes / f"checkpoint-{SAVED_STEP}"
        return {"name": cell.name, "argv": flags(recipe([], 2, RATE[cell.bf16]), 2, **words)}

    run_cases(2, [case(cell) for cell in chosen], folder / "results", worker=WORKER)
    return folder


@pytest.fixture(scope="module")
def one_process(wide_model, rows) -> dict[bool, oracle.Trajectory]:
    """What one process gives, by whether it computes in BF16."""

    def train(bf16: bool) -> oracle.Trajectory:
        model = MoEForCausalLM.from_pretrained(wide_model).train()
        if bf16:
            return oracle.train(model, recipe(rows, 2, RATE[True]), torch.bfloat16, pieces=2)
        return oracle.train(model, recipe(rows, 2))

    return {bf16: train(bf16) for bf16 in (False, True)}


def logged(lab: Path, name: str) -> list[dict]:
    history = json.loads((lab / "results" / name / "result.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry]


def exported(lab: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(lab / name / "hf" / "model.safetensors")


@each(WHOLE)
def test_run_is_that_of_one_process(cell, lab, one_process):
    steps, expected, tolerance = logged(lab, cell.name), one_process[cell.bf16], LOSS_TOLERANCE[cell.bf16]
    assert len(steps) == NUM_STEPS
    assert [entry["loss"] for entry in steps] == pytest.approx(expected.losses, rel=tolerance)
    assert [entry["grad_norm"] for entry in steps] == pytest.approx(expected.grad_norms, rel=tolerance)
    for name, tensor in exported(lab, cell.name).items() if not cell.bf16 else ():
        distance = (tensor - expected.weights[name]).norm() / expected.weights[name].norm()
        assert distance <= WEIGHT_TOLERANCE, name


@each([cell for cell in WHOLE if not cell.bf16])
def test_gradient_norms_by_family_are_those_of_one_process(cell, lab, one_process):
    lines = [json.loads(line) for line in (lab / cell.name / "metrics.jsonl").read_text().splitlines()]
    for entry, expected in zip(
        (line for line in lines if "loss" in line), one_process[False].family_norms, strict=True
    ):
        assert {family: entry[f"grad_norm/{family}"] for family in expected} == pytest.approx(expected, rel=1e-6)


@each([cell for cell in ALL if cell.resumes is not None])
def test_a_resumed_run_ends_as_the_whole_one(cell, lab):
    """To the last bit where the JSON has stayed; where something else rests, norms are summed in another order."""
    whole = BY_NAME[cell.resumes]
    stays = cell.config == whole.config
    ours, expected = logged(lab, cell.name), logged(lab, whole.name)
    assert len(ours) == len(expected) == NUM_STEPS
    for key in ("loss", "grad_norm"):
        values = [entry[key] for entry in expected]
        assert [entry[key] for entry in ours] == (values if stays else pytest.approx(values, rel=1e-5)), key
    ended = exported(lab, cell.name)
    for name, tensor in exported(lab, whole.name).items():
        same = torch.equal(tensor, ended[name]) if stays else (tensor - ended[name]).norm() <= 1e-5 * tensor.norm()
        assert same, name


@each(ON_NVME)
def test_a_checkpoint_holds_what_was_on_nvme(cell, lab, tmp_path):
    """It is read and exported like any other: the weights and both moments of every parameter."""
    saved = lab / cell.name / f"checkpoint-{SAVED_STEP}"
    assert not list(saved.rglob("*.swp"))
    checkpoint = ShardedCheckpoint(saved)
    assert set(checkpoint.state_names) == {"fp32", "exp_avg", "exp_avg_sq"} and checkpoint.step == SAVED_STEP
    for name in checkpoint.shapes:
        assert checkpoint.read(name, "exp_avg_sq").max() > 0, name
    write_model(open_exportable(saved), tmp_path / "hf")
    live = load_file(saved / "hf" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "hf" / "model.safetensors").items():
        assert torch.equal(tensor, live[name]), name


@each(ON_NVME)
def test_what_rests_on_nvme_is_not_in_memory(cell, lab, wide_model):
    numel = sum(tensor.numel() for tensor in load_file(wide_model / "model.safetensors").values())
    for counts in json.loads((lab / cell.name / "bytes.json").read_text()):
        # All but the norms, and what is left of a sub-group: 12 bytes a parameter, of which each rank has half.
        assert counts["optimizer_on_nvme"] > 0.8 * 12 * numel / 2, counts
        assert counts["optimizer_in_memory"] < 0.2 * 12 * numel / 2, counts
        if cell.weights is not None and not cell.bf16:
            assert counts["params_on_nvme"] > 0.5 * 4 * numel / 2, counts
            # The last that were used are still in their buffers.
            assert counts["params_in_memory"] < 0.4 * 4 * numel / 2, counts


@pytest.mark.slow
def test_nothing_is_left_on_the_disk(lab):
    assert list((lab / "disk").iterdir()) == []
