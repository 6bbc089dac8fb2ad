"""Activations around examples, compared with those of all tokens of the store."""

import numpy as np
import pytest

from minsae_jax.report import activations, examples
from minsae_jax.report.activations import measure_examples, stretch_of
from minsae_jax.sae.member import SparseAutoencoder

D_SAE = 40


def make_sae(kind, d_model, d_sae):
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(d_sae, d_model))
    params = {
        "W_enc": directions.T,
        "b_enc": np.zeros(d_sae),
        "W_dec": directions,
        "b_dec": np.zeros(d_model),
    }
    own = {"relu": {}, "topk": {"k": 4.0}, "jumprelu": {"threshold": np.ones(d_sae)}}
    return SparseAutoencoder(params | own[kind], {"kind": kind})


def draw_examples(dataset, d_sae, count):
    """Return tokens for each feature, CLS tokens and duplicates among them."""
    rng = np.random.default_rng(1)
    feature = np.repeat(np.arange(d_sae), count)
    sequence = rng.integers(0, len(dataset.recording), len(feature))
    token = rng.integers(0, dataset.n_tokens, len(feature))
    sequence[1::5] = sequence[0]
    token[2::7] = 0
    return feature, sequence, token


@pytest.mark.parametrize(
    ("kind", "tokens", "n_examples"),
    [
        ("topk", 8192, 65_536),
        ("topk", 40, 65_536),
        ("topk", 300, 17),
        ("topk", 3, 5),
        ("relu", 300, 17),
        ("jumprelu", 40, 65_536),
    ],
)
def test_activations_match_those_of_all_tokens(trained, monkeypatch, kind, tokens, n_examples):
    """In one batch, several, with few examples each, and with fewer tokens than a sequence has."""
    dataset = trained.dataset("test")
    sae = make_sae(kind, dataset.store.d_model, D_SAE)
    monkeypatch.setattr(examples, "BATCH_TOKENS", tokens)
    monkeypatch.setattr(activations, "BATCH_TOKENS", tokens)
    monkeypatch.setattr(activations, "MAX_EXAMPLES", n_examples)
    monkeypatch.setattr(activations, "CHUNK", min(n_examples, 256))
    feature, sequence, token = draw_examples(dataset, D_SAE, 9)
    f = np.asarray(sae.encode(dataset.read(0, len(dataset.recording))))
    measured = list(measure_examples(dataset, sae, 2, feature, sequence, token))
    assert len(measured) == D_SAE
    around = [values for one in measured for values in one.around]
    others = [pairs for one in measured for pairs in one.others]
    n_active = 0
    for i in range(len(feature)):
        shown = stretch_of(dataset.tokens, int(token[i]), 2).tokens
        expected = f[sequence[i], shown, feature[i]]
        np.testing.assert_allclose(around[i], expected, rtol=1e-5, atol=1e-5)
        n_active += (expected > 0).sum()
        at_token = f[sequence[i], token[i]].copy()
        at_token[feature[i]] = 0
        order = [j for j in np.argsort(-at_token, kind="stable")[:5] if at_token[j] > 0]
        assert [other for other, _ in others[i]] == order
        np.testing.assert_allclose([value for _, value in others[i]], at_token[order], rtol=1e-5)
    assert n_active > 100


def test_fewer_features_than_are_listed(trained):
    dataset = trained.dataset("test")
    sae = make_sae("topk", dataset.store.d_model, 3)
    (one,) = measure_examples(dataset, sae, 2, np.zeros(1, int), np.zeros(1, int), np.ones(1, int))
    at_token = np.asarray(sae.encode(dataset.read(0, 1)))[0, 1]
    assert [other for other, _ in one.others[0]] == [
        j for j in np.argsort(-at_token) if j != 0 and at_token[j] > 0
    ]


def test_each_token_is_encoded_once(trained, monkeypatch):
    """Where features depend on each other, however many examples show a token."""
    dataset = trained.dataset("test")
    sae = make_sae("topk", dataset.store.d_model, D_SAE)
    encoded = []

    def encode_padded(sae, tokens, n_rows):
        encoded.append(len(np.unique(tokens, axis=0)))
        return original(sae, tokens, n_rows)

    original = activations.encode_padded
    monkeypatch.setattr(activations, "encode_padded", encode_padded)
    feature, sequence, token = draw_examples(dataset, D_SAE, 200)
    list(measure_examples(dataset, sae, 2, feature, sequence, token))
    assert sum(encoded) <= len(dataset.recording) * dataset.n_tokens < 2 * len(feature)
