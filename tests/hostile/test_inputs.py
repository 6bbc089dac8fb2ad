"""Generated input is read correctly or refused; `python -m tests.hostile` tries more cases."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.hostile.inputs import INPUTS

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured from /proc")
def test_generated_input_is_read_or_refused_in_one_line():
    """In a process of its own: in tests, beartype runs code when a function is first called."""
    command = [sys.executable, "-m", "tests.hostile", "--examples", "100"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()[2:]]
    assert [row[0] for row in rows] == list(INPUTS)
    for _, tried, accepted, refused, _, megabytes in rows:
        assert int(tried) >= 100
        # A generator that only made garbage would test the first line of a parser.
        assert int(refused) > 20
        assert int(accepted) > 0
        assert int(megabytes) < 1000
