"""What training pushes is the export, whole, and a hub that fails costs neither the run nor the export."""

import json
import shutil
import threading
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub_server import READER, WRITER, HubServer, connect
from small import GLOBAL_MICRO_BATCH, NUM_STEPS, flags, make_rows, recipe, save_small_model
from transformers import AutoTokenizer
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging

from moe_hf import MoEForCausalLM
from moe_hf.checkpoint.export import export_model
from moe_hf.checkpoint.hub import PushError
from moe_hf.data.arguments import DataArguments
from moe_hf.errors import ConfigError
from moe_hf.parallel.failure import FailureRelay
from moe_hf.training.card_data import describe_data
from moe_hf.training.hub_push import HubPusher, check_hub_arguments
from moe_hf.training.run import train_and_export

REPO = "org/model"
EVERY_THIRD = {"save_strategy": "steps", "save_steps": 3}


pytestmark = pytest.mark.usefixtures("no_state_of_earlier_runs")


@pytest.fixture
def hub(monkeypatch, tmp_path) -> HubServer:
    with HubServer() as server:
        # The token is that of the command line.
        connect(monkeypatch, server, tmp_path / "hub", token=None)
        yield server


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    """What is said in passing; Transformers' loggers do not reach pytest's own record."""
    said: list[str] = []
    monkeypatch.setattr(logging.get_logger("moe_hf.training.hub_push"), "warning", said.append)
    return said


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A folder with `model` and `rows.jsonl`."""
    folder = tmp_path_factory.mktemp("inputs")
    save_small_model(folder / "model")
    rows = make_rows(NUM_STEPS * GLOBAL_MICRO_BATCH)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def exported(inputs) -> Path:
    """An export; training is not needed to push one."""
    tokenizer = AutoTokenizer.from_pretrained(inputs / "model")
    export_model(MoEForCausalLM.from_pretrained(inputs / "model"), inputs / "hf", tokenizer=tokenizer)
    return inputs / "hf"


def train(inputs: Path, output_dir: Path, **changes) -> None:
    words = {
        "model_name_or_path": inputs / "model",
        "train_file": inputs / "rows.jsonl",
        "cache_dir": inputs / "cache",
        "output_dir": output_dir,
        "use_cpu": True,
        "push_to_hub": True,
        "hub_model_id": REPO,
        "hub_token": WRITER,
    }
    words = {name: value for name, value in (words | changes).items() if value is not None}
    train_and_export(flags(recipe([]), 1, **words), FailureRelay())


def settings(output_dir: Path, **changes) -> SimpleNamespace:
    values = {
        "output_dir": str(output_dir),
        "hub_model_id": REPO,
        "hub_strategy": HubStrategy.EVERY_SAVE,
        "hub_private_repo": None,
        "hub_revision": None,
        "hub_always_push": False,
        "hub_token": WRITER,
    }
    return SimpleNamespace(**(values | changes))


def contents(folder: Path) -> dict[str, bytes]:
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    if "README.md" in files:
        files["README.md"] = files["README.md"].replace(b'("PATH"', f'("{REPO}"'.encode())
    return files


def commits(hub: HubServer) -> dict[str, dict[str, bytes]]:
    """Files by the summary of each commit, without the hub's own first."""
    own = [commit for commit in hub.repos[REPO].commits.values() if commit.message != "initial commit"]
    return {c.message: {name: data for name, data in c.files.items() if name != ".gitattributes"} for c in own}


def hold(monkeypatch, hub: HubServer) -> threading.Event:
    """Let pushes wait in their first request after the repository is known, until the event is set."""
    released = threading.Event()
    take_fault = hub.take_fault

    def wait_first(route: str):
        if route == "validate":
            assert released.wait(30)
        return take_fault(route)

    monkeypatch.setattr(hub, "take_fault", wait_first)
    return released


# --------------------------------------------------------------------------------------------------------------------
# Whole runs


def test_end_pushes_the_final_export_alone(hub, inputs, tmp_path, capfd):
    train(inputs, tmp_path / "run", hub_strategy="end", hub_private_repo=True, **EVERY_THIRD)
    assert hub.repos[REPO].private
    assert commits(hub) == {"End of training": contents(tmp_path / "run" / "hf")}
    assert list((tmp_path / "run").glob(".push-*")) == []
    said = capfd.readouterr()
    assert f"pushed {len(contents(tmp_path / 'run' / 'hf'))} files to {hub.url}/{REPO}, commit " in said.out
    assert WRITER not in said.out + said.err
    for path in (tmp_path / "run").rglob("*"):
        assert path.is_dir() or WRITER.encode() not in path.read_bytes(), path


def test_every_save_pushes_each_checkpoint(hub, inputs, tmp_path, warnings):
    train(inputs, tmp_path / "run", hub_always_push=True, hub_revision="training", **EVERY_THIRD)
    run = tmp_path / "run"
    # Without an evaluation the final export is that of the last step, and nothing is left to push.
    assert contents(run / "checkpoint-6" / "hf") == contents(run / "hf")
    assert commits(hub) == {
        "Training in progress, step 3": contents(run / "checkpoint-3" / "hf"),
        "Training in progress, step 6": contents(run / "hf"),
    }
    assert hub.repos[REPO].at("main").message == "initial commit" and not warnings
    assert list(run.glob(".push-*")) == []


def test_card_tells_data_and_layout(hub, inputs, tmp_path):
    evaluation = {"do_eval": True, "validation_file": inputs / "rows.jsonl"}
    train(inputs, tmp_path / "run", hub_strategy="end", **evaluation)
    card = (tmp_path / "run" / "hf" / "README.md").read_text()
    assert "| training | `rows.jsonl` |" in card and "| evaluation | `rows.jsonl` |" in card
    assert str(inputs) not in card
    assert "Layout: 1 processes, no DeepSpeed, EP off, float32." in card
    # Rows of one micro-batch are padded to its longest; nothing else is counted.
    lengths = [len(row["input_ids"]) for row in make_rows(NUM_STEPS * GLOBAL_MICRO_BATCH)]
    batches = [lengths[i : i + GLOBAL_MICRO_BATCH] for i in range(0, len(lengths), GLOBAL_MICRO_BATCH)]
    assert f"| tokens processed | {sum(max(batch) * len(batch) for batch in batches):,} |" in card


def test_failed_push_leaves_the_export(hub, inputs, tmp_path):
    hub.fail("commit", times=float("inf"), status=500)
    with pytest.raises(PushError, match=r"is not complete.*the finished export is .*/run/hf, and is pushed by: moe-hf"):
        train(inputs, tmp_path / "run", hub_strategy="end")
    assert commits(hub) == {}
    MoEForCausalLM.from_pretrained(tmp_path / "run" / "hf")
    hub.faults.clear()
    HubPusher(settings(tmp_path / "run")).push(tmp_path / "run" / "hf")
    assert commits(hub) == {"End of training": contents(tmp_path / "run" / "hf")}


def test_failed_push_of_a_checkpoint_does_not_end_training(hub, inputs, tmp_path, warnings):
    hub.fail("commit", times=1, status=500)
    train(inputs, tmp_path / "run", hub_always_push=True, **EVERY_THIRD)
    assert commits(hub) == {"Training in progress, step 6": contents(tmp_path / "run" / "hf")}
    assert len(warnings) == 1 and warnings[0].startswith("Step 3 is not pushed to the hub: ")


@pytest.mark.parametrize(("token", "match"), [(READER, "may not write"), ("hf_unknown", "does not accept your login")])
def test_login_is_tried_before_training(hub, inputs, tmp_path, token, match):
    with pytest.raises(PushError, match=match):
        train(inputs, tmp_path / "run", hub_token=token)
    assert not list((tmp_path / "run").glob("*"))


# --------------------------------------------------------------------------------------------------------------------
# Pushes in the background


def test_checkpoint_may_be_deleted_while_it_is_pushed(monkeypatch, hub, exported, tmp_path, warnings):
    shutil.copytree(exported, tmp_path / "checkpoint" / "hf")
    pusher = HubPusher(settings(tmp_path))
    pusher.open()
    released = hold(monkeypatch, hub)
    pusher.push_checkpoint(tmp_path / "checkpoint" / "hf", 3)
    shutil.rmtree(tmp_path / "checkpoint")
    # By then a final push that did not wait would have begun, from the same commit.
    threading.Timer(0.3, released.set).start()
    pusher.push(exported)
    found = commits(hub)["Training in progress, step 3"]
    del found["README.md"]
    assert found == contents(exported) and not warnings


@pytest.mark.parametrize("always", [False, True])
def test_push_while_another_is_under_way(monkeypatch, hub, exported, tmp_path, warnings, always):
    pusher = HubPusher(settings(tmp_path, hub_always_push=always))
    pusher.open()
    released = hold(monkeypatch, hub)
    for step in (3, 6):
        folder = tmp_path / str(step)
        shutil.copytree(exported, folder)
        (folder / "LICENSE").write_text(f"of step {step}")
        pusher.push_checkpoint(folder, step)
    released.set()
    pusher.push(tmp_path / "6")
    steps = {"Training in progress, step 3", "Training in progress, step 6" if always else "End of training"}
    assert commits(hub).keys() == steps
    assert warnings == ([] if always else ["Step 6 is not pushed to the hub: an earlier push is still under way."])
    assert list(tmp_path.glob(".push-*")) == []


def test_checkpoint_that_is_not_whole_is_not_pushed(hub, exported, tmp_path, warnings):
    pusher = HubPusher(settings(tmp_path))
    pusher.open()
    shutil.copytree(exported, tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").unlink()
    pusher.push_checkpoint(tmp_path / "hf", 3)
    assert len(warnings) == 1 and "has no model.safetensors" in warnings[0]
    assert commits(hub) == {} and list(tmp_path.glob(".push-*")) == []


def test_end_pushes_no_checkpoint(hub, exported, tmp_path):
    pusher = HubPusher(settings(tmp_path, hub_strategy=HubStrategy.END))
    pusher.open()
    pusher.push_checkpoint(exported, 3)
    pusher.push(exported)
    assert commits(hub).keys() == {"End of training"}


def test_what_a_killed_run_has_left_is_removed(hub, tmp_path):
    (tmp_path / ".push-abc").mkdir()
    (tmp_path / ".push-abc" / "model.safetensors").write_bytes(b"x")
    HubPusher(settings(tmp_path)).open()
    assert list(tmp_path.glob(".push-*")) == []


# --------------------------------------------------------------------------------------------------------------------
# What is refused before anything is asked or started

GOOD = {
    "push_to_hub": True,
    "do_train": True,
    "hub_strategy": "every_save",
    "hub_model_id": REPO,
    "hub_token": None,
}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"hub_strategy": "checkpoint"}, "hub_strategy=checkpoint is not supported.*use end or every_save"),
        ({"hub_strategy": HubStrategy.ALL_CHECKPOINTS}, "hub_strategy=all_checkpoints is not supported"),
        ({"hub_model_id": None}, "add --hub_model_id ORG/NAME"),
        ({"hub_model_id": "model"}, "write ORG/NAME"),
        ({"hub_model_id": "a/b/c"}, "cannot be the name of a repository"),
        ({"do_train": False}, "add --do_train"),
        ({"push_to_hub": False}, "has no effect without --push_to_hub"),
    ],
)
def test_flags_that_contradict_are_refused(changes, match):
    check_hub_arguments(Namespace(**GOOD))
    with pytest.raises(ConfigError, match=match):
        check_hub_arguments(Namespace(**(GOOD | changes)))


def test_token_is_not_given_where_the_launcher_prints_it(monkeypatch):
    namespace = Namespace(**(GOOD | {"hub_token": WRITER}))
    monkeypatch.setattr("sys.argv", ["run_clm_moe.py", f"--hub_token={WRITER}"])
    monkeypatch.delenv("RANK", raising=False)
    check_hub_arguments(namespace)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match=r"--hub_token is printed by the launcher .*; set HF_TOKEN") as caught:
        check_hub_arguments(namespace)
    assert WRITER not in str(caught.value)
    monkeypatch.setattr("sys.argv", ["run_clm_moe.py", "arguments.yaml"])
    check_hub_arguments(namespace)


def test_flags_are_checked_before_the_hub_is_asked(hub, inputs, tmp_path):
    with pytest.raises(ConfigError, match="hub_strategy=checkpoint is not supported"):
        train(inputs, tmp_path / "run", hub_strategy="checkpoint")
    assert not hub.requests and not (tmp_path / "run").exists()


def test_hub_is_left_alone_unless_asked_for(hub, inputs, tmp_path):
    check_hub_arguments(Namespace(**(GOOD | {"push_to_hub": False, "hub_model_id": None})))
    train(inputs, tmp_path / "run", push_to_hub=None, hub_model_id=None, max_steps=1)
    assert not hub.requests


# --------------------------------------------------------------------------------------------------------------------
# The data in words


def test_data_are_described_without_paths(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('{"text": "x"}\n')
    one = describe_data(DataArguments(train_file=str(tmp_path / "a.jsonl")), 64, do_eval=True)
    assert (one.training, one.evaluation) == ("`a.jsonl`", "5 % of the training data, held out")
    assert (one.rows, one.dataset) == ("packing blocks, at most 64 tokens", None)
    stream = DataArguments(train_file=str(tmp_path / "a.jsonl"), streaming=True)
    assert describe_data(stream, 64, do_eval=True).evaluation == "5 % of the first 5,000 rows, held out"
    many = DataArguments(train_file=str(tmp_path / "*.jsonl"), max_train_samples=1200, packing="pad")
    described = describe_data(many, 64, do_eval=False)
    assert described.training == "2 files, `a.jsonl` to `b.jsonl`, at most 1,200 rows"
    assert described.evaluation is None and described.rows.startswith("packing pad")


def test_data_of_the_hub_are_named(tmp_path):
    hub_data = DataArguments(dataset_name="org/corpus", dataset_config_name="small")
    described = describe_data(hub_data, 64, do_eval=True)
    assert described.training == "`org/corpus`, configuration `small`" and described.dataset == "org/corpus"
    assert described.evaluation == "held-out part of `corpus`"
    local = describe_data(DataArguments(dataset_name=str(tmp_path)), 64, do_eval=False)
    assert local.dataset is None and local.training == f"`{tmp_path.name}`, a local folder"
    assert "embedded corpus" in describe_data(DataArguments(), 64, do_eval=True).training
