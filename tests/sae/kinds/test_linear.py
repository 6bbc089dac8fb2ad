"""Losses and gradients of the kinds between two linear maps.

The losses are written out here in NumPy and float64; gradients are compared with their finite
differences, and with autodiff of `loss` in float32.
"""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minsae_jax.parallel.mesh import DATA
from minsae_jax.sae.kinds import (
    Batch,
    BatchContext,
    BatchTopK,
    JumpReLU,
    Matryoshka,
    Objective,
    auxk,
    jumprelu,
)
from minsae_jax.sae.kinds.topk import TopK

pytestmark = pytest.mark.usefixtures("backend")

D, F, TOKENS = 12, 40, 60
OBJECTIVE = Objective(mean_over_d_model=False)


class TopKByRows(TopK):
    """TopK that takes rows at every size; k_max is more than k."""

    min_ratio = 1


KINDS = {
    "topk": TopK(),
    "topk by rows": TopKByRows(k_max=8),
    "batchtopk": BatchTopK(),
    "matryoshka": Matryoshka(shares=(0.25, 0.5, 1.0)),
    "tanh": JumpReLU(mode="tanh"),
    "step": JumpReLU(mode="step", bandwidth=0.5),
    "target_l0": JumpReLU(mode="target_l0", bandwidth=0.5, dead_weight=0.3),
}
HYPER = {
    "k": jnp.float32(5),
    "lambda_sparsity": jnp.float32(0.7),
    "target_l0": jnp.float32(9),
    "lr": jnp.float32(0),
}


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    """Let AuxK compute from 2 or 10 of the 40 features, as it does where there are many."""
    monkeypatch.setattr(auxk, "LEAST_ROWS", 1)


@pytest.fixture
def x():
    return np.random.default_rng(0).normal(size=(TOKENS, D)).astype(np.float32)


def in_tiles(x):
    return x.reshape(3, -1, D)


def initial_params(kind):
    params = kind.init_tied(jax.random.key(0), D, F, decoder_norm=0.6)
    median = 0.3 * jax.random.normal(jax.random.key(1), (D,))
    params = kind.complete_init(params, median if kind.starts_at_median else None)
    params = kind.with_hyper(params, HYPER)
    if "threshold" in params and params["threshold"].ndim:
        params["threshold"] = jnp.linspace(0.05, 0.4, F)
    if not kind.unit_decoder:
        params["W_dec"] = params["W_dec"] * jnp.linspace(0.5, 2, F)[:, None]
    return params


@cache
def compiled(kind, n_tokens, platform, pre_activation_weight):
    """Compile once for all tests of a kind and shapes.

    platform: what the `backend` fixture names. pre_activation_weight: a constant of the module that
    a test replaces.
    """
    assert jax.default_backend() == platform
    assert pre_activation_weight == jumprelu.PRE_ACTIVATION_WEIGHT

    def on_device(params, tiles, mask, is_dead):
        context = BatchContext(is_dead, is_dead.sum())
        batch = Batch(tiles, mask)
        context = kind.batch_context(params, batch, HYPER, OBJECTIVE, context)
        sums = kind.batch_sums(params, batch, HYPER, OBJECTIVE, context)
        sums = jax.lax.psum(sums, DATA)
        return kind.gradients(params, sums, n_tokens, HYPER, OBJECTIVE)

    return jax.jit(jax.vmap(on_device, in_axes=(None, 0, 0, None), axis_name=DATA))


def gradients_of(kind, params, tiles, mask=None, is_dead=None, n_tokens=TOKENS):
    """Return gradients and metrics on a single device."""
    is_dead = jnp.zeros(F, bool) if is_dead is None else jnp.asarray(is_dead)
    masks = None if mask is None else jnp.asarray(mask)[None]
    run = compiled(kind, n_tokens, jax.default_backend(), jumprelu.PRE_ACTIVATION_WEIGHT)
    result = run(params, jnp.asarray(tiles)[None], masks, is_dead)
    return jax.tree.map(lambda a: a[0], result)


def float64(params):
    return {name: np.asarray(p, np.float64) for name, p in params.items()}


def features_of(kind, p, x):
    """Return the features in training, by sorting."""
    pre = x @ p["W_enc"] + p["b_enc"]
    if isinstance(kind, JumpReLU):
        return np.where(pre > p["threshold"], pre, 0)
    positive = np.maximum(pre, 0)
    if isinstance(kind, BatchTopK):
        kth = np.sort(positive, axis=None)[-5 * len(x)]
    else:
        kth = np.sort(positive, axis=1)[:, -5:-4]
    return np.where(positive >= kth, positive, 0)


def loss_of(kind, p, x, penalty=True):
    f = features_of(kind, p, x)
    ends = (10, 20, 40) if isinstance(kind, Matryoshka) else (F,)
    errors = [((f[:, :e] @ p["W_dec"][:e] + p["b_dec"] - x) ** 2).sum(1).mean() for e in ends]
    loss = np.mean(errors)
    if not isinstance(kind, JumpReLU):
        return loss
    norms = np.linalg.norm(p["W_dec"], axis=1)
    if kind.mode == "tanh":
        below = np.maximum(p["threshold"] - x @ p["W_enc"] - p["b_enc"], 0)
        loss += 0.7 * np.tanh(4 * f * norms).sum(1).mean()
        loss += 3e-6 * (below * norms).sum(1).mean()
    elif kind.mode == "step":
        loss += 0.7 * (f > 0).sum(1).mean()
    else:
        loss += D * ((f > 0).sum(1).mean() / 9 - 1) ** 2
    return loss


@pytest.mark.parametrize("name", KINDS)
def test_loss_and_metrics_follow_their_definition(name, x):
    kind = KINDS[name]
    params = initial_params(kind)
    _, metrics = gradients_of(kind, params, in_tiles(x))
    p = float64(params)
    f = features_of(kind, p, x)
    assert float(metrics.loss) == pytest.approx(loss_of(kind, p, x), rel=1e-5)
    error = f @ p["W_dec"] + p["b_dec"] - x
    assert float(metrics.mse) == pytest.approx((error**2).sum(1).mean(), rel=1e-5)
    assert float(metrics.l0) == pytest.approx((f > 0).sum(1).mean(), rel=1e-6)
    np.testing.assert_array_equal(metrics.active, (f > 0).sum(0))


@pytest.mark.parametrize("name", KINDS)
def test_gradients_equal_finite_differences(name, x):
    """Of the maps; the threshold's gradient is a convention and has a test of its own."""
    kind = KINDS[name]
    if name == "tanh":
        # Its ramp also reaches the pre-activations; narrower than any distance, it does not.
        kind = replace(kind, bandwidth=1e-9)
    params = initial_params(kind)
    gradients, _ = gradients_of(kind, params, in_tiles(x))
    p = float64(params)
    rng = np.random.default_rng(2)
    for key in ("W_enc", "b_enc", "W_dec", "b_dec"):
        direction = rng.normal(size=p[key].shape)
        if key == "W_dec" and kind.unit_decoder:
            direction -= (direction * p[key]).sum(1, keepdims=True) * p[key]
        step = 1e-7 * direction
        above = loss_of(kind, p | {key: p[key] + step}, x)
        below = loss_of(kind, p | {key: p[key] - step}, x)
        expected = (above - below) / 2e-7
        actual = (np.asarray(gradients[key], np.float64) * direction).sum()
        assert actual == pytest.approx(expected, rel=1e-3, abs=1e-3)
        assert abs(expected) > 1e-2


@pytest.mark.parametrize("name", KINDS)
def test_gradients_equal_autodiff_of_the_loss(name, x):
    kind = KINDS[name]
    params = initial_params(kind)
    gradients, _ = gradients_of(kind, params, in_tiles(x))
    context = BatchContext(jnp.zeros(F, bool), jnp.zeros((), bool))
    if isinstance(kind, BatchTopK):
        f = features_of(kind, float64(params), x)
        context = context._replace(threshold=jnp.float32(0.9999 * f[f > 0].min()))

    def mean_loss(params):
        return kind.loss(params, jnp.asarray(x), HYPER, OBJECTIVE, context)[0] / TOKENS

    expected = jax.jit(jax.grad(mean_loss))(params)
    names = {"W_enc", "b_enc", "W_dec", "b_dec", "threshold"} & params.keys()
    if kind.weighs_batch_penalty:
        names -= {"threshold"}
    for key in names:
        wanted = np.asarray(expected[key])
        if key == "W_dec" and kind.unit_decoder:
            w = np.asarray(params["W_dec"])
            wanted = wanted - (wanted * w).sum(1, keepdims=True) * w
        np.testing.assert_allclose(gradients[key], wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["step", "target_l0"])
def test_threshold_gradient_is_that_of_the_ramp(name, x):
    """Rajamanoharan et al. (2024): -θ/ε K for the features, -1/ε K for their number."""
    kind = KINDS[name]
    params = initial_params(kind)
    gradients, _ = gradients_of(kind, params, in_tiles(x))
    p = float64(params)
    pre = x @ p["W_enc"] + p["b_enc"]
    f = features_of(kind, p, x)
    error = f @ p["W_dec"] + p["b_dec"] - x
    on_ramp = np.abs(pre - p["threshold"]) < kind.bandwidth / 2
    feature_gradient = 2 * error @ p["W_dec"].T
    count_gradient = 0.7
    if name == "target_l0":
        count_gradient = 2 * D * ((f > 0).sum(1).mean() / 9 - 1) / 9
    ramp = -on_ramp.astype(float) / kind.bandwidth
    expected = (ramp * (p["threshold"] * feature_gradient + count_gradient)).mean(0)
    np.testing.assert_allclose(gradients["threshold"], expected, rtol=1e-4, atol=1e-5)
    assert np.abs(expected).max() > 1e-2


def test_gradients_of_the_tanh_penalty_have_the_ramp(x, monkeypatch):
    """Anthropic's January 2025 update: the ramp also reaches z. Written out in float64."""
    # Large, since 3e-6 would be lost in the tolerance.
    monkeypatch.setattr(jumprelu, "PRE_ACTIVATION_WEIGHT", 0.3)
    kind = KINDS["tanh"]
    params = initial_params(kind)
    gradients, _ = gradients_of(kind, params, in_tiles(x))
    p = float64(params)
    pre = x @ p["W_enc"] + p["b_enc"]
    f = features_of(kind, p, x)
    norms = np.linalg.norm(p["W_dec"], axis=1)
    error = f @ p["W_dec"] + p["b_dec"] - x
    slope = 0.7 * 4 * (1 - np.tanh(4 * f * norms) ** 2)
    feature_gradient = 2 * error @ p["W_dec"].T + slope * norms
    on_ramp = np.abs(pre - p["threshold"]) < kind.bandwidth / 2
    ramp = on_ramp * feature_gradient * p["threshold"] / kind.bandwidth
    is_below = pre < p["threshold"]
    below = 0.3 * norms * is_below
    pre_gradient = ~is_below * feature_gradient + ramp - below
    norm_gradient = slope * f + 0.3 * is_below * (p["threshold"] - pre)
    direct = 2 * f.T @ error / TOKENS
    expected = {
        "threshold": (below - ramp).mean(0),
        "b_enc": pre_gradient.mean(0),
        "W_enc": x.T @ pre_gradient / TOKENS,
        "W_dec": direct + (norm_gradient.mean(0) / norms)[:, None] * p["W_dec"],
    }
    for name, gradient in expected.items():
        np.testing.assert_allclose(gradients[name], gradient, rtol=1e-4, atol=1e-5)
        assert np.abs(gradient).max() > 1e-2


@pytest.mark.parametrize("name", KINDS)
def test_padding_is_ignored(name, x):
    kind = KINDS[name]
    params = initial_params(kind)
    is_dead = np.arange(F) % 4 == 0
    whole = gradients_of(kind, params, in_tiles(x), is_dead=is_dead)
    padded = np.concatenate([x, np.zeros((20, D), np.float32)]).reshape(4, 20, D)
    mask = (np.arange(80) < TOKENS).astype(np.float32).reshape(4, 20)
    masked = gradients_of(kind, params, padded, mask, is_dead=is_dead)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(masked), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", ["batchtopk", "tanh", "target_l0"])
def test_metrics_and_gradients_do_not_depend_on_the_batch_size(name, x):
    """A batch with every token twice has the same means, AuxK included."""
    kind = KINDS[name]
    params = initial_params(kind)
    is_dead = np.arange(F) % 4 == 0
    gradients, metrics = gradients_of(kind, params, in_tiles(x), is_dead=is_dead)
    twice = np.concatenate([in_tiles(x), in_tiles(x)])
    gradients_2, metrics_2 = gradients_of(kind, params, twice, is_dead=is_dead, n_tokens=2 * TOKENS)
    for metric in ("loss", "mse", "l1", "l0"):
        expected = float(getattr(metrics, metric))
        assert float(getattr(metrics_2, metric)) == pytest.approx(expected, rel=1e-5)
    np.testing.assert_array_equal(metrics_2.active, 2 * metrics.active)
    for key, gradient in gradients.items():
        np.testing.assert_allclose(gradients_2[key], gradient, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("every", [3, 5, 20])
@pytest.mark.parametrize("name", KINDS)
def test_dead_features_learn_from_the_residual(name, every, x):
    """AuxK with a forced dead mask: D/32 Σ‖e - ê‖² / Σ‖e - mean e‖², e not differentiated.

    With a target L0, dead features also rise to their thresholds. 14, 8 and 2 features are dead,
    which are trained from 40, 10 and 2 rows of the weights.
    """
    kind = KINDS[name]
    params = initial_params(kind)
    is_dead = np.arange(F) % every == 0
    without, plain = gradients_of(kind, params, in_tiles(x))
    gradients, metrics = gradients_of(kind, params, in_tiles(x), is_dead=is_dead)
    p = float64(params)
    e = x - features_of(kind, p, x) @ p["W_dec"] - p["b_dec"]
    variance = ((e - e.mean(0)) ** 2).sum()

    def dead_loss(p):
        pre = x @ p["W_enc"] + p["b_enc"]
        positive = np.where(is_dead, np.maximum(pre, 0), 0)
        kth = np.sort(positive, axis=1)[:, -(D // 2)][:, None]
        a = np.where(positive >= np.maximum(kth, 1e-30), positive, 0)
        loss = ((e - a @ p["W_dec"]) ** 2).sum() / variance * D / 32
        if name == "target_l0":
            below = np.where(is_dead, np.maximum(p["threshold"] - pre, 0), 0)
            loss += 0.3 * below.sum(1).mean()
        return loss

    assert float(metrics.loss - plain.loss) == pytest.approx(dead_loss(p), rel=1e-3)
    rng = np.random.default_rng(2)
    for key in gradients:
        direction = rng.normal(size=p[key].shape)
        if key == "W_dec":
            direction -= (direction * p[key]).sum(1, keepdims=True) * p[key]
        step = 1e-6 * direction
        above = dead_loss(p | {key: p[key] + step})
        below = dead_loss(p | {key: p[key] - step})
        expected = (above - below) / 2e-6
        difference = np.asarray(gradients[key] - without[key], np.float64)
        assert (difference * direction).sum() == pytest.approx(expected, rel=2e-3, abs=1e-5)


@pytest.mark.parametrize("kind", [TopK(), TopKByRows(k_max=5)], ids=["dense", "rows"])
def test_zero_picks_are_not_alive(kind):
    """Where fewer than k pre-activations are positive, fewer features are active."""
    params = initial_params(kind)
    params["b_enc"] = jnp.where(jnp.arange(F) < 2, 100.0, -100.0)
    x = np.zeros((TOKENS, D), np.float32)
    _, metrics = gradients_of(kind, params, in_tiles(x))
    np.testing.assert_array_equal(metrics.active, np.where(np.arange(F) < 2, TOKENS, 0))
    assert float(metrics.l0) == 2


def test_unit_decoder_stays_one():
    kind = TopK()
    params = initial_params(kind)
    moved = params | {"W_dec": 1.7 * params["W_dec"] + 0.1}
    context = BatchContext(jnp.zeros(F, bool), jnp.zeros((), bool))
    norms = np.linalg.norm(kind.finish_update(moved, context)["W_dec"], axis=1)
    np.testing.assert_allclose(norms, 1, rtol=1e-6)
