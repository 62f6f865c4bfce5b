"""DeepSpeed without traces in other tests of the same process."""

import pytest
import torch
from deepspeed.comm import comm
from deepspeed.utils import groups


@pytest.fixture(scope="module")
def alone():
    """Let a module's tests make this process a group of one, and forget it behind them."""
    before = {name: value.copy() if isinstance(value, dict) else value for name, value in vars(groups).items()}
    backend = comm.cdb
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    comm.cdb = backend
    vars(groups).update(before)
