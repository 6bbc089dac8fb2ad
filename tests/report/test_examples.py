"""The pass over a store, compared with a search through all tokens at once."""

import gc
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from minsae_jax.report import examples, selection
from minsae_jax.report.entries import EDGES, active_entries
from minsae_jax.report.examples import collect
from minsae_jax.sae.member import SparseAutoencoder


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
    ("top", "per_recording", "n_samples", "batch", "merge"),
    [
        (5, 2, 0, 40, 1),
        (12, 100, 0, 1000, 500),
        (12, 100, 1500, 1000, 500),
        (12, 2, 1500, 1000, 500),
        (3, 1, 1500, 16_384, 1 << 17),
    ],
)
def test_top_examples_match_a_brute_force_search(
    everything, monkeypatch, tmp_path, top, per_recording, n_samples, batch, merge
):
    dataset, sae, f, sequence, token = everything
    # Two recordings, so that each has many windows.
    places = np.stack([dataset.recording, dataset.window])
    window = np.unique(places, axis=1, return_inverse=True)[1].astype(np.int32)
    recording = (2 * window > window.max()).astype(np.int32)
    n_available = 1000 * int(window.max() + 1) + 300
    for name in dataset.recordings[:2]:
        np.save(tmp_path / name, np.zeros((n_available, 19), np.float16))
    dataset = replace(dataset, recording=recording, window=window, folder=tmp_path)
    monkeypatch.setattr(examples, "BATCH_TOKENS", batch)
    monkeypatch.setattr(selection, "MERGE", merge)
    strongest = collect(dataset, sae, top, per_recording, n_samples=n_samples).top
    n_several = 0
    n_near = 0

    def shown_samples(i: int) -> range:
        """The samples of the recording that the example would show, which has 11 tokens of 1 s."""
        begin = 1000 * int(dataset.window[sequence[i]])
        length = max(n_samples, 1000)  # of a CLS token
        if token[i] > 0:
            begin += 100 * (int(token[i]) - 1) + 50 - n_samples // 2
            length = n_samples
        begin = max(0, min(begin, n_available - length))
        return range(begin, begin + length)

    for feature in range(sae.d_sae):
        expected = []
        of_recording = [[] for _ in dataset.recordings]
        seen = set()
        for i in np.lexsort((np.arange(len(f)), -f[:, feature])):
            recording = dataset.recording[sequence[i]]
            shown = of_recording[recording]
            window = (recording, dataset.window[sequence[i]])
            if f[i, feature] == 0 or window in seen or len(shown) == min(top, per_recording):
                continue
            seen.add(window)
            samples = shown_samples(i)
            if any(samples.start < other.stop and other.start < samples.stop for other in shown):
                n_near += 1
                continue
            shown.append(samples)
            if len(expected) < top:
                expected.append(i)
        n = len(expected)
        np.testing.assert_array_equal(strongest.sequence[feature, :n], sequence[expected])
        np.testing.assert_array_equal(strongest.token[feature, :n], token[expected])
        np.testing.assert_array_equal(strongest.activation[feature, :n], f[expected, feature])
        assert (strongest.token[feature, n:] == -1).all()
        n_several += n > 1
    assert n_several > 20
    assert (n_near > 0) == (n_samples > 0 and per_recording > 1)


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
    # The store is smaller than the sample.
    np.testing.assert_array_equal(activity.together.toarray(), together)


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
    tokens = activity.quantiles()
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


def test_batches_do_not_change_the_result(everything, monkeypatch):
    """Neither the examples nor the random sample depend on how the store is cut."""
    dataset, sae, *_ = everything
    expected = collect(dataset, sae)
    monkeypatch.setattr(examples, "BATCH_TOKENS", 50)
    small = collect(dataset, sae)
    for name in ("top", "random"):
        for field in ("sequence", "token", "activation"):
            np.testing.assert_array_equal(
                getattr(getattr(small, name), field), getattr(getattr(expected, name), field)
            )
    np.testing.assert_array_equal(small.histogram, expected.histogram)


def test_pairs_of_dense_features_are_counted_on_fewer_tokens(everything, monkeypatch):
    dataset, sae, f, _, _ = everything
    pairs = int((np.count_nonzero(f, axis=1) ** 2).sum())
    monkeypatch.setattr(examples, "COACTIVE_PAIRS", pairs // 3)
    together = collect(dataset, sae).together.toarray()
    step = -(-pairs // (pairs // 3))
    is_active = (f[::step] > 0).astype(int)
    np.testing.assert_array_equal(together, is_active.T @ is_active)


@pytest.mark.parametrize("share", [1, 11, 22])
def test_pairs_are_counted_on_tokens_of_all_positions(everything, monkeypatch, share):
    """Also if a whole number of sequences, which have 11 tokens, is from one to the next."""
    dataset, sae, f, _, token = everything
    monkeypatch.setattr(examples, "COACTIVE_TOKENS", len(f) // share)
    together = collect(dataset, sae).together.toarray()
    step = share if share == 1 else share + 1
    assert len(set(token[::step].tolist())) == dataset.n_tokens == 11
    is_active = (f[::step] > 0).astype(int)
    np.testing.assert_array_equal(together, is_active.T @ is_active)


def test_edges_of_the_histogram_belong_to_the_bin_above():
    """Activations at an edge, and next to it on both sides, as float32 numbers."""
    edges = EDGES.astype(np.float32)
    values = np.concatenate([np.nextafter(edges, np.float32(0)), edges, np.nextafter(edges, 1e9)])
    sae = SparseAutoencoder(
        {
            "W_enc": np.zeros((2, len(values))),
            "b_enc": values,
            "W_dec": np.zeros((len(values), 2)),
            "b_dec": np.zeros(2),
        }
    )
    entries = active_entries(sae, np.zeros((1, 1, 2), np.float32), sequences=1)
    np.testing.assert_array_equal(entries.value, values)
    expected = np.searchsorted(EDGES, values.astype(np.float64), "right") - 1
    np.testing.assert_array_equal(entries.histogram_bin, np.clip(expected, 0, len(EDGES) - 2))


def traced_peak(dataset, sae) -> int:
    """Return the largest memory during `collect` that Python and NumPy have allocated, in bytes."""
    gc.collect()
    tracemalloc.start()
    try:
        collect(dataset, sae)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_store(everything, monkeypatch):
    dataset, sae, *_ = everything
    monkeypatch.setattr(examples, "BATCH_TOKENS", 60)
    monkeypatch.setattr(examples, "COACTIVE_TOKENS", 100)
    monkeypatch.setattr(selection, "MERGE", 100)
    collect(dataset, sae)  # compiles
    peaks = []
    for n in (len(dataset.recording) // 4, len(dataset.recording)):
        first = replace(
            dataset,
            recording=dataset.recording[:n],
            window=dataset.window[:n],
            channel=dataset.channel[:n],
        )
        # The smaller of two: other threads and cyclic garbage can add to one.
        peaks.append(min(traced_peak(first, sae) for _ in range(2)))
    assert peaks[1] < 1.15 * peaks[0]


def test_batches_of_many_features_are_small():
    params = {
        "W_enc": np.zeros((1, 131_072)),
        "b_enc": np.zeros(131_072),
        "W_dec": np.zeros((131_072, 1)),
        "b_dec": np.zeros(1),
    }
    assert 4 * 131_072 * examples.batch_tokens(SparseAutoencoder(params)) <= 128 << 20
