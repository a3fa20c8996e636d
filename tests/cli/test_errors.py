"""How a long command ends when it is interrupted."""

from __future__ import annotations

import subprocess
import sys

SWALLOWED = """
import signal
from dq_export.cli.errors import watching

class Dropped:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)

with watching(quiet=False, advice="the same command continues") as watch:
    watch.begin("calibrate", "pictures")
    Dropped()
    watch.advance(1, 2)
    print("went on")
"""


def test_an_interrupt_that_python_swallows_ends_the_command_without_a_traceback() -> None:
    """The interpreter ignores an exception that is raised while it drops an object, and prints it."""
    result = subprocess.run([sys.executable, "-c", SWALLOWED], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (130, "")
    assert result.stderr.splitlines() == ["calibrate pictures", "", "interrupted; the same command continues"]
