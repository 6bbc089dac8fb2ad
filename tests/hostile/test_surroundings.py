"""Odd surroundings change nothing; `python -m tests.hostile.surroundings` tries all verbs."""

import sys

import pytest

from tests.hostile.surroundings import FOLDER, run


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="of Linux")
def test_odd_surroundings_change_nothing(tmp_path):
    # `verify` compares what the other verbs wrote with its checksums.
    assert run(tmp_path, "--verbs", "demo", "prepare", "verify") == ""
    assert len(list((tmp_path / FOLDER / "data").glob("*.npy"))) >= 10
    assert not list(tmp_path.rglob("hacked"))
