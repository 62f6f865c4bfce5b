"""A push is done and whole, or an error: against a hub on this machine, with everything going wrong that can."""

import base64
import json
import os
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hub_server import READER, WRITER, HubServer, connect
from hub_store import git_hash
from huggingface_hub import ModelCard, snapshot_download
from safetensors.torch import load_file, save_file
from small import save_tokenizer, small_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_hf import MoEForCausalLM
from moe_hf.checkpoint import hub as hub_module
from moe_hf.checkpoint.export import export_model
from moe_hf.checkpoint.hub import PushError, push_export
from moe_hf.checkpoint.model_card import render_model_card
from moe_hf.errors import CheckpointError, ConfigError

REPO = "org/model"
IS_OLD = huggingface_hub.__version__.startswith("1.")
FIRST_SHARD = "model-00001-of-00004.safetensors"


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """A whole export in four shards."""
    folder = tmp_path_factory.mktemp("exported")
    torch.manual_seed(3)
    model = MoEForCausalLM(small_config()).eval()
    save_tokenizer(folder / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    card = render_model_card(model.config, [])
    export_model(model, folder / "hf", tokenizer=tokenizer, model_card=card, max_shard_size="60KB")
    return folder / "hf"


@pytest.fixture
def folder(exported, tmp_path) -> Path:
    """A copy of the export that a test may damage."""
    return Path(shutil.copytree(exported, tmp_path / "hf"))


@pytest.fixture
def hub(monkeypatch, tmp_path) -> HubServer:
    with HubServer() as server:
        server.waits = connect(monkeypatch, server, tmp_path)
        yield server


@pytest.fixture
def xet_hub(monkeypatch, tmp_path) -> HubServer:
    with HubServer() as server:
        server.waits = connect(monkeypatch, server, tmp_path, xet=True)
        yield server


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def visible(hub: HubServer, revision: str = "main", repo: str = REPO) -> dict[str, bytes]:
    """What a reader finds at a branch, without what the hub itself puts there."""
    files = hub.repos[repo].at(revision).files
    return {name: data for name, data in files.items() if name != ".gitattributes"}


def num_commits(hub: HubServer) -> int:
    """Commits besides the first, with which the hub creates a repository."""
    return len(hub.repos[REPO].commits) - 1 if REPO in hub.repos else 0


def assert_whole(hub: HubServer, folder: Path, revision: str = "main") -> None:
    """Compare all files byte for byte; the card differs by the name in its example alone."""
    found, expected = visible(hub, revision), contents(folder)
    expected["README.md"] = expected["README.md"].replace(b'("PATH"', f'("{REPO}"'.encode())
    assert found == expected


def assert_refused(hub: HubServer, folder: Path, match: str, error: type[Exception] = PushError, **options) -> str:
    """Push, and see it refused in one sentence, with nothing visible that was not there before."""
    before = visible(hub) if REPO in hub.repos else {}
    with pytest.raises(error, match=match) as caught:
        push_export(folder, options.pop("repo", REPO), **options)
    sentence = str(caught.value)
    assert "\n" not in sentence and sentence.endswith(".") and WRITER not in sentence and READER not in sentence
    assert (visible(hub) if REPO in hub.repos else {}) == before
    return sentence


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
# Faults

ONCE = {
    "500": {"status": 500},
    "429": {"status": 429, "headers": {"Retry-After": "7"}},
    "cut": {"cut": True},
}
UPLOADS = ("preupload", "batch", "object", "verify", "part", "complete")
LISTING = pytest.param("tree", marks=pytest.mark.skipif(IS_OLD, reason="huggingface_hub 1 asks for a listing once"))
ASKED_ONCE = ("create", "info", "validate", "commit")


@pytest.mark.parametrize("fault", ONCE)
@pytest.mark.parametrize("route", [*UPLOADS, LISTING])
def test_one_fault_is_survived(hub, exported, route, fault):
    hub.part_size = 20_000 if route in ("part", "complete") else float("inf")
    hub.fail(route, **ONCE[fault])
    push_export(exported, REPO)
    assert_whole(hub, exported)
    assert num_commits(hub) == 1
    assert hub.waits == [8.0 if fault == "429" else 1], "as long as the server asks for, and a second more"


@pytest.mark.parametrize("fault", ONCE)
@pytest.mark.parametrize("route", ASKED_ONCE)
def test_one_fault_is_told_and_gone_when_run_again(hub, exported, route, fault):
    hub.fail(route, **ONCE[fault])
    assert "run it again" in assert_refused(hub, exported, "is not complete: ")
    assert num_commits(hub) == 0
    push_export(exported, REPO)
    assert_whole(hub, exported)
    assert num_commits(hub) == 1


@pytest.mark.parametrize("fault", ["500", "cut"])
@pytest.mark.parametrize("route", [*UPLOADS, "tree", *ASKED_ONCE])
def test_lasting_fault_is_never_success(hub, exported, route, fault):
    hub.part_size = 20_000 if route in ("part", "complete") else float("inf")
    hub.fail(route, times=float("inf"), **ONCE[fault])
    with pytest.raises(PushError, match=r"is not complete: .*run it again"):
        push_export(exported, REPO)
    if route == "tree":
        assert_whole(hub, exported)  # it has arrived, but was not seen to
    else:
        assert num_commits(hub) == 0
    hub.faults.clear()
    push_export(exported, REPO)
    assert_whole(hub, exported)
    assert num_commits(hub) == 1


@pytest.mark.parametrize("fault", [{"status": 500}, {"status": 504}, {"cut": True}])
def test_commit_whose_answer_is_lost(hub, exported, fault):
    hub.fail("commit", is_applied=True, **fault)
    with pytest.raises(PushError, match=r"is not complete: .*run it again"):
        push_export(exported, REPO)
    assert_whole(hub, exported)
    commit = push_export(exported, REPO).commit
    assert commit == hub.repos[REPO].branches["main"] and num_commits(hub) == 1


def flip_a_bit(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def test_object_damaged_on_its_way_is_not_committed(hub, exported):
    hub.fail("object", change=flip_a_bit)
    assert_refused(hub, exported, "not what was announced")
    assert num_commits(hub) == 0
    push_export(exported, REPO)
    assert_whole(hub, exported)


@pytest.mark.parametrize("route", ["object", "part"])
def test_object_damaged_on_a_hub_that_does_not_look(hub, exported, route):
    hub.verifies = False
    hub.part_size = 20_000 if route == "part" else float("inf")
    hub.fail(route, change=flip_a_bit)
    with pytest.raises(
        PushError, match=r"does not hold the export at commit \w{12}: model-0000\d-of-00004.* is missing"
    ):
        push_export(exported, REPO)


def change_entry(name: str, change):
    """Return a fault's `change` for a commit: let `change` have the entry of the file `name`; `None` drops it."""

    def change_body(body: bytes) -> bytes:
        entries = [json.loads(line) for line in body.splitlines()]
        changed = [change(entry) if entry["value"].get("path") == name else entry for entry in entries]
        return b"".join(json.dumps(entry).encode() + b"\n" for entry in changed if entry is not None)

    return change_body


def with_other_content(entry: dict) -> dict:
    content = base64.b64decode(entry["value"]["content"]).replace(b"2", b"3")
    return entry | {"value": entry["value"] | {"content": base64.b64encode(content).decode()}}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (FIRST_SHARD, lambda entry: None),
        ("routing.py", lambda entry: None),
        ("README.md", lambda entry: None),
        ("config.json", with_other_content),
    ],
)
def test_commit_that_is_not_what_was_sent_is_not_success(hub, exported, name, change):
    hub.fail("commit", change=change_entry(name, change))
    with pytest.raises(PushError, match=f"does not hold the export at commit .*: {name} is missing or different"):
        push_export(exported, REPO)
    push_export(exported, REPO)
    assert_whole(hub, exported)


def test_earlier_weights_that_stay_are_not_success(hub, exported):
    push_export(exported, REPO)
    hub.repos[REPO].at("main").files["model.safetensors"] = b"old"
    hub.fail("commit", change=change_entry("model.safetensors", lambda entry: None))
    with pytest.raises(PushError, match=r"does not hold the export .*: model.safetensors is missing or different"):
        push_export(exported, REPO, license="mit")


def test_file_that_the_repository_ignores_is_not_success(hub, exported):
    push_export(exported, REPO)
    files = hub.repos[REPO].at("main").files
    files[".gitignore"] = b"*.py\n"
    del files["routing.py"]
    with pytest.raises(PushError, match=r"routing.py is missing"):
        push_export(exported, REPO)


def test_commit_of_somebody_else_in_between_is_not_built_upon(monkeypatch, hub, exported):
    push_export(exported, REPO)
    check = hub._validate

    def commit_first(*, body):
        repo = hub.repos[REPO]
        hub._add_commit(repo, "main", "theirs", repo.at("main").files | {"theirs.txt": b"x"}, repo.at("main").lfs)
        return check(body=body)

    monkeypatch.setattr(hub, "_validate", commit_first)
    with pytest.raises(PushError, match=r"A commit has happened since.*run it again"):
        push_export(exported, REPO, license="mit")
    monkeypatch.undo()
    assert visible(hub)["theirs.txt"] == b"x" and b"license" not in visible(hub)["README.md"]


def test_folder_that_changes_meanwhile_is_not_success(monkeypatch, hub, folder):
    check = hub_module._verify

    def train_on(*args):
        (folder / "generation_config.json").write_text("{}")
        check(*args)

    monkeypatch.setattr(hub_module, "_verify", train_on)
    with pytest.raises(PushError, match=r"generation_config\.json is missing or different"):
        push_export(folder, REPO)


# --------------------------------------------------------------------------------------------------------------------
# Faults on the way through Xet


@pytest.mark.parametrize("fault", ONCE)
@pytest.mark.parametrize("route", ["xet_token", "xorb", "shard"])
def test_xet_survives_one_fault(xet_hub, exported, route, fault):
    what = ONCE[fault] if fault != "429" else {"status": 429}  # hf_xet waits in real seconds
    xet_hub.fail(route, **what)
    push_export(exported, REPO)
    assert_whole(xet_hub, exported)
    assert num_commits(xet_hub) == 1 and xet_hub.requests[route] > 1


@pytest.mark.parametrize("route", ["xet_token", "xorb", "shard"])
def test_lasting_fault_of_xet_is_never_success(xet_hub, exported, route):
    xet_hub.fail(route, times=float("inf"), status=500)
    assert_refused(xet_hub, exported, "is not complete: .*run it again")
    assert num_commits(xet_hub) == 0
    xet_hub.faults.clear()
    push_export(exported, REPO)
    assert_whole(xet_hub, exported)


def test_xorb_damaged_on_its_way_is_not_committed(xet_hub, exported):
    xet_hub.fail("xorb", change=lambda body: body[:2000] + bytes([body[2000] ^ 1]) + body[2001:])
    assert_refused(xet_hub, exported, "is not complete: ")
    assert num_commits(xet_hub) == 0


def test_hub_without_xet_is_never_success_by_mistake(xet_hub, exported):
    xet_hub.fail("xet_token", times=float("inf"), status=404)
    assert_refused(xet_hub, exported, "is not complete: .*HF_HUB_DISABLE_XET=1")
    assert num_commits(xet_hub) == 0


# --------------------------------------------------------------------------------------------------------------------
# The server


def test_hashes_of_the_server_are_those_of_git(hub, exported):
    push_export(exported, REPO)
    assert git_hash(b"Hello, World!") == "b45ef6fec89518d314f546fd6c3025367b721684"  # of `git hash-object`
    assert os.path.getsize(exported / FIRST_SHARD) == len(visible(hub)[FIRST_SHARD])
