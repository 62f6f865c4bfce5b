"""What tests need that train several times in one process."""

import pytest
from accelerate.state import AcceleratorState


@pytest.fixture
def no_state_of_earlier_runs():
    """Accelerate keeps precision and devices of the first run for all others of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
