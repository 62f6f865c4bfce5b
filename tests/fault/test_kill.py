"""Kill -9 at any moment, of one process or of all: the same command, started again, ends with the same weights."""

import random
import signal

import pytest
from fault_server import Start, draw_blow, run_chains

REPETITIONS = [pytest.param(3, id="3_times"), pytest.param(20, id="20_times", marks=pytest.mark.slow)]


@pytest.mark.parametrize("repetitions", REPETITIONS)
def test_killed_run_ends_with_the_weights_of_the_uninterrupted_one(lab, tmp_path, repetitions):
    draw = random.Random(repetitions)
    references = {zero: f"whole_{repetitions}_{zero}" for zero in (2, 3)}
    zero_of = {f"killed_{repetitions}_{i}": 2 + i % 2 for i in range(repetitions)}
    chains = [lab.chain(name, zero) for zero, name in references.items()]
    for i, (name, zero) in enumerate(zero_of.items()):
        chains.append(lab.chain(name, zero, Start(draw_blow(draw, i)), Start()))
    ended = run_chains(chains, tmp_path)
    for name, zero in zero_of.items():
        killed, last = ended[name]
        assert -signal.SIGKILL in killed.exit_codes, name
        assert last.exit_codes == [0, 0], last.stderr
        lab.assert_same_weights(name, references[zero])
        lab.assert_tidy(name)
