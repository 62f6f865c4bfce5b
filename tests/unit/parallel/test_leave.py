"""A process that leaves has done what Python does before it ends, and ends with the code that it was given."""

import subprocess
import sys

import pytest

PROGRAM = """
import atexit, threading, time
from moe_hf.parallel.processes import leave

atexit.register(print, "exit handler")
threading.Thread(target=lambda: (time.sleep(0.3), print("thread"))).start()
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
print("end", end=" of the program\\n")
leave({code})
"""


@pytest.mark.parametrize("code", [0, 75])
def test_threads_end_and_exit_handlers_run(code):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(code=code)], capture_output=True, text=True, timeout=50, check=False
    )
    assert (done.returncode, done.stderr) == (code, "")
    assert done.stdout.splitlines() == ["end of the program", "thread", "exit handler"]
