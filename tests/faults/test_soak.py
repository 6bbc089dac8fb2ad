"""Cycles of the soak test with the quickest command."""

from dataclasses import replace

import pytest

from benchmarks.soak import make_reference, run_cycle, table
from tests.faults.verbs import VERBS


@pytest.mark.slow
def test_cycles_end_with_the_same_bytes_or_show_the_difference(workshop, capsys):
    reference = make_reference(workshop, VERBS["demo"])
    attempts = []
    for seed in range(3):
        attempts += run_cycle(workshop, [reference], seed)
    assert [str(each) for each in attempts if not each.is_good] == []
    disturbed = [each for each in attempts if each.disturbance]
    assert {each.disturbance.kind for each in disturbed} == {"kill", "full disk", "error"}
    assert "one line" in {each.outcome for each in disturbed}
    assert capsys.readouterr().out.count("same bytes") == 3

    wrong = replace(reference, contents=reference.contents | {"data/events.csv": "another hash"})
    attempts = run_cycle(workshop, [wrong], seed=0)
    assert attempts[-1].outcome == "other bytes: ['data/events.csv']"
    assert "| demo | none | 1 | 0 | 0 | 0 | 1 |" in table(attempts, 1)
    assert "DIFFERENT" in capsys.readouterr().out
