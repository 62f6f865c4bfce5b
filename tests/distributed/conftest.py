"""Files that several distributed tests read."""

import json
from pathlib import Path

import pytest
from small import GLOBAL_MICRO_BATCH, NUM_STEPS, make_rows, save_small_model


@pytest.fixture(scope="session")
def small_model(tmp_path_factory) -> Path:
    """Folder with the small model's initial weights and tokenizer."""
    folder = tmp_path_factory.mktemp("small_model")
    save_small_model(folder)
    return folder


@pytest.fixture(scope="session")
def rows() -> list[dict]:
    """As many rows as the longest run of the matrix reads."""
    return make_rows(NUM_STEPS * 2 * GLOBAL_MICRO_BATCH)


@pytest.fixture(scope="session")
def rows_file(rows, tmp_path_factory) -> Path:
    """The rows as a file for --train_file."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
