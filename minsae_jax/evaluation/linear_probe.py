"""A linear probe: logistic regression with a small, fixed penalty."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from scipy.special import expit

PENALTY = 1e-3  # of ‖w‖² / 2
PRECISION = 1e-12  # of the loss


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
    # Rows are ±(1, z_i), so that margins are their products with (bias, w).
    rows = np.column_stack([np.ones(len(x)), (x - mean) / sd])
    rows *= np.where(is_event, 1.0, -1.0)[:, None]
    penalty = np.full(rows.shape[1], PENALTY)
    penalty[0] = 0

    def loss(parameters: np.ndarray) -> float:
        losses = np.logaddexp(0, -(rows @ parameters))
        return float(losses.mean() + penalty @ np.square(parameters) / 2)

    # Newton's method: a few steps, where L-BFGS takes hundreds on correlated activations.
    fit = np.zeros(rows.shape[1])
    decrease = np.inf  # twice what a step gains if the loss is quadratic
    while decrease > PRECISION:
        miss = expit(-(rows @ fit))  # -d/dm log(1 + exp(-m))
        gradient = penalty * fit - miss @ rows / len(rows)
        curvature = miss * (1 - miss) / len(rows)
        hessian = (rows.T * curvature) @ rows + np.diag(penalty)
        step = np.linalg.solve(hessian, gradient)
        decrease = gradient @ step
        # Far from the minimum a whole step can be too long.
        while loss(fit - step) > loss(fit):
            step /= 2
        fit -= step
    weights = fit[1:] / sd
    return LinearProbe(weights, float(fit[0] - mean @ weights))
