"""Events: spans with and without them, and the tokens that they touch or cover."""

from itertools import pairwise

import numpy as np
import pytest

from minsae_jax import TokenGrid, UserError
from minsae_jax.eeg.events import COLUMNS
from minsae_jax.eeg.montage import CHANNELS
from minsae_jax.evaluation.events import (
    LabelledEvent,
    Span,
    draw_spans,
    event_share,
    gather,
    max_over_spans,
    read_events,
    sample,
    span_groups,
    span_maxima,
    tokens_of,
)
from minsae_jax.evaluation.ranking import auc
from tests.evaluation.planted import (
    SEQ_LEN,
    Places,
    make_places,
    true_autoencoder,
    write_planted,
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


GRIDS = {
    "overlapping": (TokenGrid.patches(7, 10, 5), 40),
    "gaps": (TokenGrid.patches(3, 10, n_cls=1), 37),
    "padded": (TokenGrid.patches(4, 10, 9, first_sample=3), 37),
    "channels": (TokenGrid.patches(4, 10, n_channels=2, n_cls=1), 40),
    "uneven": (TokenGrid(np.full(3, -1), np.array([0, 3, 20]), np.array([5, 9, 39])), 40),
}


@pytest.mark.parametrize("name", GRIDS)
def test_spans_and_shares_of_any_grid_by_brute_force(name, tmp_path):
    grid, seq_len = GRIDS[name]
    places = make_places(3, 12)
    if name == "channels":  # a sequence is a whole window
        first = places.channel == 0
        arrays = (places.recording[first], places.window[first], np.full(first.sum(), -1))
        places = Places(places.recordings, *arrays)
    x = np.zeros((len(places.recording), grid.n_tokens, 4))
    dataset = write_planted(tmp_path, x, places, tokens=grid, seq_len=seq_len)
    rng = np.random.default_rng(0)
    events = []
    for recording in dataset.recordings[:3]:
        for start in rng.integers(0, 12 * seq_len, 5).tolist():
            channels = ((0,), (1,), (0, 1))[start % 3]
            events.append(LabelledEvent(recording, start, start + 1 + start % 29, channels))
    # Padding after a window is not part of the recording.
    begin = dataset.window[:, None] * seq_len + grid.first
    stop = dataset.window[:, None] * seq_len + np.minimum(grid.last + 1, seq_len)
    channel = np.where(grid.channel >= 0, grid.channel, dataset.channel[:, None])
    share = np.zeros(channel.shape)
    for event in events:
        is_there = np.isin(channel, event.channels)
        is_there &= (dataset.recording == dataset.recordings.index(event.recording))[:, None]
        for sequence, token in np.argwhere(is_there & (grid.first >= 0)):
            samples = np.arange(begin[sequence, token], stop[sequence, token])
            same = [other for other in events if other.recording == event.recording]
            same = [other for other in same if channel[sequence, token] in other.channels]
            inside = np.zeros(len(samples), bool)
            for other in same:
                inside |= (samples >= other.start) & (samples < other.stop)
            share[sequence, token] = inside.mean()
    expected = share[:, grid.located]
    np.testing.assert_allclose(event_share(dataset, events), expected, atol=1e-6)

    def touched(span):
        is_touched = (begin < span.stop) & (stop > span.start) & np.isin(channel, span.channels)
        is_touched &= (dataset.recording == span.recording)[:, None] & (grid.first >= 0)
        found = set(zip(*(places.tolist() for places in tokens_of(dataset, span)), strict=True))
        assert found == set(map(tuple, np.argwhere(is_touched).tolist()))
        return is_touched

    spans = draw_spans(dataset, events, seed=0)
    assert len(spans) > 10
    for of_event, other in zip(spans[::2], spans[1::2], strict=True):
        assert touched(of_event).sum() == touched(other).sum()
        assert share[touched(other)].sum() == 0


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    """Independent tokens of 10 samples, four in a window, with 8 features."""
    rng = np.random.default_rng(0)
    places = make_places(30, 40)
    x = np.maximum(rng.normal(size=(len(places.recording), 4, 8)), 0)
    return write_planted(tmp_path_factory.mktemp("noise"), x, places)


@pytest.mark.parametrize("length", [7, 10, 25])
def test_noise_does_not_detect_events_that_begin_with_a_token(noise, length):
    """A span at a random sample touches one token more, whose largest value is larger."""
    rng = np.random.default_rng(1)
    events = []
    for name in noise.recordings:
        starts = 10 * rng.choice(150, 8, replace=False)
        events += [LabelledEvent(name, start, start + length, (0,)) for start in starts.tolist()]
    spans = gather(noise, draw_spans(noise, events, seed=0))
    assert (spans.lengths[spans.is_event] == spans.lengths[~spans.is_event]).all()
    scores = span_maxima(true_autoencoder(np.eye(8)), spans)
    assert auc(scores, spans.is_event).mean() == pytest.approx(0.5, abs=0.03)


def test_spans_without_an_event_share_no_token_with_one(noise):
    """Events of 1 sample every 20 samples, of which tokens have 10."""
    rng = np.random.default_rng(2)
    events = []
    for name in noise.recordings:
        starts = rng.choice(1600, 80, replace=False).tolist()
        events += [LabelledEvent(name, start, start + 1, (0,)) for start in starts]
    is_touched = event_share(noise, events) > 0
    spans = draw_spans(noise, events, seed=0)
    assert len(spans) == 2 * len(events)
    for span in spans:
        sequences, tokens = tokens_of(noise, span)
        assert is_touched[sequences, tokens].all() == span.is_event


def test_spans_without_an_event_are_drawn_from_all_free_places(noise):
    """A place is free if its tokens are not those of an event, and its offset is the event's."""
    name = noise.recordings[0]
    event = LabelledEvent(name, 23, 38, (0,))
    wall = LabelledEvent(name, 100, 1500, (0,))
    # Tokens have 10 samples, of which the events take 20 to 40 and 100 to 1,500.
    is_taken = np.zeros(1601, bool)
    is_taken[20:40] = True
    is_taken[100:1500] = True
    starts = range(3, 1600 - 14, 10)
    expected = {start for start in starts if not is_taken[start : start + 15].any()}
    drawn = set()
    for seed in range(300):
        spans = draw_spans(noise, [event, wall], seed)
        drawn.add(spans[1].start)
    assert drawn == expected


@pytest.mark.parametrize("missing", ["windows", "channels"])
def test_spans_of_a_pair_touch_equally_many_tokens_if_some_are_missing(missing, tmp_path):
    """Some windows, or channels of windows, are not in the store, as if they had artefacts."""
    rng = np.random.default_rng(6)
    places = make_places(6, 30)
    is_there = places.window % 3 > 0
    if missing == "channels":
        is_there = rng.random(len(places.window)) < 0.7
    arrays = (places.recording[is_there], places.window[is_there], places.channel[is_there])
    places = Places(places.recordings, *arrays)
    dataset = write_planted(tmp_path, np.ones((is_there.sum(), 4, 2)), places)
    events = []
    for name in dataset.recordings:
        for start in rng.choice(1100, 12, replace=False).tolist():
            channels = ((0,), (1,), (0, 1))[start % 3]
            events.append(LabelledEvent(name, start, start + 45, channels))
    spans = gather(dataset, draw_spans(dataset, events, seed=0))
    assert len(spans.lengths) > 50
    np.testing.assert_array_equal(spans.lengths[spans.is_event], spans.lengths[~spans.is_event])


def test_some_of_many_events_are_drawn(noise):
    rng = np.random.default_rng(4)
    events = []
    for name in noise.recordings:
        starts = rng.choice(1600, 20, replace=False).tolist()
        events += [LabelledEvent(name, start, start + 1, (0,)) for start in starts]
    assert draw_spans(noise, events, 0, len(events)) == draw_spans(noise, events, 0)
    spans = draw_spans(noise, events, 0, max_events=300)
    assert [span.is_event for span in spans] == [True, False] * 300
    assert len({span.recording for span in spans}) == len(noise.recordings)
    is_touched = event_share(noise, events) > 0
    for span in spans:
        sequences, tokens = tokens_of(noise, span)
        assert is_touched[sequences, tokens].all() == span.is_event


def test_events_without_a_free_place_are_left_out(noise):
    name, other = noise.recordings[:2]
    whole = LabelledEvent(name, 0, 40 * SEQ_LEN, (0,))
    part = LabelledEvent(other, 100, 150, (0,))
    spans = draw_spans(noise, [whole, part], seed=0)
    assert [span.recording for span in spans] == [1, 1]
    assert [span.is_event for span in spans] == [True, False]


def test_maxima_of_groups_of_spans():
    rng = np.random.default_rng(3)
    lengths = (1200, 1, 1000, 17, 3000, 2)
    activations = [rng.normal(size=(n, 4)).astype(np.float32) for n in lengths]
    groups = [group.tolist() for group in span_groups(activations)]
    assert groups == [[0, 1], [2, 3], [4], [5]]
    for group in groups:
        x = np.concatenate([activations[i] for i in group])
        of_group = np.array([lengths[i] for i in group])
        expected = np.array([activations[i].max(0) for i in group])
        np.testing.assert_array_equal(max_over_spans(x, of_group), expected)
        np.testing.assert_array_equal(max_over_spans(x[:, :1], of_group), expected[:, :1])


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


def test_events_of_other_recordings_alone_are_an_error(tmp_path):
    """As of names without their ending, which would leave out all events."""
    header = "recording,event,start,stop,channels"
    (tmp_path / "events.csv").write_text(f"{header}\na_s001,spike,1,2,O1\n")
    (tmp_path / "a_s001.npy").touch()
    with pytest.raises(UserError, match=r"named like a_s001\.npy, got a_s001$"):
        read_events(tmp_path)
    (tmp_path / "events.csv").write_text(f"{header}\na_s001.npy,spike,1,2,O1\nb,spike,1,2,O1\n")
    assert len(read_events(tmp_path)["spike"]) == 2


def test_unknown_channels_of_events_are_named(tmp_path):
    header = "recording,event,start,stop,channels"
    (tmp_path / "events.csv").write_text(f"{header}\na.npy,spike,1,2,O1 XX\n")
    with pytest.raises(UserError, match=r"line 2: .*unknown channel XX"):
        read_events(tmp_path)


def test_events_csv_without_a_column_is_an_error(tmp_path):
    (tmp_path / "events.csv").write_text("recording,event,begin,stop,channels\n")
    with pytest.raises(UserError, match=r"events.csv has no column start; it requires recording,"):
        read_events(tmp_path)


@pytest.mark.parametrize(
    "row", ["a.npy,alpha,5,5,CZ", "a.npy,alpha,x,9,CZ", "a.npy,alpha,1,9,NOSE", "a.npy,alpha,1"]
)
def test_invalid_events_csv_is_an_error(tmp_path, row):
    header = "recording,event,start,stop,channels"
    (tmp_path / "events.csv").write_text(f"{header}\nb.npy,alpha,1,9,CZ\n{row}\n")
    with pytest.raises(UserError, match=r"events.csv, line 3: expected recording"):
        read_events(tmp_path)


@pytest.mark.parametrize("last", COLUMNS)
def test_row_without_its_last_cell_is_an_error(tmp_path, last):
    """Whichever column is the last one."""
    cells = {"recording": "a.npy", "event": "alpha", "start": "1", "stop": "9", "channels": "CZ"}
    columns = [name for name in COLUMNS if name != last]
    row = ",".join(cells[name] for name in columns)
    header = ",".join([*columns, last])
    (tmp_path / "events.csv").write_text(f"{header}\n{row},{cells[last]}\n{row}\n")
    with pytest.raises(UserError, match=r"events.csv, line 3: .*\(the row is too short\)"):
        read_events(tmp_path)


def test_sampled_spans_are_of_all_recordings_and_of_both_sorts():
    spans = [Span(i // 40, i, i + 5, (0,), is_event=i % 2 == 0) for i in range(400)]
    sampled = sample(spans, 100, seed=0)
    assert len(sampled) == 100
    assert sampled == [span for span in spans if span in sampled]
    assert {span.recording for span in sampled} == set(range(10))
    assert 35 < sum(span.is_event for span in sampled) < 65
    assert sample(spans, 1000, seed=0) == spans
