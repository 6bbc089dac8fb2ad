"""Several steps in one call, as accelerators make them, give the results of single steps."""

from dataclasses import replace

import numpy as np
import pytest

from minsae_jax import load_sae
from minsae_jax.sae import batches
from minsae_jax.sae.trainer import train
from tests.interrupt import train_until


@pytest.fixture
def calls():
    """Make the trainer call for 4 steps at once; returns how many steps each call made."""
    made = []
    steps_in_call = batches.DeviceBatches.steps_in_call

    def count(self, step):
        made.append(steps_in_call(self, step))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "on_cpu", lambda: False)
        patch.setattr(batches, "STEPS_PER_CALL", 4)
        patch.setattr(batches.DeviceBatches, "steps_in_call", count)
        yield made


@pytest.mark.parametrize(("interval", "longest"), [(8, 8), (4, 4), (6, 4)])
def test_calls_are_long_if_they_divide_the_intervals(
    settings, tmp_path, calls, monkeypatch, interval, longest
):
    monkeypatch.setattr(batches, "LONG_CALL", 8)
    settings = replace(settings, num_steps=24, checkpoint_every=24, eval_every=24)
    train(replace(settings, eval_window=interval, run_dir=str(tmp_path / "run")))
    assert sum(calls) == 24
    assert max(calls) == longest


def weights(run):
    paths = sorted(run.rglob("sae.safetensors"))
    return [load_sae(path.parent).params for path in paths]


@pytest.mark.parametrize(
    ("mesh", "resident"),
    [
        ("1x1", "on"),
        pytest.param("2x4", "off", marks=pytest.mark.slow),
        pytest.param("1x1", "off", marks=pytest.mark.slow),
        pytest.param("2x4", "on", marks=pytest.mark.slow),
    ],
)
def test_calls_of_several_steps_train_as_single_steps_do(
    settings, tmp_path, request, mesh, resident
):
    settings = replace(
        settings, mesh=mesh, resident=resident, num_steps=23, eval_window=10, eval_every=6
    )
    train(replace(settings, run_dir=str(tmp_path / "single")))
    calls = request.getfixturevalue("calls")
    train(replace(settings, run_dir=str(tmp_path / "several")))
    assert sum(calls) == 23
    assert calls.count(4) >= 2
    singles, several = weights(tmp_path / "single"), weights(tmp_path / "several")
    assert len(singles) == len(several) > 1
    for expected, found in zip(singles, several, strict=True):
        for name in expected:
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-5)


def test_nothing_is_skipped_within_a_call(settings, tmp_path, calls):
    """Log intervals, measures and checkpoints fall at the ends of calls."""
    steps = []
    settings = replace(
        settings,
        num_steps=24,
        eval_window=6,
        checkpoint_every=9,
        run_dir=str(tmp_path / "run"),
    )
    train(settings, on_step=steps.append)
    assert steps == list(range(1, 25))
    ends = np.cumsum(calls)
    assert set(range(6, 25, 6)) <= set(ends)
    assert set(range(9, 25, 9)) <= set(ends)
    # Calls of four steps start at multiples of four.
    assert {int(end - 4) for end, n in zip(ends, calls, strict=True) if n == 4} == {0, 12, 20}


@pytest.mark.parametrize("checkpoint_every", [7, pytest.param(8, marks=pytest.mark.slow)])
def test_a_resumed_run_makes_the_same_calls(settings, tmp_path, calls, checkpoint_every):
    """From a checkpoint that is a multiple of the steps in a call, and from one that is not."""
    settings = replace(settings, num_steps=24, eval_window=12, checkpoint_every=checkpoint_every)
    whole = replace(settings, run_dir=str(tmp_path / "whole"))
    train(whole)
    resumed = replace(settings, run_dir=str(tmp_path / "resumed"))
    train_until(resumed, checkpoint_every + 1)
    n_before = len(calls)
    train(resumed)
    assert sum(calls[n_before:]) == 24 - checkpoint_every
    for path in sorted((tmp_path / "whole").rglob("*.csv")) + sorted(
        (tmp_path / "whole").rglob("sae.safetensors")
    ):
        other = tmp_path / "resumed" / path.relative_to(tmp_path / "whole")
        assert other.read_bytes() == path.read_bytes(), path
