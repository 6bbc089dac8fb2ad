"""A linear probe: logistic regression with a small penalty, which is the same everywhere."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from scipy.optimize import minimize

PENALTY = 1e-3  # of ‖w‖² / 2


class LinearProbe(NamedTuple):
    """A linear function of features, or of activations, that is positive for events."""

    weights: Float[np.ndarray, " features"]
    bias: float

    def __call__(self, x: Float[np.ndarray, "n features"]) -> Float[np.ndarray, " n"]:
        """Return logits."""
        return x @ self.weights + self.bias


def fit_probe(x: Float[np.ndarray, "n features"], is_event: Bool[np.ndarray, " n"]) -> LinearProbe:
    """Fit a logistic regression on standardised features.

    Minimises mean_i log(1 + exp(-margin_i)) + 5e-4 ‖w‖², where margin_i = ±(w·z_i + bias) is
    positive if i is classified correctly. The bias is not penalised.
    """
    mean = x.mean(axis=0)
    sd = x.std(axis=0) + 1e-9
    z = (x - mean) / sd
    sign = np.where(is_event, 1.0, -1.0)

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        bias = parameters[0]
        w = parameters[1:]
        margin = sign * (z @ w + bias)
        value = np.logaddexp(0, -margin).mean() + PENALTY / 2 * (w**2).sum()
        # d/dm log(1 + exp(-m)) = -1 / (1 + exp(m)); the clip avoids an overflow.
        d_margin = -1 / (1 + np.exp(np.clip(margin, -500, 500)))
        d_logit = sign * d_margin / len(z)
        d_w = z.T @ d_logit + PENALTY * w
        return float(value), np.concatenate([[d_logit.sum()], d_w])

    fit = minimize(loss, np.zeros(z.shape[1] + 1), jac=True, method="L-BFGS-B").x
    weights = fit[1:] / sd
    return LinearProbe(weights, float(fit[0] - mean @ weights))
