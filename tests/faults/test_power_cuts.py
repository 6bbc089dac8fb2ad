"""A sample of power cuts; `python -m tests.faults power` tries all, and the model of the disk."""

from pathlib import Path

import pytest

from tests.faults.power_cuts import Disk, Record, sweep
from tests.faults.verbs import VERBS

SAMPLE = {"convert encoder": 19, "extract": 40, "train": 90}  # every n-th state


def replay(tmp_path: Path, *calls: tuple) -> Disk:
    """Return an empty disk after calls: kind, path, other path, data."""
    disk = Disk(tmp_path)
    for kind, path, other, data in calls:
        disk.apply(Record(kind, tmp_path / path, tmp_path / other, 0, data))
    return disk


def test_unflushed_content_and_names_are_lost(tmp_path):
    disk = replay(tmp_path, ("c", "a", "", b""), ("w", "a", "", b"text"))
    assert disk.survivors(names_survive=True) == {"a": b""}
    assert disk.survivors(names_survive=False) == {}


def test_flushed_content_needs_a_flushed_name(tmp_path):
    calls = [("c", "a.tmp", "", b""), ("w", "a.tmp", "", b"text"), ("f", "a.tmp", "", b"")]
    calls += [("r", "a.tmp", "a", b"")]
    disk = replay(tmp_path, *calls)
    assert disk.survivors(names_survive=True) == {"a": b"text"}
    assert disk.survivors(names_survive=False) == {}
    disk = replay(tmp_path, *calls, ("f", "", "", b""))
    assert disk.survivors(names_survive=False) == {"a": b"text"}


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLE)
def test_power_cuts_lose_nothing(workshop, name):
    cuts = list(sweep(workshop, VERBS[name], every=SAMPLE[name]))
    assert len(cuts) >= 3
    assert [str(each) for each in cuts if each.outcome != "same bytes"] == []
