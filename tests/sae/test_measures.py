"""Measures on held-out tokens against their definitions in float64, and against closed forms."""

import numpy as np
import pytest

from minsae_jax.parallel.mesh import make_mesh
from minsae_jax.sae.kinds import KINDS
from minsae_jax.sae.measures import measure

D, F = 8, 20
RELU = KINDS["relu"]


def members(count, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {
        "W_enc": (count, D, F),
        "b_enc": (count, F),
        "W_dec": (count, F, D),
        "b_dec": (count, D),
    }
    return {name: rng.normal(size=shape).astype(np.float32) / 3 for name, shape in shapes.items()}


def cut(x, size):
    return [x[i : i + size] for i in range(0, len(x), size)]


def test_definitions():
    """Two groups of members on eight devices, and batches that do not divide."""
    rng = np.random.default_rng(1)
    x = (rng.normal(size=(210, D)) * rng.uniform(0.1, 3, size=D) + 2).astype(np.float32)
    x[17] = 0
    groups = [members(2), members(4, seed=5)]
    found = measure(make_mesh(2, 4), [RELU, RELU], groups, cut(x, 50), scale=0.7)
    x = x.astype(np.float64) * 0.7
    for group, measures in zip(groups, found, strict=True):
        for i in range(len(group["b_enc"])):
            w = {name: value[i].astype(np.float64) for name, value in group.items()}
            f = np.maximum(x @ w["W_enc"] + w["b_enc"], 0)
            x_hat = f @ w["W_dec"] + w["b_dec"]
            r, variance = x_hat - x, ((x - x.mean(0)) ** 2).sum()
            norm, norm_hat = np.linalg.norm(x, axis=1), np.linalg.norm(x_hat, axis=1)
            some = norm > 0
            expected = {
                "fvu": (r**2).sum() / variance,
                "explained_variance": 1 - ((r - r.mean(0)) ** 2).sum() / variance,
                "l0": (f > 0).sum(1).mean(),
                "l1": (f * np.linalg.norm(w["W_dec"], axis=1)).sum(1).mean(),
                "cosine": ((x * x_hat).sum(1)[some] / (norm * norm_hat)[some]).sum() / len(x),
                "norm_ratio": (norm_hat / np.where(some, norm, 1))[some].mean(),
                "dense_fraction": ((f > 0).mean(0) > 0.1).mean(),
            }
            for name, value in expected.items():
                assert getattr(measures, name)[i] == pytest.approx(value, rel=1e-5), name
            np.testing.assert_allclose(measures.density[i], (f > 0).mean(0), atol=1e-7)
    assert len(found[1].fvu) == 4


EXACT = {"fvu": 0, "explained_variance": 1}
AS_MEAN = {"fvu": 1, "explained_variance": 0}  # as bad as predicting the mean
ALL_ACTIVE = {"l0": D, "dense_fraction": 1}
NONE_ACTIVE = {"l0": 0, "l1": 0, "dense_fraction": 0}


def identity():
    """Features x and -x: a perfect autoencoder of L0 = d_model."""
    w_enc = np.concatenate([np.eye(D), -np.eye(D)], axis=1)
    return {"W_enc": w_enc, "b_enc": np.zeros(2 * D), "W_dec": w_enc.T, "b_dec": np.zeros(D)}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, {**EXACT, "cosine": 1, "norm_ratio": 1, **ALL_ACTIVE}),
        ({"W_dec": 2}, {**AS_MEAN, "cosine": 1, "norm_ratio": 2, **ALL_ACTIVE}),
        ({"W_dec": 0}, {**AS_MEAN, "cosine": 0, "norm_ratio": 0, **ALL_ACTIVE}),
        ({"b_enc": -100}, {**AS_MEAN, "cosine": 0, "norm_ratio": 0, **NONE_ACTIVE}),
        # x̂ is off by a constant of 3 SD.
        ({"b_dec": 3}, {"fvu": 9, "explained_variance": 1, "l0": D}),
    ],
)
def test_closed_forms(change, expected):
    params = identity()
    for name, value in change.items():
        params[name] = params[name] * value if name == "W_dec" else params[name] + value
    x = np.random.default_rng(2).normal(size=(4000, D))
    x = (x - x.mean(0)) / x.std(0)  # so that Σ‖x - x̄‖² = Σ‖x‖²
    (found,) = measure(
        make_mesh(),
        [RELU],
        [{k: v[None].astype(np.float32) for k, v in params.items()}],
        cut(x.astype(np.float32), 999),
    )
    for name, value in expected.items():
        assert getattr(found, name)[0] == pytest.approx(value, abs=1e-5), name


def test_variance_is_about_the_mean_of_all_batches():
    """Batches of unlike means far from 0: what is added up must not cancel."""
    x = np.random.default_rng(3).normal(size=(6, 100, D)) + 1000 + 50 * np.arange(6)[:, None, None]
    params = {k: v[None].astype(np.float32) for k, v in identity().items()}
    params["b_dec"] += 1
    (found,) = measure(make_mesh(), [RELU], [params], list(x.astype(np.float32)))
    flat = x.reshape(-1, D)
    expected = len(flat) * D / ((flat - flat.mean(0)) ** 2).sum()
    assert found.fvu[0] == pytest.approx(expected, rel=1e-3)
    assert found.explained_variance[0] == pytest.approx(1, abs=1e-5)
