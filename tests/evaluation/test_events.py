"""Events: which tokens they cover, scores, AUC, and what a planted feature gets."""

from itertools import pairwise

import numpy as np
import pytest

from minsae_jax import UserError
from minsae_jax.eeg.montage import CHANNELS
from minsae_jax.evaluation.events import (
    Span,
    auc,
    gather,
    labelled_tokens,
    largest,
    principal_components,
    probe,
    read_events,
    score_kind,
    spans_of,
    token_auc,
    tokens_of,
)


def test_tokens_of_a_span(trained):
    """Patches of 100 samples in windows of 1,000, a CLS token in front."""
    dataset = trained.dataset("test")
    first, _ = dataset.sequences_of(1)

    def covered(start, stop, channels=(4,)):
        sequences, tokens = tokens_of(dataset, Span(1, start, stop, channels, True))
        assert set(dataset.channel[sequences]) <= set(channels)
        assert (sequences >= first).all()
        assert (dataset.recording[sequences] == 1).all()
        return sorted(zip(dataset.window[sequences].tolist(), tokens.tolist(), strict=True))

    assert covered(0, 1) == [(0, 1)]
    assert covered(99, 101) == [(0, 1), (0, 2)]
    assert covered(950, 1100) == [(0, 10), (1, 1)]
    assert covered(300, 500, (4, 7)) == [(0, 4), (0, 4), (0, 5), (0, 5)]
    assert covered(10**6, 10**6 + 5) == []


def test_spans_without_events(trained):
    dataset = trained.dataset("test")
    events = read_events(trained.recordings)["alpha"]
    spans = spans_of(dataset, events, seed=0)
    own = {name: [e for e in events if e[0] == name] for name in dataset.recordings}
    assert 0 < sum(not s.is_event for s in spans) <= sum(s.is_event for s in spans)
    for before, span in pairwise(spans):
        if not span.is_event:
            assert before.is_event
            assert (before.channels, before.stop - before.start) == (
                span.channels,
                span.stop - span.start,
            )
            for _, start, stop, _ in own[dataset.recordings[span.recording]]:
                assert span.stop <= start or span.start >= stop
    assert spans == spans_of(dataset, events, seed=0)


def test_auc():
    rng = np.random.default_rng(0)
    is_event = rng.random(60) < 0.4
    scores = rng.integers(0, 8, size=(60, 5)) + is_event[:, None] * np.arange(5)
    for column, value in zip(scores.T, auc(scores.astype(float), is_event), strict=True):
        pairs = np.sign(column[is_event][:, None] - column[~is_event][None])
        assert value == pytest.approx((pairs.mean() + 1) / 2)


def test_probe():
    """A direction that no column shows alone."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(400, 5)) * [1, 3, 1, 1, 1] + 7
    is_event = x[:, 0] - x[:, 1] / 3 + 0.1 * rng.normal(size=400) > 7 - 7 / 3
    assert auc(x, is_event).max() < 0.9
    assert auc(probe(x[:200], is_event[:200])(x[200:])[:, None], is_event[200:])[0] > 0.98


def test_a_planted_feature_is_found(trained):
    """Activations of which dimension 3 is 5 higher on the tokens of spikes."""
    val, test = trained.dataset("val"), trained.dataset("test")
    events = read_events(trained.recordings)["spike"]
    rng, pairs = np.random.default_rng(2), []
    for dataset in (val, test):
        spans, activations = gather(dataset, spans_of(dataset, events, 0))
        noise = [rng.normal(size=(len(x), 8)).astype(np.float32) for x in activations]
        for span, x in zip(spans, noise, strict=True):
            x[0, 3] += 9 * span.is_event
        pairs.append((spans, noise))
    found = score_kind(*pairs, lambda x: np.maximum(x, 0))
    assert found["feature"] == found["best_five"][0] == 3
    assert found["auc"] == pytest.approx(1, abs=0.01)
    assert found["probe_auc"] > 0.95
    assert score_kind(*pairs, principal_components(pairs[0][1]))["auc"] > 0.8


def test_largest_of_each_span():
    rng = np.random.default_rng(3)
    activations = [rng.normal(size=(n, 4)).astype(np.float32) for n in (5000, 1, 4000, 17, 9000, 2)]
    np.testing.assert_array_equal(
        largest(activations, lambda x: x), [x.max(0) for x in activations]
    )


def test_tokens_that_an_event_covers(trained):
    dataset, sae = trained.dataset("test"), trained.sae()
    events = [(dataset.recordings[0], 140, 260, (CHANNELS.index("CZ"),))]
    covered = labelled_tokens(dataset, events)
    sequence, patch = np.nonzero(covered)
    assert dataset.channel[sequence].tolist() == [CHANNELS.index("CZ")] * 2
    assert patch.tolist() == [1, 2]  # 60 of 100 samples each
    feature = int(np.argmax(np.asarray(sae.encode(dataset.read(0, 50))).mean((0, 1))))
    values = np.asarray(sae.encode(dataset.read(0, len(dataset.recording))))[:, 1:, feature]
    expected = auc(values.reshape(-1, 1).astype(np.float64), covered.reshape(-1))[0]
    assert token_auc(dataset, covered, sae, feature) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    "row", ["a.npy,alpha,5,5,CZ", "a.npy,alpha,x,9,CZ", "a.npy,alpha,1,9,NOSE", "a.npy,alpha,1"]
)
def test_a_damaged_table(tmp_path, row):
    (tmp_path / "events.csv").write_text(
        f"recording,event,start,stop,channels\nb.npy,alpha,1,9,CZ\n{row}\n"
    )
    with pytest.raises(UserError, match=r"events.csv, line 3, must hold recording"):
        read_events(tmp_path)
