"""What a push leaves on a hub on this machine, and what is refused; with faults on the way: `test_hub_faults.py`."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hub_pushes import FIRST_SHARD, REPO, assert_refused, assert_whole, contents, num_commits, visible
from hub_server import READER, WRITER, HubServer, connect
from hub_store import git_hash
from huggingface_hub import ModelCard, snapshot_download
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_hf import MoEForCausalLM
from moe_hf.checkpoint.export import export_model
from moe_hf.checkpoint.hub import push_export
from moe_hf.errors import CheckpointError, ConfigError

# --------------------------------------------------------------------------------------------------------------------
# What a push leaves


@pytest.mark.parametrize("part_size", [float("inf"), 20_000])
@pytest.mark.parametrize("verifies", [True, False])
def test_push_is_one_commit_with_every_file(hub, exported, part_size, verifies):
    hub.part_size, hub.verifies = part_size, verifies
    pushed = push_export(exported, REPO)
    assert_whole(hub, exported)
    assert num_commits(hub) == 1 and pushed.commit == hub.repos[REPO].branches["main"]
    assert (pushed.url, sorted(pushed.files), pushed.left_out) == (f"{hub.url}/{REPO}", sorted(contents(exported)), ())
    assert hub.requests["part" if part_size < 1e6 else "object"] >= 4
    assert bool(hub.requests["verify"]) == verifies and not hub.waits and not hub.requests["xet_token"]


def test_push_through_xet(xet_hub, exported):
    pushed = push_export(exported, REPO)
    assert_whole(xet_hub, exported)
    assert num_commits(xet_hub) == 1 and pushed.commit == xet_hub.repos[REPO].branches["main"]
    assert xet_hub.requests["xorb"] and xet_hub.requests["shard"] and not xet_hub.requests["batch"]


@pytest.mark.parametrize("xet", [False, True])
def test_what_is_pushed_loads_to_the_same_logits(monkeypatch, tmp_path, exported, xet):
    with HubServer() as hub:
        connect(monkeypatch, hub, tmp_path, xet=xet)
        commit = push_export(exported, REPO).commit
        downloaded = Path(snapshot_download(REPO, revision=commit, cache_dir=tmp_path / "cache", endpoint=hub.url))
        loaded = contents(downloaded)
        for name, data in contents(exported).items():
            assert name == "README.md" or loaded[name] == data
        cache = {"cache_dir": tmp_path / "cache", "revision": commit}
        monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
        model = AutoModelForCausalLM.from_pretrained(REPO, **cache, trust_remote_code=True).eval()
        assert AutoTokenizer.from_pretrained(REPO, **cache)("w5 w7")["input_ids"] == [5, 7]
    tokens = torch.arange(3, 27).reshape(2, 12)
    with torch.no_grad():
        original = MoEForCausalLM.from_pretrained(exported).eval()(tokens).logits
        assert torch.equal(model(tokens).logits, original)


def test_card_names_the_repository_and_the_licence(hub, exported):
    before = contents(exported)
    push_export(exported, REPO, license="apache-2.0")
    text = visible(hub)["README.md"].decode()
    card, local = ModelCard(text), ModelCard(before["README.md"].decode())
    assert card.data.to_dict() == local.data.to_dict() | {"license": "apache-2.0"}
    assert card.text == local.text.replace("PATH", REPO) != local.text
    assert contents(exported) == before, "the folder itself stays as it is"
    push_export(exported, REPO, license="mit")
    assert ModelCard(visible(hub)["README.md"].decode()).data.license == "mit"


def test_export_without_a_card_gets_one(hub, folder):
    (folder / "README.md").unlink()
    push_export(folder, REPO, license="mit")
    text = visible(hub)["README.md"].decode()
    assert ModelCard(text).data.license == "mit" and f'from_pretrained("{REPO}"' in text and "experts" in text
    assert not (folder / "README.md").exists()


def test_branch_is_created(hub, exported, folder):
    push_export(exported, REPO)
    (folder / "generation_config.json").unlink()
    push_export(folder, REPO, revision="second", commit_message="Without sampling")
    assert hub.repos[REPO].at("second").message == "Without sampling" and hub.repos[REPO].at("main").message != ""
    assert_whole(hub, exported)
    assert_whole(hub, folder, "second")
    push_export(exported, REPO, revision="second")
    assert_whole(hub, exported, "second")


def test_private_is_private(hub, exported):
    push_export(exported, REPO, private=True)
    assert hub.repos[REPO].private
    push_export(exported, REPO)
    assert hub.repos[REPO].private
    push_export(exported, "org/open")
    assert not hub.repos["org/open"].private
    commits = len(hub.repos["org/open"].commits)
    assert_refused(hub, exported, "already there and public", repo="org/open", private=True)
    assert len(hub.repos["org/open"].commits) == commits


def test_same_again_changes_nothing(hub, exported):
    first = push_export(exported, REPO)
    sent = hub.requests["object"]
    assert push_export(exported, REPO).commit == first.commit
    assert num_commits(hub) == 1 and hub.requests["object"] == sent


def test_earlier_weights_do_not_stay(hub, exported, tmp_path):
    push_export(exported, REPO)
    files = hub.repos[REPO].at("main").files
    files |= {"picture.png": b"not ours", "pytorch_model.bin": b"old", "LICENSE": b"ours to keep"}
    model = MoEForCausalLM.from_pretrained(exported)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    export_model(model, tmp_path / "whole", tokenizer=tokenizer, model_card="# In one file\n")
    push_export(tmp_path / "whole", REPO)
    found = visible(hub)
    assert found.pop("picture.png") == b"not ours" and found.pop("LICENSE") == b"ours to keep"
    assert found.keys() == contents(tmp_path / "whole").keys()
    assert [name for name in found if "model" in name and "py" not in name] == ["model.safetensors"]
    push_export(exported, REPO)
    assert "model.safetensors" not in visible(hub) and num_commits(hub) == 3


def test_only_the_export_is_pushed(hub, exported, folder):
    (folder / "LICENSE").write_text("free")
    (folder / ".hidden").write_text("x")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "download.json").write_text("x")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    whole = contents(folder)
    for name in ("optimizer.pt", "model.safetensors", "trainer_state.json", "notes.py"):
        (folder / name).write_bytes(b"x")
    (folder / "global_step3").mkdir()
    (folder / "global_step3" / "states.pt").write_bytes(b"x")
    pushed = push_export(folder, REPO)
    left_out = ("global_step3/states.pt", "model.safetensors", "notes.py", "optimizer.pt", "trainer_state.json")
    assert pushed.left_out == left_out
    assert visible(hub).keys() == {name for name in whole if not name.startswith(".")}


# --------------------------------------------------------------------------------------------------------------------
# What is refused before the hub is asked


def drop_tensor(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    name = next(name for name, file in index["weight_map"].items() if file == FIRST_SHARD)
    tensors = load_file(folder / FIRST_SHARD)
    del tensors[name], index["weight_map"][name]
    save_file(tensors, folder / FIRST_SHARD, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def without_code(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["auto_map"]
    (folder / "config.json").write_text(json.dumps(config))


def truncate(folder: Path) -> None:
    data = (folder / FIRST_SHARD).read_bytes()
    (folder / FIRST_SHARD).write_bytes(data[:-1000])


DAMAGES = {
    "is not a folder with an exported model": shutil.rmtree,
    r"config\.json: it is not there": lambda folder: (folder / "config.json").unlink(),
    "it is not JSON": lambda folder: (folder / "config.json").write_text("{"),
    "it holds no object": lambda folder: (folder / "config.json").write_text("[]"),
    "is not a configuration of moe_hf": lambda folder: (folder / "config.json").write_text(
        (folder / "config.json").read_text().replace('"num_experts_per_tok": 2', '"num_experts_per_tok": 9')
    ),
    r"The weights are wrong: missing \['": drop_tensor,
    f"has no {FIRST_SHARD}": lambda folder: (folder / FIRST_SHARD).unlink(),
    f"{FIRST_SHARD} is damaged": truncate,
    "weights are read from safetensors only": lambda folder: (folder / "model.safetensors.index.json").unlink(),
    "names no code": without_code,
    r"routing\.py is not there": lambda folder: (folder / "routing.py").unlink(),
    r"modeling_moe\.py is not there": lambda folder: (folder / "modeling_moe.py").unlink(),
    "its metadata header is damaged": lambda folder: (folder / "README.md").write_text("---\na: [\n---\n# x\n"),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_folder_that_is_not_whole_is_refused(hub, folder, message):
    DAMAGES[message](folder)
    assert_refused(hub, folder, message, CheckpointError)
    assert not hub.requests


@pytest.mark.parametrize(
    "repo", ["model", "a/b/c", "org/", "org/mo del", "org/a--b", "-org/model", "org/model.git", ""]
)
def test_name_that_cannot_be_is_refused(hub, exported, repo):
    assert_refused(hub, exported, "cannot be the name|does not say whose", ConfigError, repo=repo)
    assert not hub.requests


@pytest.mark.parametrize("license", ["Apache 2.0", "", "mit-", "MIT"])
def test_licence_of_another_form_is_refused(hub, exported, license):
    assert_refused(hub, exported, "write it like apache-2.0", ConfigError, license=license)
    assert not hub.requests


def test_licence_unknown_to_the_hub_is_refused(hub, exported):
    assert_refused(hub, exported, "must be one of", license="not-a-licence")
    assert num_commits(hub) == 0


@pytest.mark.parametrize(
    ("token", "match"),
    [
        (None, "You are not logged in to the hub.* run hf auth login or set HF_TOKEN"),
        ("hf_unknown", r"does not accept your login \(401\)"),
        (READER, r"may not write to org/model \(403\)"),
    ],
)
def test_login_that_may_not_write_is_refused(monkeypatch, tmp_path, exported, token, match):
    with HubServer() as hub:
        connect(monkeypatch, hub, tmp_path, token=token)
        assert_refused(hub, exported, match)
        assert not hub.repos and not hub.objects
        push_export(exported, REPO, token=WRITER)
        connect(monkeypatch, hub, tmp_path, token=token)
        assert_refused(hub, exported, match, license="mit")


def test_offline_is_said(monkeypatch, hub, exported):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert_refused(hub, exported, "HF_HUB_OFFLINE is set.*unset it")


def test_token_stays_out_of_messages(hub, exported):
    # The HTTP library quotes a header that it will not send.
    sentence = assert_refused(hub, exported, "<token>", token="hf_secret\nvalue")
    assert "secret" not in sentence


def test_no_server_is_one_sentence(monkeypatch, hub, exported):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert_refused(hub, exported, "is not complete: .*refused; run it again")


# --------------------------------------------------------------------------------------------------------------------
# The server


def test_hashes_of_the_server_are_those_of_git(hub, exported):
    push_export(exported, REPO)
    assert git_hash(b"Hello, World!") == "b45ef6fec89518d314f546fd6c3025367b721684"  # of `git hash-object`
    assert os.path.getsize(exported / FIRST_SHARD) == len(visible(hub)[FIRST_SHARD])
