"""Attention as one reduction over keys, against softmax in float64 and matrix products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minsae_jax.encoder.attention import attend
from minsae_jax.encoder.patchtst.reduction import attend_by_reduction, fits_reduction

HEADS = 3
D_HEAD = 8
SEQUENCES = 2


def random_factors(n_layers, n_tokens, scale=1.0):
    """Return queries and keys of each layer, and values: [heads, d_head, N, T], float32."""
    rng = np.random.default_rng(n_layers * n_tokens)
    shape = (2 * n_layers + 1, HEADS, D_HEAD, SEQUENCES, n_tokens)
    *queries_keys, values = rng.normal(size=shape).astype(np.float32)
    queries = [scale * q for q in queries_keys[:n_layers]]
    return queries, queries_keys[n_layers:], values


def softmax_in_float64(queries, keys, values):
    """Return the mean value of every query, [heads, d_head, N, T]."""
    queries, keys = np.array(queries, np.float64), np.array(keys, np.float64)
    scores = np.einsum("lhdnq,lhdnk->hnqk", queries, keys)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hnqk,hdnk->hdnq", weights, values.astype(np.float64))


# 4, 5 and 101 tokens: without padding of the queries, and with 3 queries added.
@pytest.mark.parametrize("n_tokens", [1, 4, 5, 101])
@pytest.mark.parametrize("n_layers", [1, 3])
def test_reduction_equals_softmax_in_float64(n_layers, n_tokens):
    factors = random_factors(n_layers, n_tokens)
    got = jax.jit(attend_by_reduction)(*factors)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, softmax_in_float64(*factors), atol=1e-5, rtol=0)


def test_scores_whose_exponentials_overflow():
    factors = random_factors(3, 101, scale=30.0)
    expected = softmax_in_float64(*factors)
    # Rounding of scores near 1,000 to float32 changes the weights by 1e-4.
    np.testing.assert_allclose(jax.jit(attend_by_reduction)(*factors), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("n_layers", [1, 3])
def test_reduction_equals_attention_by_products(n_layers):
    queries, keys, values = random_factors(n_layers, 101)

    def concatenated(layers):
        """Return [N, heads, T, width]."""
        return np.concatenate(layers, axis=1).transpose(2, 0, 3, 1)

    products = jax.jit(attend)(concatenated(queries), concatenated(keys), concatenated([values]))
    got = jax.jit(attend_by_reduction)(queries, keys, values)
    np.testing.assert_allclose(got, products.transpose(1, 3, 0, 2), atol=1e-5, rtol=0)


DEMO = {"dtype": jnp.float32, "n_sequences": 19, "n_tokens": 101, "d_head": 8, "n_layers": 3}


@pytest.mark.parametrize("change", [{}, {"n_tokens": 255}, {"d_head": 16, "n_layers": 2}])
def test_sizes_that_fit_on_a_gpu(as_on_gpu, change):
    assert fits_reduction(**DEMO | change)


@pytest.mark.parametrize(
    "change",
    [
        {"n_tokens": 256},
        {"d_head": 16},
        {"n_layers": 7},
        {"dtype": jnp.bfloat16},
        {"n_sequences": 1},
    ],
)
def test_sizes_that_do_not_fit_on_a_gpu(as_on_gpu, change):
    assert not fits_reduction(**DEMO | change)


def test_cpu_uses_products():
    assert not fits_reduction(**DEMO)
