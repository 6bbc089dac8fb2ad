"""A sample of special files; `python -m tests.faults files` tries them all."""

import pytest

from tests.faults.special_files import sweep
from tests.faults.verbs import VERBS

# `every` has no common factor with the three kinds, so that each is tried.
SAMPLE = {"demo": 7, "convert encoder": 5, "extract": 26}


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLE)
def test_special_files_are_refused_or_ignored(workshop, name):
    cases = list(sweep(workshop, VERBS[name], every=SAMPLE[name]))
    assert len(cases) >= 3
    assert [str(case) for case in cases if not case.is_good] == []
