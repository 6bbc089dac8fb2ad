"""Fifty steps of training against another implementation, in float64 with autodiff by PyTorch."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from minsae_jax.sae.config import TrainConfig
from minsae_jax.sae.data import geometric_median
from minsae_jax.sae.grid import make_groups
from minsae_jax.sae.sweep import Sweep, read_metrics

D, F, TOKENS, STEPS, LR, K, LAMBDA, TARGET = 8, 32, 48, 50, 3e-3, 3, 0.5, 4.0
DEAD_AFTER = 2 * TOKENS
PREFIXES = (8, 16, 32)
KINDS = {
    "topk": {"kind": ("topk",), "k": (float(K),)},
    "batchtopk": {"kind": ("batchtopk",), "k": (float(K),)},
    "matryoshka": {
        "kind": ("matryoshka",),
        "k": (float(K),),
        "matryoshka_shares": (0.25, 0.5, 1.0),
    },
    "tanh": {"kind": ("jumprelu",), "lambda_sparsity": (LAMBDA,)},
    "target_l0": {"kind": ("jumprelu",), "target_l0": (TARGET,)},
}
JUMPRELU = ("tanh", "target_l0")
BANDWIDTH = 2.0
UNIT_DECODER = ("topk", "batchtopk", "matryoshka")


def batches():
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(12, D))
    for _ in range(STEPS):
        sources = rng.exponential(size=(TOKENS, 12)) * (rng.random((TOKENS, 12)) < 0.2)
        yield (sources @ directions + 0.1 * rng.normal(size=(TOKENS, D)) + 1).astype(np.float32)


def ramp(pre, threshold, bandwidth):
    """Return 0, with the gradient of a ramp of this width from 0 to 1 around the threshold."""
    height = torch.clamp((pre - threshold) / bandwidth + 0.5, 0, 1)
    return height - height.detach()


@dataclass
class Metrics:
    loss: float
    mse: float
    l0: float


class Reference:
    """Training as docs/kinds.md describes it, with the settings of recipe april2024 and modern."""

    def __init__(self, name, params):
        self.name = name
        self.p = {k: torch.tensor(np.asarray(v), dtype=torch.float64) for k, v in params.items()}
        self.trained = {k: v for k, v in self.p.items() if v.ndim}
        self.moments = {k: (torch.zeros_like(v),) * 2 for k, v in self.trained.items()}
        self.silent_for = torch.zeros(F)
        self.n_aux_steps = 0
        self.kth = [None, None]  # averages of the last selected and the first other activation

    def features(self, pre):
        """Return the features, and how many are active on each token, both with gradients."""
        if self.name in JUMPRELU:
            threshold = self.p["threshold"]
            active = (pre > threshold).double()
            reached = pre if self.name == "tanh" else pre.detach()
            step = ramp(reached, threshold, BANDWIDTH)
            return pre * active + threshold.detach() * step, (active + step).sum(1)
        positive = torch.relu(pre)
        rows = positive if self.name == "topk" else positive.reshape(1, -1)
        n_kept = K if self.name == "topk" else K * TOKENS
        values, indices = rows.topk(n_kept + 1, 1)
        kept = torch.zeros_like(rows).scatter(1, indices[:, :n_kept], values[:, :n_kept])
        if self.name != "topk":
            self.average_kth(values[0, n_kept - 1].item(), values[0, n_kept].item())
        features = kept.reshape(pre.shape)
        return features, (features > 0).sum(1)

    def average_kth(self, *values):
        for i, value in enumerate(values):
            before = self.kth[i]
            self.kth[i] = value if before is None else 0.99 * before + 0.01 * value

    def losses(self, x, sparsity_factor):
        p = self.p
        pre = x @ p["W_enc"] + p["b_enc"]
        features, count = self.features(pre)
        ends = PREFIXES if self.name == "matryoshka" else (F,)
        errors = [x - features[:, :e] @ p["W_dec"][:e] - p["b_dec"] for e in ends]
        mses = [(error**2).sum(1).mean() for error in errors]
        loss = sum(mses) / len(mses)
        norms = p["W_dec"].norm(dim=1)
        if self.name == "tanh":
            penalty = torch.tanh(4 * features * norms).sum(1).mean()
            below = (torch.relu(p["threshold"] - pre) * norms).sum(1).mean()
            loss = loss + LAMBDA * sparsity_factor * penalty + 3e-6 * below
        elif self.name == "target_l0":
            below = torch.relu(p["threshold"] - pre)[:, self.silent_for >= DEAD_AFTER]
            loss = loss + D * (count.mean() / TARGET - 1) ** 2 + 3e-6 * D * below.sum(1).mean()
        loss = loss + self.aux_loss(pre, errors[-1].detach())
        active = features > 0
        return loss, mses[-1], active

    def aux_loss(self, pre, error):
        is_dead = self.silent_for >= DEAD_AFTER
        if not is_dead.any():
            return 0
        self.n_aux_steps += 1
        values, indices = (torch.relu(pre) * is_dead).topk(D // 2, 1)
        dead_features = torch.zeros_like(pre).scatter(1, indices, values)
        difference = error - dead_features @ self.p["W_dec"]
        return D / 32 * (difference**2).sum() / ((error - error.mean(0)) ** 2).sum()

    def step(self, x, number):
        """Make a step, counted from 0, and return its metrics."""
        x = torch.tensor(x, dtype=torch.float64)
        for p in self.trained.values():
            p.requires_grad_()
        loss, mse, active = self.losses(x, min(number / (0.05 * STEPS), 1))
        gradients = torch.autograd.grad(loss, list(self.trained.values()))
        gradients = dict(zip(self.trained, gradients, strict=True))
        lr = LR * min((STEPS - number) / (0.2 * STEPS), 1)
        with torch.no_grad():
            self.update(gradients, lr, number + 1)
        self.silent_for += TOKENS
        self.silent_for[active.any(0)] = 0
        return Metrics(loss.item(), mse.item(), active.sum(1).double().mean().item())

    def update(self, gradients, lr, count):
        if self.name in UNIT_DECODER:
            rows = self.p["W_dec"]
            gradients["W_dec"] -= (gradients["W_dec"] * rows).sum(1, keepdim=True) * rows
        norm = torch.sqrt(sum((g**2).sum() for g in gradients.values()))
        for name, gradient in gradients.items():
            gradient = gradient / max(norm, 1)
            m, v = self.moments[name]
            m = 0.9 * m + 0.1 * gradient
            v = 0.999 * v + 0.001 * gradient**2
            self.moments[name] = (m, v)
            m_hat, v_hat = m / (1 - 0.9**count), v / (1 - 0.999**count)
            self.p[name].sub_(lr * m_hat / (v_hat.sqrt() + 1e-8))
        if self.name in UNIT_DECODER:
            self.p["W_dec"].div_(self.p["W_dec"].norm(dim=1, keepdim=True))
        else:
            self.p["threshold"].clamp_(min=0)


@pytest.fixture(params=KINDS)
def name(request):
    return request.param


def test_fifty_steps_follow_the_definition(name):
    settings = TrainConfig(
        **KINDS[name],
        lr=(LR,),
        num_steps=STEPS,
        feature_dim_factor=(F / D,),
        mesh="1x1",
        aux_dead_after=DEAD_AFTER,
    )
    plan = settings.plan()
    sweep = Sweep(plan, make_groups(plan, D), D)
    median = geometric_median(next(batches()))
    (start,) = sweep.weights(sweep.init(median=median))

    # The start: rows of equal norm, tied, and the median is neither encoded nor missing from x̂.
    norm = 1 if name in UNIT_DECODER else 0.1
    np.testing.assert_allclose(np.linalg.norm(start["W_dec"], axis=1), norm, rtol=1e-5)
    np.testing.assert_array_equal(start["W_enc"], start["W_dec"].T)
    np.testing.assert_array_equal(start["b_dec"], median)
    np.testing.assert_allclose(median @ start["W_enc"] + start["b_enc"], 0, atol=1e-5)
    if name in JUMPRELU:
        np.testing.assert_allclose(start["threshold"], 0.1, rtol=1e-6)

    start["b_enc"] = start["b_enc"] - np.where(np.arange(F) < 6, 2, 0).astype(np.float32)
    state = sweep.init({key: np.asarray(value) for key, value in start.items()})
    reference = Reference(name, start)
    for number, x in enumerate(batches()):
        state, _ = sweep.step(state, sweep.hyper, sweep.put(x), np.float32(1), n_tokens=TOKENS)
        state, device_metrics = sweep.take_metrics(state)
        (metrics,) = read_metrics(device_metrics)
        expected = reference.step(x, number)
        assert metrics.loss[0] == pytest.approx(expected.loss, rel=1e-4), number
        assert metrics.mse[0] == pytest.approx(expected.mse, rel=1e-4), number
        assert metrics.l0[0] == pytest.approx(expected.l0, abs=1e-4), number

    (params,) = sweep.weights(state)
    for key in reference.trained:
        np.testing.assert_allclose(params[key], reference.p[key].detach(), atol=1e-4)
        assert np.abs(np.asarray(params[key]) - start[key]).max() > 0.01
    assert reference.n_aux_steps > 10
    if name in ("batchtopk", "matryoshka"):
        selected, other = reference.kth
        assert other * (1 - 1e-4) <= float(params["threshold"]) <= selected * (1 + 1e-4)
