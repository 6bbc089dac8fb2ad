"""Every kind's gradients against autodiff of the loss as it is defined, written out here."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minsae_jax.sae.kinds import KINDS, Batch, BatchContext, Objective, SAEKind
from minsae_jax.sae.kinds.relu import ReLUSums
from minsae_jax.sae.precision import with_bfloat16

pytestmark = pytest.mark.usefixtures("backend")

D, F, TOKENS = 12, 40, 60
OBJECTIVES = {
    "april2024": Objective(mean_over_d_model=False),
    "minsae": Objective(mean_over_d_model=True, recon_weight=3.0),
}
RELU = KINDS["relu"]
HYPER = {"lambda_sparsity": jnp.float32(0.7)}
NO_CONTEXT = BatchContext(is_dead=jnp.zeros(F, bool), n_dead=jnp.int32(0))


def relu_loss(params, x, objective):
    """The definition: recon_weight * mse + λ * mean over tokens of Σ_i f_i ‖W_dec,i‖."""
    features = jax.nn.relu(x @ params["W_enc"] + params["b_enc"][None])
    error = features @ params["W_dec"] + params["b_dec"][None] - x
    mse = jnp.square(error).sum(1).mean()
    if objective.mean_over_d_model:
        mse = mse / x.shape[1]
    l1 = (features @ jnp.linalg.norm(params["W_dec"], axis=1)).mean()
    return objective.recon_weight * mse + 0.7 * l1


def gradients_of(kind, params, tiles, mask, objective, n_tokens=TOKENS):
    sums = kind.batch_sums(params, Batch(tiles, mask), HYPER, objective, NO_CONTEXT)
    return kind.gradients(params, sums, n_tokens, HYPER, objective)


class AutodiffReLU(type(RELU)):
    """The same kind with the default gradient."""

    batch_sums = SAEKind.batch_sums
    gradients = SAEKind.gradients


@pytest.fixture
def params():
    params = RELU.init_torch(jax.random.key(0), D, F)
    unequal_norms = jnp.linspace(0.1, 3, F)[:, None]
    return params | {"W_dec": params["W_dec"] * unequal_norms}


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(1), (TOKENS, D))


@pytest.mark.parametrize("kind", [RELU, AutodiffReLU()], ids=["by hand", "default"])
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("n_tiles", [1, 3])
def test_gradients_equal_autodiff_of_the_definition(params, x, kind, name, n_tiles):
    objective = OBJECTIVES[name]
    loss, expected = jax.value_and_grad(relu_loss)(params, x, objective)
    tiles = x.reshape(n_tiles, -1, D)
    gradients, metrics = gradients_of(kind, params, tiles, None, objective)
    assert float(metrics.loss) == pytest.approx(float(loss), rel=1e-5)
    for key in expected:
        scale = np.abs(expected[key]).max()
        np.testing.assert_allclose(gradients[key], expected[key], atol=1e-5 * scale, rtol=0)
        assert scale > 1e-3


@pytest.mark.parametrize("kind", [RELU, AutodiffReLU()], ids=["by hand", "default"])
def test_padding_is_ignored(params, x, kind):
    objective = OBJECTIVES["april2024"]
    whole = gradients_of(kind, params, x[None], None, objective)
    padded = jnp.concatenate([x, jnp.zeros((20, D))]).reshape(4, 20, D)
    mask = (jnp.arange(80) < TOKENS).astype(jnp.float32).reshape(4, 20)
    masked = gradients_of(kind, params, padded, mask, objective)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(masked), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    # Biases make padding active, so without the mask it counts.
    unmasked = gradients_of(kind, params, padded, None, objective)
    assert abs(float(unmasked[1].l0 - whole[1].l0)) > 0.1


@pytest.mark.parametrize("name", OBJECTIVES)
def test_metrics_follow_their_definitions(params, x, name):
    objective = OBJECTIVES[name]
    _, metrics = gradients_of(RELU, params, x[None], None, objective)
    w = {k: np.asarray(v, np.float64) for k, v in params.items()}
    features = np.maximum(np.asarray(x, np.float64) @ w["W_enc"] + w["b_enc"], 0)
    error = features @ w["W_dec"] + w["b_dec"] - np.asarray(x, np.float64)
    mse = (error**2).sum(1).mean() / (D if name == "minsae" else 1)
    l1 = (features * np.linalg.norm(w["W_dec"], axis=1)).sum(1).mean()
    assert float(metrics.mse) == pytest.approx(mse, rel=1e-5)
    assert float(metrics.l1) == pytest.approx(l1, rel=1e-5)
    assert float(metrics.loss) == pytest.approx(objective.recon_weight * mse + 0.7 * l1, rel=1e-5)
    assert float(metrics.l0) == pytest.approx((features > 0).sum(1).mean(), rel=1e-6)
    assert float(metrics.residual) == pytest.approx((error**2).sum(), rel=1e-5)
    np.testing.assert_array_equal(metrics.active, (features > 0).sum(0))


def test_l0_does_not_overflow_int32():
    """A batch may have more activations than an int32 counts."""
    params = {"W_dec": jnp.ones((1, 1)), "b_dec": jnp.zeros(1)}
    active = jnp.full(4, 2**30, jnp.int32)
    sums = ReLUSums({"W_dec": jnp.zeros((1, 1))}, jnp.zeros(()), jnp.zeros(1), active)
    _, metrics = RELU.gradients(params, sums, 2**30, HYPER, OBJECTIVES["april2024"])
    assert float(metrics.l0) == 4


def test_zero_decoder_row_has_a_finite_gradient(params, x):
    params = params | {"W_dec": params["W_dec"].at[3].set(0)}
    gradients, _ = gradients_of(RELU, params, x[None], None, OBJECTIVES["april2024"])
    assert all(np.isfinite(g).all() for g in gradients.values())


@pytest.mark.parametrize(
    ("factors", "backend"), [("bfloat16", "cpu"), ("rounded", "cpu"), ("bfloat16", "gpu")]
)
def test_bfloat16_gradients_have_eight_bits(factors, backend, monkeypatch):
    """Sizes for which every XLA has bfloat16 products."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    params = RELU.init_torch(jax.random.key(0), 128, 256)
    x = jax.random.normal(jax.random.key(1), (512, 128))
    objective = OBJECTIVES["april2024"]
    expected = jax.grad(relu_loss)(params, x, objective)
    low = replace(objective, factors=factors)
    gradients, _ = gradients_of(RELU, params, x.reshape(2, -1, 128), None, low, n_tokens=512)
    for key in expected:
        assert gradients[key].dtype == jnp.float32
        difference = np.linalg.norm(gradients[key] - expected[key])
        assert 1e-4 < difference / np.linalg.norm(expected[key]) < 0.03


def test_products_that_xla_lacks_are_of_rounded_numbers(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    objective = OBJECTIVES["april2024"]
    assert with_bfloat16(objective, 128, 256, (2, 256)).factors == "bfloat16"

    def lacking(*_):
        message = "Unsupported element type for DotThunk::Execute: BF16 x BF16 = F32"
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(type(RELU), "batch_sums", lacking)
    assert with_bfloat16(objective, 128, 256, (2, 256)).factors == "rounded"
