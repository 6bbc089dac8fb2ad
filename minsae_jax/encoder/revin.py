"""Reversible instance normalisation (Kim et al. 2022), the half of it that an encoder needs."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class RevIN(nnx.Module):
    """Takes away each window's own mean and SD, channel by channel, then applies the affine map where there is one."""

    def __init__(self, n_vars: int, eps: float, affine: bool):
        self.eps = eps
        self.affine_weight = nnx.Param(jnp.ones(n_vars)) if affine else None
        self.affine_bias = nnx.Param(jnp.zeros(n_vars)) if affine else None

    def __call__(self, x: Float[Array, "batch time n_vars"]) -> Float[Array, "batch time n_vars"]:
        """Mean and biased variance are over time."""
        centred = x - x.mean(1, keepdims=True)
        normalized = centred * jax.lax.rsqrt(jnp.square(centred).mean(1, keepdims=True) + self.eps)
        if self.affine_weight is None or self.affine_bias is None:
            return normalized
        return normalized * self.affine_weight[None, None] + self.affine_bias[None, None]
