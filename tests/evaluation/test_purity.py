"""Pure features on planted events, where tokens are alike in bursts over channels and time."""

import numpy as np
import pytest

from minsae_jax.evaluation.events import LabelledEvent, event_share
from minsae_jax.evaluation.purity import ShiftedTokens, pure_features
from minsae_jax.evaluation.token_pass import TOP, FeatureTokens
from tests.evaluation.planted import SEQ_LEN, TOKENS, make_places, write_planted

CHANNELS = 2
N_WINDOWS = 200
BURST = 8  # windows


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Three recordings of two patients."""
    places = make_places(2, N_WINDOWS)
    x = np.zeros((len(places.recording), TOKENS, 4))
    return write_planted(tmp_path_factory.mktemp("purity"), x, places)


def draw_events(dataset, rng, rate):
    """Return bursts on both channels, which take up a share of the recordings."""
    events = []
    for name in dataset.recordings:
        bursts = np.flatnonzero(rng.random(N_WINDOWS // BURST) < rate)
        starts = (bursts * BURST * SEQ_LEN).tolist()
        events += [LabelledEvent(name, i, i + BURST * SEQ_LEN, (0, 1)) for i in starts]
    return events


def make_features(sequences):
    """Return features whose strongest tokens are the first of some sequences."""
    value = np.zeros((len(sequences), TOP), np.float32)
    sequence = np.zeros((len(sequences), TOP), np.int32)
    for i, of_feature in enumerate(sequences):
        value[i, : len(of_feature)] = 1
        sequence[i, : len(of_feature)] = of_feature
    nothing = np.zeros(len(sequences))
    token = np.zeros_like(sequence)
    return FeatureTokens(nothing, nothing, nothing, value, sequence, token, value[None])


def judge(dataset, events, features):
    touched = event_share(dataset, events) > 0
    return pure_features(
        dataset, events, features, features.precision(touched), float(touched.mean())
    )


def test_bursts_that_meet_events_by_chance_are_not_pure(dataset):
    """One or two bursts of 16 sequences; if tokens were independent, all in events were pure."""
    rng = np.random.default_rng(0)
    events = draw_events(dataset, rng, 0.3)
    n_bursts = len(dataset.recording) // (BURST * CHANNELS)
    bursts = [rng.choice(n_bursts, rng.integers(1, 3), replace=False) for _ in range(600)]
    within = np.arange(BURST * CHANNELS)
    features = make_features([(b[:, None] * len(within) + within).ravel() for b in bursts])
    precision = features.precision(event_share(dataset, events) > 0)
    assert (precision == 1).sum() > 60
    assert judge(dataset, events, features).sum() <= 2


@pytest.mark.parametrize("n_examples", [15, 16, 50])
def test_features_of_events_are_pure(dataset, n_examples):
    rng = np.random.default_rng(1)
    events = draw_events(dataset, rng, 0.2)
    inside = np.flatnonzero((event_share(dataset, events) > 0)[:, 0])
    outside = np.setdiff1d(np.arange(len(dataset.recording)), inside)
    of_events = rng.choice(inside, n_examples, replace=False)
    half = np.append(of_events[::2], rng.choice(outside, n_examples // 2, replace=False))
    anywhere = rng.choice(len(dataset.recording), n_examples, replace=False)
    features = make_features([of_events, half, anywhere, []])
    expected = [n_examples >= 16, False, False, False]
    assert judge(dataset, events, features).tolist() == expected


def test_features_of_a_recording_full_of_events_are_not_pure(dataset):
    """Its tokens touch events wherever they are, though few tokens of all recordings do."""
    name = dataset.recordings[2]
    last = N_WINDOWS * SEQ_LEN
    events = [LabelledEvent(name, 0, last - 5, (0, 1))]
    start, stop = dataset.sequences_of(2)
    features = make_features([np.linspace(start, stop - 1, TOP).astype(int)])
    assert not judge(dataset, events, features)[0]


def test_shifted_tokens_are_counted_around_the_end_of_the_recording(dataset):
    rng = np.random.default_rng(2)
    n_samples = N_WINDOWS * SEQ_LEN
    events = []
    for name in dataset.recordings:
        for start in rng.choice(n_samples, 40, replace=False).tolist():
            channels = ((0,), (1,), (0, 1))[start % 3]
            # The last events end after the windows.
            events.append(LabelledEvent(name, start, start + int(rng.integers(1, 90)), channels))
    is_event = np.zeros((len(dataset.recordings), CHANNELS, n_samples), bool)
    for event in events:
        recording = dataset.recordings.index(event.recording)
        is_event[recording, list(event.channels), event.start : event.stop] = True
    sequence = rng.choice(len(dataset.recording), 30, replace=False)
    token = rng.integers(0, TOKENS, 30)
    shifted = ShiftedTokens(dataset, events)
    counts = shifted.count_inside(sequence, token)
    for i in range(0, len(counts), 20):
        n_inside = 0
        for s, t in zip(sequence, token, strict=True):
            recording = int(dataset.recording[s])
            first = dataset.window[s] * SEQ_LEN + t * 10 + shifted.shifts_of(recording)[i]
            samples = (first + np.arange(10)) % n_samples
            n_inside += is_event[recording, dataset.channel[s], samples].any()
        assert counts[i] == n_inside
