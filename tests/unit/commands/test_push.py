"""`moe-hf push` as a user runs it: what is printed, exit codes, and one run in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import READER, WRITER, HubServer, connect
from launching import ROOT, environment
from small import save_tokenizer, small_config
from transformers import AutoTokenizer

from moe_hf import MoEForCausalLM, cli
from moe_hf.checkpoint.export import export_model
from moe_hf.commands import push

# The command of the installed package, whichever others it has.
COMMAND = "from moe_hf import cli; from moe_hf.commands import push; cli.COMMANDS = (push,); cli.main()"


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    torch.manual_seed(3)
    save_tokenizer(folder / "tokenizer")
    model = MoEForCausalLM(small_config(num_hidden_layers=2))
    export_model(model, folder / "hf", tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"))
    (folder / "hf" / "optimizer.pt").write_bytes(b"not for others")
    return folder / "hf"


@pytest.fixture
def hub(monkeypatch, tmp_path) -> HubServer:
    monkeypatch.setattr(cli, "COMMANDS", (push,))
    with HubServer() as server:
        connect(monkeypatch, server, tmp_path)
        yield server


def visible(hub: HubServer, repo: str, revision: str = "main") -> dict[str, bytes]:
    return hub.repos[repo].at(revision).files


def test_done_is_said_with_address_and_commit(hub, exported, capsys):
    words = ["--private", "--revision", "v1", "--commit-message", "First", "--license", "apache-2.0"]
    cli.main(["push", str(exported), "org/model", *words])
    commit = hub.repos["org/model"].at("v1")
    assert capsys.readouterr().out.splitlines() == [
        "not part of the export, left out: optimizer.pt",
        f"pushed 17 files to {hub.url}/org/model, commit {commit.oid}",
    ]
    assert commit.message == "First" and hub.repos["org/model"].private
    assert b"license: apache-2.0" in commit.files["README.md"] and "optimizer.pt" not in commit.files


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["missing", "org/model"], "missing is not a folder with an exported model"),
        (["{export}", "model"], "'model' does not say whose repository it is; write ORG/NAME."),
        (["{export}", "org/model", "--license", "My Own"], "--license 'My Own' is not an identifier of the hub"),
        (["{export}", "org/model", "--license", "not-a-licence"], '"license" must be one of'),
    ],
)
def test_mistake_is_one_line_and_exit_code_2(monkeypatch, tmp_path, hub, exported, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        cli.main(["push", *(word.format(export=exported) for word in words)])
    said = capsys.readouterr()
    last = said.err.splitlines()[-1]
    assert ended.value.code == 2 and said.out == ""
    assert last.startswith("error: ") and message in last and "Traceback" not in said.err


def test_fault_is_not_reported_as_done(hub, exported, capsys):
    hub.fail("commit", times=1, status=500, is_applied=True)
    with pytest.raises(SystemExit) as ended:
        cli.main(["push", str(exported), "org/model"])
    said = capsys.readouterr()
    assert ended.value.code == 2 and "pushed" not in said.out and "run it again" in said.err
    cli.main(["push", str(exported), "org/model"])
    assert f"commit {hub.repos['org/model'].branches['main']}" in capsys.readouterr().out
    assert len(hub.repos["org/model"].commits) == 2


def test_push_in_a_process_of_its_own(exported, tmp_path):
    """The environment alone says which hub, which login, and, by its silence, that Xet is used."""
    with HubServer() as hub:
        surroundings = environment() | {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
            "HF_XET_XORB_COMPRESSION_POLICY": "none",
        }

        def run(token: str) -> subprocess.CompletedProcess:
            words = [sys.executable, "-c", COMMAND, "push", str(exported), "org/model"]
            settings = surroundings | {"HF_TOKEN": token}
            return subprocess.run(words, env=settings, cwd=ROOT, capture_output=True, text=True, timeout=120)

        refused = run(READER)
        assert refused.returncode == 2 and refused.stderr.splitlines()[-1].startswith("error: Your login may not write")
        assert not hub.repos and READER not in refused.stderr
        done = run(WRITER)
        assert done.returncode == 0, done.stderr
        commit = hub.repos["org/model"].branches["main"]
        assert f"pushed 17 files to {hub.url}/org/model, commit {commit}" in done.stdout
        assert hub.requests["shard"] == 1 and not hub.requests["batch"]
        weights = (exported / "model.safetensors").read_bytes()
        assert visible(hub, "org/model")["model.safetensors"] == weights
