"""A push is done and whole, or an error, whatever goes wrong on the way to a hub on this machine."""

import base64
import json

import huggingface_hub
import pytest
from hub_pushes import FIRST_SHARD, REPO, assert_refused, assert_whole, num_commits, visible

from moe_hf.checkpoint import hub as hub_module
from moe_hf.checkpoint.hub import PushError, push_export

IS_OLD = huggingface_hub.__version__.startswith("1.")

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
