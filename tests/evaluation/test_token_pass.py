"""One pass over the store, against all activations at once."""

import numpy as np
import pytest

from minsae_jax.evaluation import token_pass
from minsae_jax.evaluation.bootstrap import draw_patients
from minsae_jax.evaluation.token_pass import TOP, FeatureTokens, read_features, token_auc


@pytest.fixture(scope="module", params=[2**23, 200_000, 1])
def read(request, trained):
    """Features of two members, in large batches, in small ones and sequence by sequence."""
    original = token_pass.CPU_BATCH_VALUES
    token_pass.CPU_BATCH_VALUES = request.param
    saes = {name: trained.sae(name) for name in ("lambda=0.1", "lambda=1")}
    dataset = trained.dataset("test")
    all_recordings = np.ones(len(dataset.recordings), bool)
    yield read_features(dataset, saes, {"lambda=0.1": [5], "lambda=1": [3, 0]}, all_recordings)
    token_pass.CPU_BATCH_VALUES = original


def test_moments_and_chosen_features(trained, read):
    dataset = trained.dataset("test")
    x = dataset.read(0, len(dataset.recording))
    for name, chosen in (("lambda=0.1", [5]), ("lambda=1", [3, 0])):
        sae = trained.sae(name)
        f = np.asarray(sae.encode(x), np.float64)
        scaled = f * np.linalg.norm(sae.params["W_dec"], axis=1)
        is_active = f > 0
        n = is_active.sum((0, 1))
        np.testing.assert_allclose(read[name].active, n, atol=1)
        # Features that are active on few tokens are left out: one more token would change them.
        often = n > 500
        mean = scaled.sum((0, 1))[often] / n[often]
        mean_square = np.square(scaled).sum((0, 1))[often] / n[often]
        np.testing.assert_allclose(read[name].mean[often], mean, rtol=5e-3)
        np.testing.assert_allclose(read[name].mean_square[often], mean_square, rtol=5e-3)
        expected = np.moveaxis(f[:, dataset.tokens.located][..., chosen], -1, 0)
        np.testing.assert_allclose(read[name].chosen, expected, atol=1e-4)


def test_strongest_tokens_are_the_largest_of_each_sequence(trained, read):
    dataset = trained.dataset("test")
    x = dataset.read(0, len(dataset.recording))[:, dataset.tokens.located]
    f = np.asarray(trained.sae().encode(x))
    strongest = -np.sort(-f.max(axis=1), axis=0)[:TOP].T
    features = read["lambda=1"]
    # The values were rounded down by less than 2**-10.
    np.testing.assert_allclose(features.value, strongest, rtol=2**-10, atol=1e-6)
    for feature in np.flatnonzero(features.examples == TOP)[:20]:
        sequence = features.sequence[feature]
        assert len(set(sequence)) == TOP
        at_token = f[sequence, features.token[feature], feature]
        np.testing.assert_allclose(at_token, strongest[feature], rtol=2**-10)


def test_recordings_without_labels_have_no_strongest_tokens(trained, read):
    dataset = trained.dataset("test")
    is_labelled = np.arange(len(dataset.recordings)) != 1
    sequences = np.flatnonzero(is_labelled[dataset.recording])
    assert 0 < len(sequences) < len(dataset.recording)
    sae = trained.sae()
    part = read_features(dataset, {"sae": sae}, {"sae": [3, 0]}, is_labelled)["sae"]
    np.testing.assert_array_equal(part.active, read["lambda=1"].active)
    np.testing.assert_array_equal(part.chosen, read["lambda=1"].chosen[:, sequences])
    x = dataset.read(0, len(dataset.recording))[:, dataset.tokens.located]
    f = np.asarray(sae.encode(x))[sequences]
    strongest = -np.sort(-f.max(axis=1), axis=0)[:TOP].T
    np.testing.assert_allclose(part.value, strongest, rtol=2**-10, atol=1e-6)
    assert np.isin(part.sequence[part.value > 0], sequences).all()


def test_precision_counts_the_tokens_inside():
    value = np.zeros((3, 4), np.float32)
    value[0] = [4, 3, 2, 1]
    value[1, :2] = [5, 4]
    sequence = np.array([[0, 1, 2, 3], [3, 2, 0, 0], [0, 0, 0, 0]])
    token = np.array([[0, 1, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]])
    nothing = np.zeros(3)
    features = FeatureTokens(nothing, nothing, nothing, value, sequence, token, value[None])
    is_inside = np.zeros((4, 2), bool)
    is_inside[[0, 1, 3], [0, 1, 1]] = True
    assert features.examples.tolist() == [4, 2, 0]
    np.testing.assert_array_equal(features.precision(is_inside), [0.75, 0, np.nan])
    recording = np.array([0, 0, 1, 1])
    resamples = draw_patients(["a_s001", "b_s001"], seed=0).with_original()
    # Both examples of recording 0 are inside and one of those of recording 1: the precision is 0.5,
    # 0.75 and 1 with a probability of 1/4, 1/2 and 1/4. Two patients say nothing.
    assert features.precision_of(0, is_inside, recording, resamples) == (0.75, (0.0, 1.0))
    assert features.precision_of(1, is_inside, recording, resamples) == (0.0, None)
    value, interval = features.precision_of(2, is_inside, recording, resamples)
    assert np.isnan(value)
    assert interval is None


def test_auc_over_tokens_counts_pairs():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(6, 5)).astype(np.float32)
    covered = rng.random((6, 5)) < 0.3
    higher = values[covered][:, None] > values[~covered]
    nowhere = np.zeros_like(covered)
    assert token_auc(values, covered) == pytest.approx(higher.mean())
    assert np.isnan(token_auc(values, nowhere))
    assert np.isnan(token_auc(values, ~nowhere))
