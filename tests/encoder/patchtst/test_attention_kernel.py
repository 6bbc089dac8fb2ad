"""The attention kernel, interpreted on the CPU, against NumPy in float64 and plain torch."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minsae_jax.encoder.patchtst import attention
from minsae_jax.encoder.patchtst.attention_kernel import attend_in_kernel, is_chosen
from tests.encoder.patchtst.test_model import TOLERANCE, VARIANTS, make_variant
from tests.random_encoder import BASE


def attend_in_numpy(queries, keys, values, n_heads):
    """Return the attention of all heads, one after the other."""
    result = np.empty(values.shape)
    for start in range(0, values.shape[2], values.shape[2] // n_heads):
        head = slice(start, start + values.shape[2] // n_heads)
        pairs = zip(queries, keys, strict=True)
        scores = sum(q[:, :, head] @ k[:, :, head].swapaxes(1, 2) for q, k in pairs)
        weights = np.exp(scores - scores.max(2, keepdims=True))
        weights /= weights.sum(2, keepdims=True)
        result[:, :, head] = weights @ values[:, :, head]
    return result


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.float16, 5e-3), (jnp.bfloat16, 4e-2)]
)
@pytest.mark.parametrize(
    ("n_layers", "n_tokens", "d_head"), [(1, 16, 16), (3, 101, 8), (2, 9, 4), (1, 5, 24)]
)
def test_kernel_equals_numpy(n_layers, n_tokens, d_head, dtype, tolerance):
    rng = np.random.default_rng(0)
    shape = (2, n_tokens, 3 * d_head)
    arrays = [jnp.asarray(rng.normal(size=shape), dtype) for _ in range(2 * n_layers + 1)]
    queries, keys, values = arrays[:n_layers], arrays[n_layers:-1], arrays[-1]
    got = attend_in_kernel(queries, keys, values, 3, interpret=True)
    assert got.dtype == dtype
    exact = [np.asarray(a, np.float64) for a in arrays]
    expected = attend_in_numpy(exact[:n_layers], exact[n_layers:-1], exact[-1], 3)
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", ["base", "plain_attention"])
def test_encoder_with_the_kernel_equals_plain_torch(as_on_gpu, monkeypatch, name):
    n_layers = []

    def attend(queries, keys, values, n_heads):
        n_layers.append(len(queries))
        return attend_in_kernel(queries, keys, values, n_heads, interpret=True)

    monkeypatch.setenv("MINSAE_ATTENTION", "triton")
    monkeypatch.setattr(attention, "attend_in_kernel", attend)
    encoder, x, hidden, _ = make_variant(replace(BASE, **VARIANTS[name]))
    np.testing.assert_allclose(encoder.activations(x), hidden[-1], atol=TOLERANCE, rtol=0)
    assert n_layers == ([1, 1, 1] if name == "plain_attention" else [1, 2, 3])


def test_kernel_is_used_on_request_only(as_on_gpu, monkeypatch):
    fits = partial(is_chosen, n_sequences=2, n_tokens=101, d_head=8)
    assert not fits()
    monkeypatch.setenv("MINSAE_ATTENTION", "triton")
    assert fits()
    assert not fits(n_tokens=129)
    assert not fits(d_head=65)
    # As in loss recovered, which vmaps the model over single sequences.
    assert not fits(n_sequences=1)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert not fits()
