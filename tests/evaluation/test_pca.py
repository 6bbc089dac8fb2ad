"""Principal components as an autoencoder, against NumPy in float64."""

import numpy as np
import pytest

from minsae_jax.evaluation.loss_recovered import substitution_errors
from minsae_jax.evaluation.pca import fit_pca, pca_autoencoder, raw_autoencoder


@pytest.fixture
def tokens():
    """Tokens far from 0 whose principal directions are not the axes."""
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(12, 12)) * 2.0 ** -np.arange(12)
    return (rng.normal(size=(500, 12)) @ mixing.T + 5).astype(np.float32)


def reconstruct(train, x, k):
    """Keep the k largest magnitudes among the coordinates along the right singular vectors."""
    train = train.astype(np.float64)
    x = x.astype(np.float64)
    mean = train.mean(0)
    _, _, directions = np.linalg.svd(train - mean, full_matrices=False)
    coordinates = (x - mean) @ directions.T
    for row in coordinates:
        row[np.argsort(np.abs(row))[: len(row) - k]] = 0
    return coordinates @ directions + mean


@pytest.mark.parametrize("k", [1, 5, 12])
def test_keeps_the_largest_components_of_each_token(tokens, k):
    train, test = tokens[:400], tokens[400:]
    pca = fit_pca([train[:130], train[130:131], train[131:]])
    sae = pca_autoencoder(pca, k)
    assert ((np.asarray(sae.encode(test)) > 0).sum(1) == k).all()
    np.testing.assert_allclose(sae(test), reconstruct(train, test, k), atol=1e-4)


def test_directions_are_sorted_by_variance(tokens):
    pca = fit_pca([tokens])
    variances = ((tokens - pca.mean) @ pca.directions).var(0)
    assert (np.diff(variances) < 0).all()


def test_all_components_lose_nothing(trained):
    dataset = trained.dataset("test")
    x = dataset.read(0, 200).reshape(-1, 128)
    sae = pca_autoencoder(fit_pca([x]), 128)
    (errors,) = substitution_errors(trained.encoder, dataset, 2, [sae], x.mean(0), 4, 0.3)
    assert errors.by_window[3].mean() == pytest.approx(errors.untouched, rel=1e-4)


def test_raw_dimensions_lose_nothing(tokens):
    mean = tokens.mean(0)
    sae = raw_autoencoder(mean)
    features = np.asarray(sae.encode(tokens))
    centred = tokens - mean
    np.testing.assert_allclose(features[:, :12], np.maximum(centred, 0), atol=1e-5)
    np.testing.assert_allclose(features[:, 12:], np.maximum(-centred, 0), atol=1e-5)
    np.testing.assert_allclose(sae(tokens), tokens, atol=1e-5)
