"""A sample of the errors of the system; `python -m tests.faults errors` tries them all.

Every kind of call fails in one command or more.
"""

import errno

import pytest

from tests.faults.io_errors import inject, sample
from tests.faults.process import SHORT_WRITE, Fault
from tests.faults.verbs import VERBS, contents

SAMPLE = {
    "demo": ("write", "rename", "mkdir"),
    "prepare": ("unlink", "stat"),
    "convert encoder": ("open", "write", "flush"),
    "extract": ("open", "write", "flush", "rename"),
    "train": ("open", "write", "flush", "rename", "mkdir"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLE)
def test_errors_end_in_one_line_and_lose_nothing(workshop, name):
    cases = list(sample(workshop, VERBS[name], SAMPLE[name]))
    assert [str(case) for case in cases if not case.is_good] == []
    assert any(case.outcome == "error" for case in cases)


@pytest.mark.slow
def test_full_disk_under_orbax_is_one_line(workshop):
    verb = VERBS["convert encoder"]
    case = inject(workshop, verb, Fault("write", 4, errno.ENOSPC, on=True))
    assert case.outcome == "error"
    assert "No space left on device" in case.stderr


@pytest.mark.slow
def test_threads_of_orbax_that_wait_for_ever_are_ended(workshop):
    verb = VERBS["convert encoder"]
    workshop.finished(verb)
    folders = workshop.calls[verb.name]["mkdir"]
    call = folders.index("/.encoder.tmp/params.orbax-checkpoint-tmp")
    case = inject(workshop, verb, Fault("mkdir", call, errno.ENOSPC, on=True))
    assert case.outcome == "error"


@pytest.mark.slow
def test_short_write_is_completed(workshop):
    verb = VERBS["plot"]
    workshop.finished(verb)
    last = len(workshop.calls["plot"]["write"]) - 1  # the GIF
    case = inject(workshop, verb, Fault("write", last, SHORT_WRITE))
    assert case.outcome == "success"


@pytest.mark.slow
def test_a_wrong_file_is_noticed(workshop):
    """The harness itself: a changed file and a missing one."""
    verb = VERBS["demo"]
    folder = workshop.fresh(verb)
    workshop.run(verb)
    expected = contents(workshop.finished(verb))
    assert contents(folder) == expected
    (folder / "data/events.csv").write_text("")
    assert contents(folder) != expected
    (folder / "data/events.csv").unlink()
    assert contents(folder) != expected
