"""Reversible instance normalisation (Kim et al. 2022), and the scalers other PatchTSTs use."""

from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

# Centre and scale of a window's channel. mean_sd: RevIN; last_sd: the last sample is the centre;
# mean_abs: the centre is 0 and the scale is the mean of |x|.
Scaler = Literal["mean_sd", "last_sd", "mean_abs"]


class RevIN(nnx.Module):
    """Subtract the centre of each window and channel, divide by its scale, apply an affine map.

    The affine map (one weight and one bias per channel) is optional.
    """

    def __init__(self, n_vars: int, eps: float, affine: bool, scaler: Scaler = "mean_sd"):
        self.eps = eps
        self.scaler = scaler
        self.affine_weight = nnx.Param(jnp.ones(n_vars)) if affine else None
        self.affine_bias = nnx.Param(jnp.zeros(n_vars)) if affine else None

    def __call__(self, x: Float[Array, "batch time n_vars"]) -> Float[Array, "batch time n_vars"]:
        centre, scale = self._statistics(x)
        normalized = (x - centre) / scale
        if self.affine_weight is None or self.affine_bias is None:
            return normalized
        return normalized * self.affine_weight[None, None] + self.affine_bias[None, None]

    def denormalize(
        self, y: Float[Array, "batch steps n_vars"], x: Float[Array, "batch time n_vars"]
    ) -> Float[Array, "batch steps n_vars"]:
        """Map predictions y back to the units of the windows x from which they were made."""
        if self.affine_weight is not None and self.affine_bias is not None:
            # eps² instead of eps: the reference implementation guards its division like this.
            y = (y - self.affine_bias[None, None]) / (self.affine_weight[None, None] + self.eps**2)
        centre, scale = self._statistics(x)
        return y * scale + centre

    def _statistics(
        self, x: Float[Array, "batch time n_vars"]
    ) -> tuple[Float[Array, "batch 1 n_vars"], Float[Array, "batch 1 n_vars"]]:
        """Return centre and scale over time; the variance is the biased one about the mean."""
        if self.scaler == "mean_abs":
            scale = jnp.maximum(jnp.abs(x).mean(1, keepdims=True), self.eps)
            return jnp.zeros_like(scale), scale
        mean = x.mean(1, keepdims=True)
        scale = jnp.sqrt(jnp.square(x - mean).mean(1, keepdims=True) + self.eps)
        # last_sd changes the centre only: its SD is still the one about the mean.
        if self.scaler == "last_sd":
            return x[:, -1:], scale
        return mean, scale
