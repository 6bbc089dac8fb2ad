"""Gated: one bias decides which features are active, another how much.

    f_i = magnitude_i where x W_enc + b_gate > 0, else 0
    magnitude = relu(exp(r_mag) * (x W_enc) + b_mag)

(Rajamanoharan et al. 2024, "Improving Dictionary Learning with Gated Sparse Autoencoders".)
For autoencoders from other libraries: they can be evaluated and exported, but not trained.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from minsae_jax.sae.kinds.base import Params, SAEKind


@dataclass(frozen=True)
class Gated(SAEKind):
    name = "gated"
    param_names = ("W_enc", "b_gate", "b_mag", "r_mag", "W_dec", "b_dec")

    def shapes(self, d_model: int, d_sae: int) -> dict[str, tuple[int, ...]]:
        return {
            "W_enc": (d_model, d_sae),
            "b_gate": (d_sae,),
            "b_mag": (d_sae,),
            "r_mag": (d_sae,),
            "W_dec": (d_sae, d_model),
            "b_dec": (d_model,),
        }

    def encode(
        self, params: Params, x: Float[Array, "*tokens d_model"]
    ) -> Float[Array, "*tokens d_sae"]:
        pre = x @ params["W_enc"]

        def row(name: str) -> Array:
            return jnp.broadcast_to(params[name], pre.shape)

        magnitude = jax.nn.relu(pre * jnp.exp(row("r_mag")) + row("b_mag"))
        return jnp.where(pre + row("b_gate") > 0, magnitude, 0)
