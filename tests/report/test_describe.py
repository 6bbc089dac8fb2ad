"""Feature cards: examples cut from the EEG, counts, neighbours and waveform."""

from dataclasses import replace

import numpy as np
import pytest

from minsae_jax.eeg.montage import CHANNELS
from minsae_jax.eeg.recordings import load_recording
from minsae_jax.report.describe import describe, make_context
from minsae_jax.report.examples import collect
from minsae_jax.report.excerpts import to_int8
from minsae_jax.report.naming import Label


@pytest.fixture(scope="module")
def context(trained):
    dataset = trained.dataset("test")
    sae = trained.sae()
    activity = collect(dataset, sae)
    labels = {3: Label("mine", "a note")}
    return make_context(dataset, sae, activity, trained.encoder, w=2, labels=labels)


@pytest.fixture(scope="module")
def feature(context):
    return int(np.argmax(context.activity.active))


def test_examples_are_cut_from_the_recordings(trained, context, feature):
    card = describe(context, feature)
    groups = [example.group for example in card.examples]
    assert groups.count("top") > 3
    assert {f"q{i}" for i in range(1, 11)} <= set(groups)
    assert groups.count("random") == 6
    n_clipped = 0
    for example in card.examples:
        eeg = np.asarray(load_recording(trained.recordings / example.recording))
        start = round(example.start * 100)
        trace = eeg[start : start + len(example.trace), CHANNELS.index(example.channel)]
        np.testing.assert_allclose(example.trace / 10, np.clip(trace, -12.7, 12.7), atol=0.051)
        assert start // 1000 == (start + len(trace) - 1) // 1000  # inside one window
        assert len(example.strip) * 100 == len(trace)
        if example.patch:
            at = round(example.patch[0] - example.start)
            assert example.strip[at] == pytest.approx(example.activation, rel=1e-3)
            second = round(example.patch[0])
            nearby = range(second - 2, second + 3)
            in_window = [s for s in nearby if s // 10 == start // 1000 and s >= 0]
            assert len(trace) == 100 * len(in_window)
            n_clipped += len(trace) < 500
        if example.others is not None:
            assert example.others.shape == (19, -(-len(trace) // 2))
    assert n_clipped


def test_shares_and_counts(context, feature):
    card = describe(context, feature)
    assert card.density == pytest.approx(context.activity.density[feature])
    assert sum(card.histogram.counts) == context.activity.active[feature]
    assert len(card.histogram.edges) == len(card.histogram.counts) + 1
    shares = [share for _, share in card.patient_list]
    assert sum(shares) == pytest.approx(1)
    assert card.patient_share == shares[0] == max(shares)
    assert card.position.sum() + card.cls == pytest.approx(1)
    assert describe(context, 3).label == "mine"
    assert describe(context, 3).note == "a note"


def test_spectrum_has_a_bootstrap_interval(context, feature):
    spectrum = describe(context, feature).spectrum
    assert (spectrum.low <= spectrum.high).all()
    is_inside = (spectrum.low < spectrum.ratio) & (spectrum.ratio < spectrum.high)
    assert is_inside.mean() > 0.9


def test_waveform_is_a_decoder_row_through_the_head(context, feature):
    kernel = np.asarray(context.encoder.params["head"]["linears"][0]["kernel"])
    expected = np.asarray(context.sae.params["W_dec"][feature]) @ kernel
    np.testing.assert_allclose(describe(context, feature).waveform, expected, rtol=1e-5)


def test_nearest_feature_has_the_largest_cosine(context, feature):
    rows = np.asarray(context.sae.params["W_dec"])
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    nearest, cosine = describe(context, feature).nearest[0]
    others = np.delete(rows @ rows[feature], feature)
    assert cosine == pytest.approx(others.max(), rel=1e-5)
    assert rows[nearest] @ rows[feature] == pytest.approx(cosine, rel=1e-5)


def test_dead_feature_has_no_name(context):
    active = context.activity.active.copy()
    active[7] = 0
    dead = replace(context, activity=replace(context.activity, active=active))
    card = describe(dead, 7)
    assert (card.density, card.suggestion, card.channel) == (0, "", "")


def test_traces_are_clipped_multiples_of_a_tenth():
    steps = to_int8(np.array([0.0, 0.14, -1.26, 99, -99]))
    np.testing.assert_array_equal(steps, [0, 1, -13, 127, -127])
