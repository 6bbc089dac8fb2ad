"""The pass over a store, compared with a search through all tokens at once."""

from dataclasses import replace

import numpy as np
import pytest

from minsae_jax.report import examples
from minsae_jax.report.examples import EDGES, collect


@pytest.fixture(scope="module")
def everything(trained):
    """Features of all test tokens [tokens, d_sae], and the place of each token."""
    dataset = trained.dataset("test")
    sae = trained.sae()
    x = dataset.read(0, len(dataset.recording))
    f = np.asarray(sae.encode(x)).reshape(-1, sae.d_sae)
    sequence, token = np.divmod(np.arange(len(f)), dataset.n_tokens)
    return dataset, sae, f, sequence, token


@pytest.mark.parametrize(
    ("top", "per_recording", "batch"), [(5, 2, 40), (12, 100, 1000), (3, 1, 16_384)]
)
def test_top_examples_match_a_brute_force_search(
    everything, monkeypatch, top, per_recording, batch
):
    dataset, sae, f, sequence, token = everything
    monkeypatch.setattr(examples, "BATCH_TOKENS", batch)
    strongest = collect(dataset, sae, top, per_recording).top
    n_several = 0
    for feature in range(sae.d_sae):
        expected = []
        used = np.zeros(len(dataset.recordings), int)
        for i in np.lexsort((np.arange(len(f)), -f[:, feature])):
            recording = dataset.recording[sequence[i]]
            if f[i, feature] > 0 and used[recording] < per_recording and len(expected) < top:
                used[recording] += 1
                expected.append(i)
        n = len(expected)
        np.testing.assert_array_equal(strongest.sequence[feature, :n], sequence[expected])
        np.testing.assert_array_equal(strongest.token[feature, :n], token[expected])
        np.testing.assert_array_equal(strongest.activation[feature, :n], f[expected, feature])
        assert (strongest.token[feature, n:] == -1).all()
        n_several += n > 1
    assert n_several > 20


def test_counts_match_all_tokens(everything):
    dataset, sae, f, sequence, token = everything
    activity = collect(dataset, sae)
    assert activity.n_tokens == len(f)
    np.testing.assert_array_equal(activity.active, (f > 0).sum(0))
    np.testing.assert_array_equal(activity.largest, f.max(0))
    np.testing.assert_allclose(activity.total, f.sum(0), rtol=1e-5)
    np.testing.assert_array_equal(
        activity.by_token, np.stack([(f[token == t] > 0).sum(0) for t in range(11)], axis=1)
    )
    channel, recording = dataset.channel[sequence], dataset.recording[sequence]
    by_channel = np.stack([f[channel == c].sum(0) for c in range(19)], axis=1)
    np.testing.assert_allclose(activity.by_channel, by_channel, rtol=1e-4)
    by_recording = np.stack(
        [(f[recording == r] > 0).sum(0) for r in range(len(dataset.recordings))], axis=1
    )
    np.testing.assert_array_equal(activity.by_recording, by_recording)
    np.testing.assert_array_equal(
        activity.channel_tokens, [(channel == c).sum() for c in range(19)]
    )
    for feature in range(0, sae.d_sae, 7):
        values = f[f[:, feature] > 0, feature]
        np.testing.assert_array_equal(
            activity.histogram[feature],
            np.histogram(np.clip(values, EDGES[0], EDGES[-1]), EDGES)[0],
        )
    together = (f > 0).astype(float).T @ (f > 0)
    np.testing.assert_array_equal(
        activity.together, together
    )  # the store is smaller than the sample


def test_random_examples_are_a_uniform_sample_of_active_tokens(everything):
    dataset, sae, f, _, _ = everything
    feature = int(np.argmax((f > 0).sum(0)))
    samples = [collect(dataset, sae, random=40, seed=seed).random for seed in range(8)]
    places = np.concatenate(
        [s.sequence[feature] * dataset.n_tokens + s.token[feature] for s in samples]
    )
    for sample in samples:
        position = sample.sequence[feature] * dataset.n_tokens + sample.token[feature]
        assert len(set(position.tolist())) == 40
        np.testing.assert_array_equal(sample.activation[feature], f[position, feature])
        assert (sample.activation[feature] > 0).all()
    active = np.flatnonzero(f[:, feature])
    standard_error = active.std() / np.sqrt(len(places))
    assert abs(places.mean() - active.mean()) < 4 * standard_error


def test_quantiles_are_one_example_from_each_part(everything):
    dataset, sae, f, _, _ = everything
    activity = collect(dataset, sae, random=60)
    tokens = activity.quantiles(10)
    for feature in range(sae.d_sae):
        n = int((activity.random.token[feature] >= 0).sum())
        if n < 10:
            assert (tokens.token[feature] == -1).all()
            continue
        ordered = np.sort(activity.random.activation[feature, :n])
        assert (np.diff(tokens.activation[feature]) >= 0).all()
        for i, activation in enumerate(tokens.activation[feature]):
            assert (
                ordered[int(i * n / 10)] <= activation <= ordered[min(n - 1, int((i + 1) * n / 10))]
            )
        position = tokens.sequence[feature] * dataset.n_tokens + tokens.token[feature]
        np.testing.assert_array_equal(f[position, feature], tokens.activation[feature])


def test_shifted_recordings_are_left_out_of_channels(everything):
    dataset, sae, f, sequence, _ = everything
    shifted = np.zeros(len(dataset.recordings), bool)
    shifted[0] = True
    activity = collect(replace(dataset, shifted=shifted), sae)
    others = dataset.recording[sequence] != 0
    assert activity.channel_tokens.sum() == others.sum()
    np.testing.assert_allclose(activity.by_channel.sum(1), f[others].sum(0), rtol=1e-4)
    np.testing.assert_array_equal(activity.active, (f > 0).sum(0))
