"""The runner of benchmarks.gpu: failures and the time limit."""

import time
from types import SimpleNamespace

import pytest

from benchmarks import gpu
from benchmarks.gpu_kernels import Kernel, kernels_of
from benchmarks.gpu_programs import Goals, Session, Sizes


@pytest.fixture
def run_part(monkeypatch, tmp_path, capsys):
    """run_part(part, seconds=60) -> (lines, failures); the file has the printed lines."""

    def run_part(part, seconds=60.0):
        monkeypatch.setattr(gpu, "PARTS", {"part": part})
        session = Session(Sizes())
        file = tmp_path / "out.md"
        end = time.monotonic() + seconds
        gpu.run_part("part", session, gpu.Report(str(file)), end)
        printed = capsys.readouterr().out
        assert file.read_text() == printed
        return printed.splitlines(), session.failures

    return run_part


def test_part_that_raises_takes_one_line(run_part):
    def part(session):
        """What it measures."""
        yield "| measured |"
        raise ValueError("two\nlines")

    lines, failures = run_part(part)
    assert lines[1:6] == [
        "**part**: What it measures.",
        "",
        "| measured |",
        "",
        "Failed: ValueError: two lines",
    ]
    assert failures == ["part: ValueError"]


def test_row_that_fails_leaves_the_others(run_part):
    def part(session):
        yield from session.rows({"bad": lambda: 1 / 0, "good": lambda: "| measured |"})

    lines, failures = run_part(part)
    assert lines[3:5] == ["| bad | failed: ZeroDivisionError: division by zero |", "| measured |"]
    assert failures == ["bad: ZeroDivisionError"]


def test_part_without_torch_is_skipped(run_part):
    def part(session):
        yield "| measured |"
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    lines, failures = run_part(part)
    assert "Skipped: torch is not installed." in lines
    assert failures == []


def test_part_stops_when_the_time_is_over(run_part):
    is_closed = []

    def part(session):
        try:
            yield "| first |"
            time.sleep(0.2)
            yield "| second |"
            yield "| third |"
        finally:
            is_closed.append(True)

    lines, failures = run_part(part, seconds=0.1)
    assert "| second |" in lines
    assert "| third |" not in lines
    assert "Stopped here, no time is left." in lines
    assert is_closed == [True]
    assert failures == []


def test_part_does_not_start_without_time(run_part):
    lines, _ = run_part(lambda session: pytest.fail("started"), seconds=-1.0)
    assert lines == ["", "**part**: not measured, no time is left."]


def test_goals_are_compared():
    goals = Goals(step_share=0.25, over_eager=9.9, resumes_equal=True)
    cells = [line.split(" | ")[1:] for line in gpu.goal_rows(goals)]
    assert cells == [
        ["0.25", "yes |"],
        ["not measured", " |"],
        ["9.9", "no |"],
        ["not measured", " |"],
        ["not measured", " |"],
        ["1", "yes |"],
    ]


def test_kernels_are_counted_once_and_on_gpus_only():
    def line(name, *events):
        events = [SimpleNamespace(name=n, duration_ns=d) for n, d in events]
        return SimpleNamespace(name=name, events=events)

    stream = line("Stream #1", ("gemm", 3e6), ("sort", 1e6), ("gemm", 5e6))
    again = line("XLA Ops", ("gemm", 3e6))
    gpu_plane = SimpleNamespace(name="/device:GPU:0", lines=[stream, again])
    host = SimpleNamespace(name="/host:CPU", lines=[line("Stream", ("gemm", 1e6))])
    profile = SimpleNamespace(planes=[gpu_plane, host])
    assert list(kernels_of(profile, n_steps=2)) == [
        Kernel("gemm", 4.0, 1),
        Kernel("sort", 0.5, 0.5),
    ]
