"""Feature cards: examples cut from the EEG, counts, neighbours and waveform."""

import csv
from dataclasses import replace

import numpy as np
import pytest

from minsae_jax.eeg.montage import CHANNELS, POSITIONS
from minsae_jax.eeg.recordings import load_recording
from minsae_jax.report import naming
from minsae_jax.report.context import Context
from minsae_jax.report.describe import describe, describe_all
from minsae_jax.report.examples import collect
from minsae_jax.report.excerpts import to_int8
from minsae_jax.report.naming import Label, fits_region


@pytest.fixture(scope="module")
def context(trained):
    dataset = trained.dataset("test")
    sae = trained.sae()
    activity = collect(dataset, sae)
    labels = {3: Label("mine", "a note")}
    return Context(dataset, sae, activity, trained.encoder, w=2, labels=labels)


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
        window = round(example.strip_start * 100) // 1000
        if example.patch:
            # Two patches of a second to either side, moved only at the recording's ends.
            assert len(trace) == 500
            second = round(example.patch[0])
            assert start == min(max(0, 100 * (second - 2)), len(eeg) - 500)
            at = round(example.patch[0] - example.strip_start)
            assert example.strip[at] == pytest.approx(example.activation, rel=1e-3)
            nearby = range(second - 2, second + 3)
            in_window = [s for s in nearby if s // 10 == window and s >= 0]
            assert len(example.strip) == len(in_window)
            n_clipped += len(in_window) < 5
        else:
            assert start == 1000 * window
            assert len(trace) == 1000
        if example.others is not None:
            assert example.others.shape == (19, -(-len(trace) // 2))
    assert n_clipped


def test_more_eeg_than_the_patches(trained, context, feature):
    more = Context(context.dataset, context.sae, context.activity, None, w=2, context_seconds=12.0)
    short = describe(context, feature).examples
    for example, before in zip(describe(more, feature).examples, short, strict=True):
        assert len(example.trace) == 1200
        np.testing.assert_array_equal(example.strip, before.strip)
        assert example.start <= before.start


def test_top_examples_are_those_of_the_activity(context):
    """So that the page and `load_features` agree; each is of another sequence."""
    top = context.activity.top
    for card in describe_all(context):
        is_example = top.token[card.id] >= 0
        shown = [example for example in card.examples if example.group == "top"]
        activations = [example.activation for example in shown]
        assert activations == top.activation[card.id, is_example].tolist()
        assert len(set(top.sequence[card.id, is_example])) == len(shown)
        if shown:
            assert shown[0].activation == card.max


def test_events_and_other_features_of_an_example(trained, context, feature):
    with (trained.recordings / "events.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    dataset = context.dataset
    n_events = 0
    examples = describe(context, feature).examples
    for example, token in zip(examples, context.examples_of(feature), strict=True):
        stop = example.start + len(example.trace) / 100
        expected = [
            (row["event"], int(row["start"]) / 100, int(row["stop"]) / 100, row["channels"].split())
            for row in rows
            if row["recording"] == example.recording
            and int(row["start"]) / 100 < stop
            and int(row["stop"]) / 100 > example.start
        ]
        found = [(e.kind, e.start, e.stop, e.channels) for e in example.events]
        assert sorted(found) == sorted(expected)
        n_events += len(found)
        x = dataset.read(token.sequence, token.sequence + 1)[0, token.token]
        f = np.asarray(context.sae.encode(x)).copy()
        f[feature] = 0
        order = np.argsort(-f, kind="stable")[:5]
        others = [int(i) for i in order if f[i] > 0]
        assert [other for other, _ in example.other_features] == others
        np.testing.assert_allclose([a for _, a in example.other_features], f[others], rtol=1e-5)
    assert n_events > 3


def test_coactive_features_match_all_tokens(context, feature):
    dataset = context.dataset
    x = dataset.read(0, len(dataset.recording))
    is_active = np.asarray(context.sae.encode(x)).reshape(-1, context.sae.d_sae) > 0
    both = (is_active & is_active[:, [feature]]).sum(0)
    jaccard = both / (is_active | is_active[:, [feature]]).sum(0)
    jaccard[feature] = -1
    order = np.argsort(-jaccard, kind="stable")[:8]
    coactive = describe(context, feature).coactive
    assert [other for other, _ in coactive] == order.tolist()
    np.testing.assert_allclose([share for _, share in coactive], jaccard[order])


def test_support_is_the_share_of_examples_that_fit_the_name(context, monkeypatch):
    # The few tokens here name regions by chance only, which is enough.
    monkeypatch.setattr(naming, "MIN_SD", 0)
    n_named = 0
    for card in describe_all(context):
        named_band = card.band not in ("", "broadband")
        place = card.suggestion.split(",")[0].removesuffix(card.band).strip()
        if not card.density or (place in ("", "widespread") and not named_band):
            assert np.isnan(card.support)
            continue
        assert 0 <= card.support <= 1
        n_named += 1
        if not named_band:
            random = context.activity.random
            channel = context.dataset.channel[random.sequence[card.id, random.token[card.id] >= 0]]
            in_region = fits_region(place, channel, POSITIONS)
            assert card.support == pytest.approx(in_region.mean())
    assert n_named > 5


def test_artefact_shares_of_the_top_examples(context):
    for card in describe_all(context, range(0, 64, 8)):
        top = [example for example in card.examples if example.group == "top"]
        for hint, share in card.artefacts_top.items():
            assert share == np.mean([hint in example.hints for example in top])
        assert card.artefact_top == max(card.artefacts_top.values(), default=0)


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
    changed = {}
    for name in ("active", "by_recording", "by_channel"):
        changed[name] = getattr(context.activity, name).copy()
        changed[name][7] = 0
    dead = replace(context, activity=replace(context.activity, **changed))
    card = describe(dead, 7)
    assert (card.density, card.suggestion, card.channel) == (0, "", "")


def test_traces_are_clipped_multiples_of_a_tenth():
    steps = to_int8(np.array([0.0, 0.14, -1.26, 99, -99]))
    np.testing.assert_array_equal(steps, [0, 1, -13, 127, -127])
