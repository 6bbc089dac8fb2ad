"""Gradients written by hand against autodiff of the plain loss, and statistics against their definitions."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minsae_jax.sae import member as model
from minsae_jax.sae.objective import Objective, Sums, batch_sums, finish, plain_loss, with_bfloat16

D, F, TOKENS = 12, 40, 60
OBJECTIVES = {
    "april2024": Objective(mean_over_d_model=False),
    "minsae": Objective(True, recon_weight=3.0),
}


@pytest.fixture
def params():
    params = model.init_torch(jax.random.key(0), D, F)
    return params | {
        "W_dec": params["W_dec"] * jnp.linspace(0.1, 3, F)[:, None]
    }  # rows of unlike norms


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(1), (TOKENS, D))


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("pieces", [1, 3])
def test_gradients_are_those_of_the_plain_loss(params, x, name, pieces):
    objective, lam = OBJECTIVES[name], jnp.float32(0.7)
    loss, expected = jax.value_and_grad(plain_loss)(params, x, lam, objective)
    sums = batch_sums(params, x.reshape(pieces, -1, D), None, lam, objective)
    gradients, statistics = finish(params, sums, TOKENS, lam, objective)
    assert float(statistics.loss) == pytest.approx(float(loss), rel=1e-5)
    for key in expected:
        scale = np.abs(expected[key]).max()
        np.testing.assert_allclose(gradients[key], expected[key], atol=1e-5 * scale, rtol=0)
        assert scale > 1e-3


def test_padding_counts_for_nothing(params, x):
    objective, lam = OBJECTIVES["april2024"], jnp.float32(0.7)
    whole = finish(
        params, batch_sums(params, x[None], None, lam, objective), TOKENS, lam, objective
    )
    padded = jnp.concatenate([x, jnp.zeros((20, D))]).reshape(4, 20, D)
    mask = (jnp.arange(80) < TOKENS).astype(jnp.float32).reshape(4, 20)
    masked = finish(
        params, batch_sums(params, padded, mask, lam, objective), TOKENS, lam, objective
    )
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(masked), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    unmasked = finish(
        params, batch_sums(params, padded, None, lam, objective), TOKENS, lam, objective
    )
    assert (
        abs(float(unmasked[1].l0 - whole[1].l0)) > 0.1
    )  # the mask is needed: biases make padding active


@pytest.mark.parametrize("name", OBJECTIVES)
def test_statistics_follow_their_definitions(params, x, name):
    objective, lam = OBJECTIVES[name], jnp.float32(0.7)
    _, s = finish(params, batch_sums(params, x[None], None, lam, objective), TOKENS, lam, objective)
    w = {k: np.asarray(v, np.float64) for k, v in params.items()}
    features = np.maximum(np.asarray(x, np.float64) @ w["W_enc"] + w["b_enc"], 0)
    error = features @ w["W_dec"] + w["b_dec"] - np.asarray(x, np.float64)
    mse = (error**2).sum(1).mean() / (D if name == "minsae" else 1)
    l1 = (features * np.linalg.norm(w["W_dec"], axis=1)).sum(1).mean()
    assert float(s.mse) == pytest.approx(mse, rel=1e-5)
    assert float(s.l1) == pytest.approx(l1, rel=1e-5)
    assert float(s.loss) == pytest.approx(objective.recon_weight * mse + 0.7 * l1, rel=1e-5)
    assert float(s.l0) == pytest.approx((features > 0).sum(1).mean(), rel=1e-6)
    assert float(s.residual) == pytest.approx((error**2).sum(), rel=1e-5)
    np.testing.assert_array_equal(s.active, (features > 0).sum(0))


def test_l0_of_many_tokens_and_features():
    """More activations in a batch than an int32 counts."""
    params = {"W_dec": jnp.ones((1, 1)), "b_dec": jnp.zeros(1)}
    active = jnp.full(4, 2**30, jnp.int32)
    sums = Sums({"W_dec": jnp.zeros((1, 1))}, jnp.zeros(()), jnp.zeros(1), active)
    _, statistics = finish(params, sums, 2**30, jnp.float32(1), OBJECTIVES["april2024"])
    assert float(statistics.l0) == 4


def test_a_decoder_row_of_zeros_has_a_finite_gradient(params, x):
    params = params | {"W_dec": params["W_dec"].at[3].set(0)}
    objective, lam = OBJECTIVES["april2024"], jnp.float32(0.7)
    gradients, _ = finish(
        params, batch_sums(params, x[None], None, lam, objective), TOKENS, lam, objective
    )
    assert all(np.isfinite(g).all() for g in gradients.values())


@pytest.mark.parametrize("factors", ["bfloat16", "rounded"])
def test_bfloat16_products(factors):
    """The plain loss's gradients to bfloat16's 8 bits, of sizes that every XLA has products for."""
    params = model.init_torch(jax.random.key(0), 128, 256)
    x, lam = jax.random.normal(jax.random.key(1), (512, 128)), jnp.float32(0.7)
    objective = Objective(mean_over_d_model=False)
    expected = jax.grad(plain_loss)(params, x, lam, objective)
    low = replace(objective, factors=factors)
    gradients, _ = finish(
        params, batch_sums(params, x.reshape(2, -1, 128), None, lam, low), 512, lam, objective
    )
    for key in expected:
        assert gradients[key].dtype == jnp.float32
        assert (
            1e-4
            < np.linalg.norm(gradients[key] - expected[key]) / np.linalg.norm(expected[key])
            < 0.03
        )


def test_products_that_xla_lacks_are_of_rounded_numbers(monkeypatch):
    objective = OBJECTIVES["april2024"]
    assert with_bfloat16(objective, 128, 256, 2, 256).factors == "bfloat16"

    def lacking(*_):
        raise jax.errors.JaxRuntimeError(
            "Unsupported element type for DotThunk::Execute: BF16 x BF16 = F32"
        )

    monkeypatch.setattr("minsae_jax.sae.objective.batch_sums", lacking)
    assert with_bfloat16(objective, 128, 256, 2, 256).factors == "rounded"
