"""Generated input is read correctly or refused; `python -m tests.hostile` tries more cases."""

import pytest

from tests.hostile.inputs import INPUTS


@pytest.mark.slow
@pytest.mark.parametrize("name", INPUTS)
def test_generated_input_is_read_or_refused_in_one_line(name, tmp_path):
    tally = INPUTS[name].run(tmp_path, examples=100)
    assert tally.tried >= 100
    # A generator that only makes garbage would test the first line of a parser.
    assert tally.refused > 20
    assert tally.accepted > 3
    assert len(tally.messages) > 10
