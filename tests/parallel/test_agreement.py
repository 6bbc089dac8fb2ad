"""When the processes of a cluster exchange flags."""

import jax
import numpy as np
import pytest

from minsae_jax.parallel import agreement
from minsae_jax.parallel.agreement import Agreement


class Clock:
    def __init__(self):
        self.seconds = 0.0

    def monotonic(self):
        return self.seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(agreement, "time", clock)
    return clock


def run(one, clock, intervals, seconds):
    """Return the times of the exchanges in some log intervals of two calls."""
    times = []
    for _ in range(intervals):
        for ends_interval in (False, True):
            clock.seconds += seconds / 2
            if one.is_due(ends_interval):
                assert ends_interval
                assert one.exchange(False, True) == (False, True)
                times.append(clock.seconds)
    return times


def test_exchanges_are_half_a_second_apart_or_a_log_interval(clock, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(agreement, "any_process", lambda *flags: flags)
    one = Agreement()
    short = run(one, clock, intervals=1000, seconds=0.01)
    assert 10 <= len(short) <= 30
    assert 0.3 < np.diff(short[-5:]).min() < np.diff(short[-5:]).max() < 1
    long = run(one, clock, intervals=100, seconds=2)
    np.testing.assert_allclose(np.diff(long), 2)


def test_clocks_of_processes_make_no_difference(monkeypatch):
    """What all know decides, or one would wait for an exchange that another does not make."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    clocks = [Clock(), Clock()]
    processes = []
    for clock in clocks:
        monkeypatch.setattr(agreement, "time", clock)
        processes.append(Agreement())
    rng = np.random.default_rng(0)
    n_exchanges = 0
    for _ in range(300):
        answer = (False, bool(rng.random() < 0.7), bool(rng.random() < 0.1))
        monkeypatch.setattr(agreement, "any_process", lambda *_, answer=answer: answer)
        due = {process.is_due(ends_interval=True) for process in processes}
        assert len(due) == 1
        for clock, process, seconds in zip(clocks, processes, (0.02, 3.0), strict=True):
            clock.seconds += seconds
            if due == {True}:
                monkeypatch.setattr(agreement, "time", clock)
                process.exchange(False)
                n_exchanges += 1
    assert 20 < n_exchanges < 500


def test_a_single_process_is_always_due(clock):
    one = Agreement()
    assert one.is_due(ends_interval=False)
    assert one.exchange(True, False) == (True, False)
