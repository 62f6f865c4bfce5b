"""What the tests of pushes, `test_hub*.py`, push, and the hubs that they push it to."""

import shutil
from pathlib import Path

import pytest
import torch
from hub_server import HubServer, connect
from small import save_tokenizer, small_config
from transformers import AutoTokenizer

from moe_hf import MoEForCausalLM
from moe_hf.checkpoint.export import export_model
from moe_hf.checkpoint.model_card import render_model_card


@pytest.fixture(scope="session")
def exported(tmp_path_factory) -> Path:
    """A whole export in four shards; nobody changes these files."""
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
