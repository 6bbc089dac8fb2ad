"""Reversible instance normalisation (Kim et al. 2022), and the two scalers that other PatchTSTs have in its place."""

from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

# What is taken away and what is divided by. mean_sd: RevIN; last_sd: the last sample is taken away instead of the mean;
# mean_abs: nothing is taken away, the mean of |x| is divided by.
Scaler = Literal["mean_sd", "last_sd", "mean_abs"]


class RevIN(nnx.Module):
    """Takes away each window's own mean and SD, channel by channel, then applies the affine map where there is one."""

    def __init__(self, n_vars: int, eps: float, affine: bool, scaler: Scaler = "mean_sd"):
        self.eps, self.scaler = eps, scaler
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
        """The way back for what was predicted from the windows x."""
        if self.affine_weight is not None and self.affine_bias is not None:
            y = (y - self.affine_bias[None, None]) / (self.affine_weight[None, None] + self.eps**2)
        centre, scale = self._statistics(x)
        return y * scale + centre

    def _statistics(self, x: Array) -> tuple[Array, Array]:
        """Both [batch, 1, n_vars]; mean, and biased variance about it, are over time."""
        if self.scaler == "mean_abs":
            scale = jnp.maximum(jnp.abs(x).mean(1, keepdims=True), self.eps)
            return jnp.zeros_like(scale), scale
        mean = x.mean(1, keepdims=True)
        scale = jnp.sqrt(jnp.square(x - mean).mean(1, keepdims=True) + self.eps)
        return mean if self.scaler == "mean_sd" else x[:, -1:], scale
