"""Events: spans with and without them, and the tokens that they touch or cover."""

from itertools import pairwise

import numpy as np
import pytest

from minsae_jax import UserError
from minsae_jax.eeg.montage import CHANNELS
from minsae_jax.evaluation.events import (
    LabelledEvent,
    Span,
    draw_spans,
    event_share,
    max_over_spans,
    read_events,
    span_groups,
    tokens_of,
)


def test_tokens_of_a_span(trained):
    """Patches of 100 samples in windows of 1,000, after a CLS token."""
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


def test_spans_without_an_event_touch_no_event(trained):
    dataset = trained.dataset("test")
    events = read_events(trained.recordings)["alpha"]
    spans = draw_spans(dataset, events, seed=0)
    assert 0 < sum(not s.is_event for s in spans) <= sum(s.is_event for s in spans)
    for before, span in pairwise(spans):
        if span.is_event:
            continue
        assert before.is_event
        assert before.channels == span.channels
        assert before.stop - before.start == span.stop - span.start
        for event in events:
            if event.recording == dataset.recordings[span.recording]:
                assert span.stop <= event.start or span.start >= event.stop
    assert spans == draw_spans(dataset, events, seed=0)


def test_maxima_of_groups_of_spans():
    rng = np.random.default_rng(3)
    lengths = (5000, 1, 4000, 17, 9000, 2)
    activations = [rng.normal(size=(n, 4)).astype(np.float32) for n in lengths]
    groups = [group.tolist() for group in span_groups(activations)]
    assert groups == [[0, 1], [2, 3], [4], [5]]
    for group in groups:
        x = np.concatenate([activations[i] for i in group])
        maxima = max_over_spans(x, np.array([lengths[i] for i in group]))
        np.testing.assert_array_equal(maxima, [activations[i].max(0) for i in group])


def test_patches_that_an_event_covers_for_half(trained):
    dataset = trained.dataset("test")
    cz = CHANNELS.index("CZ")
    share = event_share(dataset, [LabelledEvent(dataset.recordings[0], 140, 260, (cz,))])
    sequence, patch = np.nonzero(share >= 0.5)
    assert dataset.channel[sequence].tolist() == [cz] * 2
    assert patch.tolist() == [1, 2]  # 60 of 100 samples each
    assert share[share > 0].tolist() == pytest.approx([0.6, 0.6])
    share = event_share(dataset, [LabelledEvent(dataset.recordings[0], 190, 310, (cz,))])
    assert share[share > 0].tolist() == pytest.approx([0.1, 1, 0.1])


@pytest.mark.parametrize(
    "row", ["a.npy,alpha,5,5,CZ", "a.npy,alpha,x,9,CZ", "a.npy,alpha,1,9,NOSE", "a.npy,alpha,1"]
)
def test_invalid_events_csv_is_an_error(tmp_path, row):
    header = "recording,event,start,stop,channels"
    (tmp_path / "events.csv").write_text(f"{header}\nb.npy,alpha,1,9,CZ\n{row}\n")
    with pytest.raises(UserError, match=r"events.csv, line 3: expected recording"):
        read_events(tmp_path)
