"""Description length: bits per token needed to encode which features are active, and how much.

Following Ayonrinde, Pearce & Sharkey (2024, arXiv 2410.11179), an autoencoder is a code for
activations, and of two that are equally good the shorter code is the simpler explanation. Unlike L0
it is comparable between dictionaries of different sizes, principal components among them: it counts
that a feature out of 16,384 takes more bits to name than a component out of 128, and that a dense
code has many values to transmit.

Every feature i is coded independently of the others:

    bits = Σ_i [ h(p_i) + p_i · ½ log2(2πe (σ_i² / Δ² + 1/12)) ]

h is the entropy of a yes or no and p_i the share of tokens with the feature active. The second term
bounds the entropy of its value, rounded to multiples of Δ from a random offset, by that of a normal
variable of the variance σ_i² + Δ² / 12 (Massey 1988), on average over offsets; σ_i is the SD of
f_i ‖W_dec,i‖ over the tokens where it is active.
The step Δ is such that rounding adds 1 % of the activations' variance to the squared error of x̂,
for every autoencoder: L0 independent errors of Δ² / 12 each.
"""

import numpy as np
from jaxtyping import Float, Real
from scipy.special import entr

ROUNDING_FVU = 0.01  # squared error that rounding adds, as a share of the variance


def description_length(
    active: Real[np.ndarray, " d_sae"],
    mean: Float[np.ndarray, " d_sae"],
    mean_square: Float[np.ndarray, " d_sae"],
    n_tokens: int,
    variance: float,
) -> float:
    """Return the bits per token of an autoencoder's features.

    active: tokens with each feature active; mean and mean_square: of f_i ‖W_dec,i‖ over these
    tokens (any value where there are none). variance: Σ over d_model of the activations' variances.
    """
    p = active / n_tokens
    which = (entr(p) + entr(1 - p)) / np.log(2)
    step_squared = 12 * ROUNDING_FVU * variance / max(p.sum(), 1e-12)
    spread = np.maximum(mean_square - mean**2, 0) / step_squared
    value = np.log2(2 * np.pi * np.e * (spread + 1 / 12)) / 2
    of_feature = which + np.where(active > 0, p * value, 0)
    return float(of_feature.sum())
