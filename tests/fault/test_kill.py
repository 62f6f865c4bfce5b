"""Kill -9 at any moment, of one process or of all: the same command, started again, ends with the same weights."""

import random
import signal

import pytest
from fault_server import Start, draw_blow, logged_steps, run_chains
from small import NUM_STEPS

REPETITIONS = [pytest.param(3, id="3_times"), pytest.param(20, id="20_times", marks=pytest.mark.slow)]


@pytest.mark.parametrize("repetitions", REPETITIONS)
def test_killed_run_ends_with_the_weights_of_the_uninterrupted_one(lab, tmp_path, repetitions):
    draw = random.Random(repetitions)
    references = {zero: f"whole_{repetitions}_{zero}" for zero in (2, 3)}
    blows = {f"killed_{repetitions}_{i}": draw_blow(draw, i) for i in range(repetitions)}
    zero_of = {name: 2 + i % 2 for i, name in enumerate(blows)}
    chains = [lab.chain(name, zero) for zero, name in references.items()]
    chains += [lab.chain(name, zero_of[name], Start(blow), Start()) for name, blow in blows.items()]
    ended = run_chains(chains, tmp_path)
    for name, blow in blows.items():
        killed, last = ended[name]
        assert -signal.SIGKILL in killed.exit_codes, name
        assert last.exit_codes == [0, 0], last.stderr
        # What was whole when the blow came is not trained again.
        num_whole = {"start": 0, "save": blow.step - 1, "checkpoint": blow.step}[blow.moment]
        assert len(logged_steps(last)) <= NUM_STEPS - num_whole
        lab.assert_same_weights(name, references[zero_of[name]])
        lab.assert_tidy(name)
