"""Generated input is read correctly or refused; `python -m tests.hostile` tries more cases."""

import sys

import pytest

from tests.hostile.inputs import INPUTS

GIB = 1 << 30


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured from /proc")
@pytest.mark.parametrize("name", INPUTS)
def test_generated_input_is_read_or_refused_in_one_line(name, tmp_path):
    tally = INPUTS[name].run(tmp_path, examples=100)
    assert tally.memory < GIB
    assert tally.tried >= 100
    # A generator that only made garbage would test the first line of a parser.
    assert tally.refused > 20
    assert tally.accepted > 0
