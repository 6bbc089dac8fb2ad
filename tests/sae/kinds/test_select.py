"""The k-th largest number by counting, against sorting."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minsae_jax import UserError
from minsae_jax.sae.kinds.select import keep_largest, kth_largest_of_batch
from minsae_jax.sae.member import SparseAutoencoder

pytestmark = pytest.mark.usefixtures("backend")


@cache
def compiled(platform):
    """Compile once for each platform that the `backend` fixture names."""
    assert jax.default_backend() == platform

    def on_one_device(tile, k, guess):
        return kth_largest_of_batch(tile[None], k, guess)

    return jax.jit(jax.vmap(on_one_device, in_axes=(0, None, None), axis_name="data"))


def select_of_batch(pre, k, guess=0.0):
    """Select on as many devices as `pre` has tiles."""
    select = compiled(jax.default_backend())
    thresholds = select(jnp.asarray(pre), jnp.int32(k), jnp.float32(guess))
    assert len(set(thresholds.tolist())) == 1
    return pre >= float(thresholds[0])


def numbers(case, shape, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape)
    cases = {
        "normal": x,
        "tiny": 1e-30 * x,
        "wide": np.exp(20 * x),
        "rare": np.where(rng.random(shape) < 0.02, x, -1),
    }
    return cases[case].astype(np.float32)


@pytest.mark.parametrize("case", ["normal", "tiny", "wide", "rare"])
@pytest.mark.parametrize("guess", [0.0, 1.0, 1e30])
def test_batch_selection_is_that_of_sorting(case, guess):
    pre = numbers(case, (3, 50, 7))
    ranked = np.sort(pre.ravel())[::-1]
    n_positive = int((pre > 0).sum())
    for k in (1, 2, 17, 300):
        selected = select_of_batch(pre, k, guess)
        n_expected = min(k, n_positive)
        assert selected.sum() == n_expected
        np.testing.assert_array_equal(np.sort(pre[selected])[::-1], ranked[:n_expected])


def test_equal_numbers_are_selected_together():
    pre = np.float32([3, 2, 2, 2, 1, 0, -1]).reshape(1, 7, 1)
    assert select_of_batch(pre, 2).sum() == 4
    assert select_of_batch(pre, 4).sum() == 4
    assert select_of_batch(pre, 5).sum() == 5


def test_more_numbers_than_int32_counts_are_refused():
    def select(tile):
        return kth_largest_of_batch(tile[None], jnp.int32(1), jnp.float32(0))

    # Eight devices with 2²⁸ numbers each; nothing is allocated.
    pre = jax.ShapeDtypeStruct((8, 2**14, 2**14), jnp.float32)
    with pytest.raises(UserError, match=r"2,147,483,648 pre-activations .* reduce --batch_size"):
        jax.eval_shape(jax.vmap(select, axis_name="data"), pre)


@pytest.mark.parametrize("case", ["normal", "tiny", "wide", "rare"])
@pytest.mark.parametrize("k", [1, 5, 40])
def test_the_k_largest_of_every_token_are_kept(case, k):
    features = np.maximum(numbers(case, (40, 30)), 0)
    result = np.asarray(keep_largest(jnp.asarray(features), jnp.float32(k)))
    expected = np.zeros_like(features)
    for token, column in enumerate(features.T):
        largest = np.argsort(-column)[:k]
        expected[largest, token] = column[largest]
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("d_sae", [2**15, 40_000])
def test_counts_of_many_features_are_exact(d_sae):
    """On accelerators two counts of up to 2¹⁵ features share an integer; here all are equal."""
    equal = np.ones((d_sae, 2), np.float32)
    equal[:5, 1] = 2
    result = np.asarray(keep_largest(jnp.asarray(equal), jnp.float32(5)))
    assert (result[:, 0] == 1).all()
    assert (result[:, 1] > 0).sum() == 5


def test_members_select_with_their_own_k():
    features = np.maximum(numbers("normal", (40, 30)), 0)
    ks = jnp.float32([1, 3, 8])
    results = jax.vmap(lambda k: keep_largest(jnp.asarray(features), k))(ks)
    for k, result in zip((1, 3, 8), results, strict=True):
        assert ((result > 0).sum(0) == np.minimum(k, (features > 0).sum(0))).all()


@pytest.mark.parametrize("d_sae", [5000, 16_384])
def test_topk_of_many_features_encodes_the_k_largest(d_sae):
    """Many features are encoded in tiles of fewer tokens, which do not divide the batch here."""
    rng = np.random.default_rng(0)
    params = {
        "W_enc": rng.normal(size=(8, d_sae)),
        "b_enc": rng.normal(size=d_sae),
        "W_dec": np.zeros((d_sae, 8)),
        "b_dec": np.zeros(8),
        "k": 5.0,
    }
    x = rng.normal(size=(300, 8))
    features = np.asarray(SparseAutoencoder(params, {"kind": "topk"}).encode(x))
    pre = x @ params["W_enc"] + params["b_enc"]
    largest = np.argsort(-pre, axis=1)[:, :5]
    expected = np.zeros_like(pre)
    np.put_along_axis(expected, largest, np.take_along_axis(pre, largest, axis=1), axis=1)
    np.testing.assert_allclose(features, expected, rtol=1e-5, atol=1e-5)
