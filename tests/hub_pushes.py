"""What pushes leave on the hub of `hub_server.py`, and pushes that are refused."""

from pathlib import Path

import pytest
from hub_server import READER, WRITER, HubServer

from moe_hf.checkpoint.hub import PushError, push_export

REPO = "org/model"
FIRST_SHARD = "model-00001-of-00004.safetensors"


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
