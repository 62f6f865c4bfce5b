"""What every test starts from, the markers' switches, and the parity table at the end."""

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow; run with --slow"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def same_start():
    """Give every test the same seed, one thread and the usual dtype, whatever the one before has left."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def parity_table(request) -> list:
    """Rows (cell, loss error, norm error, weight error) that are printed when all tests have run."""
    rows = []
    request.config.stash[_TABLE] = rows
    return rows


_TABLE = pytest.StashKey()


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash.get(_TABLE, [])
    if rows:
        terminalreporter.section("parity with one process: largest relative error")
        terminalreporter.write_line(
            "| ZeRO | ranks | EP | accumulation | dtype | routing | loss | gradient norm | weights |"
        )
        terminalreporter.write_line("|---|---|---|---|---|---|---|---|---|")
        for cell, loss, norm, weights in rows:
            ep = "off" if cell.ep is None else cell.ep
            terminalreporter.write_line(
                f"| {cell.zero} | {cell.ranks} | {ep} | {cell.accumulation} | {cell.dtype} "
                f"| {cell.routing} | {loss:.1e} | {norm:.1e} | {weights:.1e} |"
            )
