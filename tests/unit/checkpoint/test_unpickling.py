"""Nothing in a checkpoint's files is run: they hold tensors and plain values, or are refused."""

import os
import pickle
import random
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from deepspeed_files import STEP, Run, draw_states, live_model, odd_config, write_checkpoint

from moe_hf.checkpoint import unpickling
from moe_hf.checkpoint.sharded import ShardedCheckpoint
from moe_hf.errors import CheckpointError


@pytest.fixture
def sentinel(tmp_path) -> Path:
    """A file that appears when code out of a pickle has run."""
    return tmp_path / "sentinel"


class Calls:
    """Pickles as a call."""

    def __init__(self, function, *arguments) -> None:
        self._call = function, arguments

    def __reduce__(self):
        return self._call


class OfTheUser:
    """A class that a file names; as its state is set, it runs code."""

    def __init__(self, sentinel: Path) -> None:
        self.path = str(sentinel)

    def __setstate__(self, state) -> None:
        Path(state["path"]).touch()


def attacks(sentinel: Path) -> dict[str, object]:
    code = f"open({str(sentinel)!r}, 'w')"
    return {
        "os.system": Calls(os.system, f"touch {sentinel}"),
        "eval": Calls(eval, code),
        "exec": Calls(exec, code),
        "open": Calls(open, str(sentinel), "w"),
        "class": OfTheUser(sentinel),
        "subprocess": Calls(subprocess.Popen, ["touch", str(sentinel)]),
    }


ATTACKS = sorted(attacks(Path()))


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        unpickling.load(path)
    sentence = str(caught.value)
    assert str(path) in sentence and "\n" not in sentence
    return sentence


# --------------------------------------------------------------------------------------------------------------------
# What is read


def test_tensors_plain_values_and_deepspeeds_records(tmp_path):
    content = {
        "tensors": [torch.arange(5.0), torch.ones(2, 3, dtype=torch.bfloat16)],
        "values": {"text": "ä", "number": 3, "none": None, "flags": (True, 0.5), "shape": torch.Size([2, 3])},
        "address": fragment_address(numel=7, start=11),
        "stage": ZeroStageEnum(2),
        "scalers": [LossScaler(scale=2.0), DynamicLossScaler(1.0, 2.0, 1000, 1.0, 1, False, False)],
    }
    torch.save(content, tmp_path / "file.pt")
    found = unpickling.load(tmp_path / "file.pt")
    assert all(torch.equal(a, b) for a, b in zip(found["tensors"], content["tensors"], strict=True))
    assert found["values"] == content["values"]
    assert (found["address"].numel, found["address"].start) == (7, 11)
    assert found["stage"] == 2 and type(found["stage"]) is int
    modules = {type(value).__module__ for value in (found["address"], *found["scalers"])}
    assert modules == {"moe_hf.checkpoint.unpickling"}


def test_tensors_stay_on_the_disk_until_they_are_touched(tmp_path):
    path = tmp_path / "file.pt"
    torch.save({"x": torch.zeros(4)}, path)
    found = unpickling.load(path)["x"]
    assert str(path) in Path("/proc/self/maps").read_text()
    found += 1
    assert torch.equal(unpickling.load(path)["x"], torch.zeros(4)), "the file was changed"


def test_deepspeed_is_not_imported(tmp_path):
    model = live_model(odd_config())
    states = draw_states(model)
    for zero in (2, 3):
        write_checkpoint(tmp_path / f"checkpoint-{zero}", Run(2, zero, 2, bf16=True), model, states)
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from moe_hf.checkpoint.sharded import ShardedCheckpoint\n"
        "for path in sys.argv[1:]:\n"
        "    checkpoint = ShardedCheckpoint(Path(path))\n"
        "    assert all(checkpoint.read(name).isfinite().all() for name in checkpoint.shapes)\n"
        "print(sorted(name for name in sys.modules if name.partition('.')[0] == 'deepspeed'))\n"
    )
    paths = [str(path) for path in sorted(tmp_path.glob("checkpoint-*"))]
    ended = subprocess.run([sys.executable, "-c", program, *paths], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout) == (0, "[]\n"), ended.stderr[-2000:]


# --------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize("attack", ATTACKS)
def test_calls_and_classes_are_refused(tmp_path, sentinel, attack):
    evil = attacks(sentinel)[attack]
    torch.save({"module": evil}, tmp_path / "file.pt")
    assert "holds an object of " in refusal(tmp_path / "file.pt")
    assert not sentinel.exists()
    # Where pickles are believed it runs, so that it would have been seen here.
    made = torch.load(tmp_path / "file.pt", weights_only=False)["module"]
    if isinstance(made, subprocess.Popen):
        made.wait()
    assert sentinel.exists()


@pytest.mark.parametrize("function", [getattr, __import__, torch.load, pickle.loads, type, object.__subclasshook__])
def test_other_functions_are_refused(tmp_path, function):
    torch.save({"module": [Calls(function, "os")]}, tmp_path / "file.pt")
    assert "holds an object of " in refusal(tmp_path / "file.pt")


@pytest.mark.parametrize("attack", ["eval", "os.system", "class"])
@pytest.mark.parametrize(
    "place", ["model file", "optimizer file", "state", "address", "mapping", "scaler", "stage", "shape", "buffer name"]
)
def test_every_file_and_place_of_a_checkpoint(tmp_path, sentinel, attack, place):
    model = live_model(odd_config())
    checkpoint = write_checkpoint(tmp_path / "checkpoint-3", Run(2, 2, 2), model, draw_states(model))
    shards = checkpoint / f"global_step{STEP}"
    evil = attacks(sentinel)[attack]
    in_model_file = place in ("model file", "shape", "buffer name")
    path = shards / ("mp_rank_00_model_states.pt" if in_model_file else "zero_pp_rank_1_mp_rank_00_optim_states.pt")
    content = torch.load(path, weights_only=False)
    optimizer = content.get("optimizer_state_dict") or {}
    match place:
        case "model file" | "optimizer file":
            content["more"] = [[{"deep": (evil,)}]]
        case "state":
            optimizer["base_optimizer_state"]["state"][0]["exp_avg"] = evil
        case "address":
            next(iter(optimizer["param_slice_mappings"][0].values())).start = evil
        case "mapping":
            optimizer["param_slice_mappings"] = evil
        case "scaler":
            optimizer["loss_scaler"].cur_scale = evil
        case "stage":
            optimizer["zero_stage"] = evil
        case "shape":
            content["param_shapes"][0]["lm_head.weight"] = evil
        case "buffer name":
            content["buffer_names"].append(evil)
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=path.name):
        ShardedCheckpoint(checkpoint)
    assert not sentinel.exists()


def test_an_attribute_of_a_tensor_is_no_way_in(tmp_path, sentinel):
    tensor = torch.zeros(3)
    tensor.more = Calls(eval, f"open({str(sentinel)!r}, 'w')")
    torch.save({"x": torch.nn.Parameter(tensor), "y": tensor}, tmp_path / "file.pt")
    refusal(tmp_path / "file.pt")
    assert not sentinel.exists()


# --------------------------------------------------------------------------------------------------------------------
# Hand-made pickles against the names that are allowed


def name(path: str) -> bytes:
    module, _, attribute = path.rpartition(".")
    return b"c" + module.encode() + b"\n" + attribute.encode() + b"\n"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def small_int(value: int) -> bytes:
    return b"K" + bytes([value])


EMPTY_TUPLE, TUPLE1, TUPLE2, REDUCE, NEWOBJ, BUILD, EMPTY_DICT, SETITEM, STOP = (
    b")", b"\x85", b"\x86", b"R", b"\x81", b"b", b"}", b"s", b"."
)  # fmt: skip
ADDRESS = name("deepspeed.utils.tensor_fragment.fragment_address")
STAGE = name("deepspeed.runtime.zero.config.ZeroStageEnum")
SCALER = name("deepspeed.runtime.fp16.loss_scaler.LossScaler")
AN_ADDRESS = ADDRESS + EMPTY_TUPLE + NEWOBJ


def hand_made(path: Path, pickled: bytes) -> Path:
    """Write an archive of `torch.save` whose pickle is these bytes."""
    torch.save({"x": torch.zeros(2)}, path.with_suffix(".orig"))
    with zipfile.ZipFile(path.with_suffix(".orig")) as original, zipfile.ZipFile(path, "w") as made:
        for item in original.infolist():
            content = b"\x80\x02" + pickled + STOP if item.filename.endswith("/data.pkl") else original.read(item)
            made.writestr(item.filename, content)
    return path


def entry(key: str, value: bytes) -> bytes:
    return EMPTY_DICT + text(key) + value + SETITEM


def test_hand_made_files_are_read_at_all(tmp_path):
    found = unpickling.load(hand_made(tmp_path / "file.pt", AN_ADDRESS + entry("start", small_int(5)) + BUILD))
    assert type(found) is unpickling.Address and found.start == 5
    assert unpickling.load(hand_made(tmp_path / "file.pt", STAGE + small_int(3) + TUPLE1 + REDUCE)) == 3


SYSTEM = name("os.system")
HAND_MADE = {
    # An allowed class is called with what it does not take, or as if it were made.
    "arguments": ADDRESS + text("os") + text("system") + TUPLE2 + REDUCE,
    "stage from words": STAGE + text("__import__('os')") + TUPLE1 + REDUCE,
    "scaler with arguments": SCALER + small_int(1) + TUPLE1 + REDUCE,
    # A state that would put a method of the attacker's, or another class, in place.
    "setstate": AN_ADDRESS + entry("__setstate__", SYSTEM) + BUILD,
    "other class": AN_ADDRESS + b"N" + entry("__class__", STAGE) + TUPLE2 + BUILD,
    "other dict": AN_ADDRESS + b"N" + entry("__dict__", small_int(1)) + TUPLE2 + BUILD,
    "state of a number": STAGE + small_int(3) + TUPLE1 + REDUCE + entry("real", small_int(1)) + BUILD,
    "state of the class": ADDRESS + entry("numel", small_int(1)) + BUILD,
    "state that is no dict": AN_ADDRESS + small_int(7) + BUILD,
    "a method": name("deepspeed.utils.tensor_fragment.fragment_address.__init__") + EMPTY_TUPLE + REDUCE,
    "the module's import": name("moe_hf.checkpoint.unpickling.Path") + text("/") + TUPLE1 + REDUCE,
    "its own names": name("moe_hf.checkpoint.unpickling.load") + text("/") + TUPLE1 + REDUCE,
    "a neighbour": name("deepspeed.utils.tensor_fragment.torch") + EMPTY_TUPLE + REDUCE,
    "no stack": REDUCE,
    "no mark": b"u",
    "no memo": b"h\x07",
    "a cut number": b"J\x01",
    "an unhashable key": EMPTY_DICT + EMPTY_DICT + small_int(1) + SETITEM,
    "another persistent id": text("os.system") + b"Q",
    "an opcode that is not read": b"\x93",
}


@pytest.mark.parametrize("kind", sorted(HAND_MADE))
def test_the_allowed_names_are_no_way_in(tmp_path, sentinel, kind):
    classes = [dict(vars(cls)) for cls in (unpickling.Address, unpickling._Ignored)]
    refusal(hand_made(tmp_path / "file.pt", HAND_MADE[kind]))
    assert not sentinel.exists()
    assert [dict(vars(cls)) for cls in (unpickling.Address, unpickling._Ignored)] == classes


def test_a_method_of_the_attackers_is_never_called(tmp_path):
    """State set twice: what the first put in place of `__setstate__` would be called by the second."""
    pickled = AN_ADDRESS + entry("__setstate__", name("torch.Size")) + BUILD + b"](K\x01K\x02e" + BUILD
    try:
        found = unpickling.load(hand_made(tmp_path / "file.pt", pickled))
    except CheckpointError:
        return
    assert type(found) is unpickling.Address


def test_damage_is_told_as_damage(tmp_path):
    """Cut anywhere, or with bytes exchanged anywhere, a file is refused in one sentence or read as it was."""
    path = tmp_path / "file.pt"
    content = {"x": torch.arange(50.0), "address": fragment_address(numel=1, start=2), "words": ["a", "b"] * 9}
    torch.save(content, path)
    whole = path.read_bytes()
    for length in {0, 1, 3, 4, 10, len(whole) // 3, len(whole) // 2, len(whole) - 22, len(whole) - 1}:
        path.write_bytes(whole[:length])
        assert "is damaged" in refusal(path)
    draw = random.Random(7)
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(draw.randint(1, 8)):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        path.write_bytes(damaged)
        with_or_without(path)


def test_damage_inside_the_pickle_is_told_as_damage(tmp_path):
    """As above where a checksum of the archive does not give it away."""
    content = {"x": [1, 2.5, "three", (4,), None, True], "address": fragment_address(numel=1, start=2)}
    path = tmp_path / "file.pt"
    torch.save(content, path)
    with zipfile.ZipFile(path) as archive:
        item = next(item for item in archive.namelist() if item.endswith("/data.pkl"))
        pickled = archive.read(item)[2:-1]
    draw = random.Random(8)
    for _ in range(300):
        damaged = bytearray(pickled)
        for _ in range(draw.randint(1, 4)):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        with_or_without(hand_made(path, bytes(damaged)))


def with_or_without(path: Path) -> None:
    try:
        unpickling.load(path)
    except CheckpointError as error:
        assert str(path) in str(error) and "\n" not in str(error)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "file.pt"
    for content in (
        b"",
        b"words",
        pickle.dumps({"x": 1}),
        b"\x80\x02" + SYSTEM + text("true") + TUPLE1 + REDUCE + STOP,
    ):
        path.write_bytes(content)
        refusal(path)
    torch.save({"x": 1}, path, _use_new_zipfile_serialization=False)
    refusal(path)
    refusal(tmp_path)
    refusal(tmp_path / "absent")
