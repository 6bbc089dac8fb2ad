"""The pass over a store against a search through all tokens at once."""

from dataclasses import replace

import numpy as np
import pytest

from minsae_jax.report import examples
from minsae_jax.report.examples import EDGES, collect


@pytest.fixture(scope="module")
def everything(trained):
    """All features of all tokens of the test split [tokens, d_sae], and where each token is from."""
    dataset, sae = trained.dataset("test"), trained.sae()
    x = dataset.read(0, len(dataset.recording))
    f = np.asarray(sae.encode(x)).reshape(-1, sae.d_sae)
    sequence, token = np.divmod(np.arange(len(f)), dataset.n_tokens)
    return dataset, sae, f, sequence, token


@pytest.mark.parametrize(
    ("top", "per_recording", "batch"), [(5, 2, 40), (12, 100, 1000), (3, 1, 16_384)]
)
def test_the_strongest_tokens_are_those_of_a_brute_force_search(
    everything, monkeypatch, top, per_recording, batch
):
    dataset, sae, f, sequence, token = everything
    monkeypatch.setattr(examples, "BATCH_TOKENS", batch)
    found = collect(dataset, sae, top, per_recording).top
    several = 0
    for feature in range(sae.d_sae):
        kept, used = [], np.zeros(len(dataset.recordings), int)
        for i in np.lexsort((np.arange(len(f)), -f[:, feature])):
            recording = dataset.recording[sequence[i]]
            if f[i, feature] > 0 and used[recording] < per_recording and len(kept) < top:
                used[recording] += 1
                kept.append(i)
        n = len(kept)
        np.testing.assert_array_equal(found.sequence[feature, :n], sequence[kept])
        np.testing.assert_array_equal(found.token[feature, :n], token[kept])
        np.testing.assert_array_equal(found.activation[feature, :n], f[kept, feature])
        assert (found.token[feature, n:] == -1).all()
        several += n > 1
    assert several > 20


def test_counts(everything):
    dataset, sae, f, sequence, token = everything
    found = collect(dataset, sae)
    assert found.n_tokens == len(f)
    np.testing.assert_array_equal(found.active, (f > 0).sum(0))
    np.testing.assert_array_equal(found.largest, f.max(0))
    np.testing.assert_allclose(found.total, f.sum(0), rtol=1e-5)
    np.testing.assert_array_equal(
        found.by_token, np.stack([(f[token == t] > 0).sum(0) for t in range(11)], axis=1)
    )
    channel, recording = dataset.channel[sequence], dataset.recording[sequence]
    by_channel = np.stack([f[channel == c].sum(0) for c in range(19)], axis=1)
    np.testing.assert_allclose(found.by_channel, by_channel, rtol=1e-4)
    by_recording = np.stack(
        [(f[recording == r] > 0).sum(0) for r in range(len(dataset.recordings))], axis=1
    )
    np.testing.assert_array_equal(found.by_recording, by_recording)
    np.testing.assert_array_equal(found.channel_tokens, [(channel == c).sum() for c in range(19)])
    for feature in range(0, sae.d_sae, 7):
        values = f[f[:, feature] > 0, feature]
        np.testing.assert_array_equal(
            found.histogram[feature], np.histogram(np.clip(values, EDGES[0], EDGES[-1]), EDGES)[0]
        )
    together = (f > 0).astype(float).T @ (f > 0)
    np.testing.assert_array_equal(found.together, together)  # the store is smaller than the sample


def test_random_tokens_are_active_ones_from_everywhere(everything):
    dataset, sae, f, _, _ = everything
    feature = int(np.argmax((f > 0).sum(0)))
    found = [collect(dataset, sae, random=40, seed=seed).random for seed in range(8)]
    places = np.concatenate(
        [s.sequence[feature] * dataset.n_tokens + s.token[feature] for s in found]
    )
    for sample in found:
        position = sample.sequence[feature] * dataset.n_tokens + sample.token[feature]
        assert len(set(position.tolist())) == 40
        np.testing.assert_array_equal(sample.activation[feature], f[position, feature])
        assert (sample.activation[feature] > 0).all()
    active = np.flatnonzero(f[:, feature])
    expected = active.mean(), active.std() / np.sqrt(len(places))
    assert abs(places.mean() - expected[0]) < 4 * expected[1]


def test_quantiles(everything):
    dataset, sae, f, _, _ = everything
    found = collect(dataset, sae, random=60)
    tokens = found.quantiles(10)
    for feature in range(sae.d_sae):
        n = int((found.random.token[feature] >= 0).sum())
        if n < 10:
            assert (tokens.token[feature] == -1).all()
            continue
        ordered = np.sort(found.random.activation[feature, :n])
        assert (np.diff(tokens.activation[feature]) >= 0).all()
        for i, activation in enumerate(tokens.activation[feature]):
            assert (
                ordered[int(i * n / 10)] <= activation <= ordered[min(n - 1, int((i + 1) * n / 10))]
            )
        position = tokens.sequence[feature] * dataset.n_tokens + tokens.token[feature]
        np.testing.assert_array_equal(f[position, feature], tokens.activation[feature])


def test_recordings_with_shifted_columns_count_for_no_channel(everything):
    dataset, sae, f, sequence, _ = everything
    shifted = np.zeros(len(dataset.recordings), bool)
    shifted[0] = True
    found = collect(replace(dataset, shifted=shifted), sae)
    others = dataset.recording[sequence] != 0
    assert found.channel_tokens.sum() == others.sum()
    np.testing.assert_allclose(found.by_channel.sum(1), f[others].sum(0), rtol=1e-4)
    np.testing.assert_array_equal(found.active, (f > 0).sum(0))
