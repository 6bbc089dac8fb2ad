"""TopK: of every token's positive pre-activations the k largest are its features (Gao et al. 2024).

    x̂ = TopK(relu(x W_enc + b_enc)) W_dec + b_dec,    loss = mse + AuxK

Decoder rows have norm 1. Where fewer than k pre-activations are positive, fewer features are
active. The same rule applies in training and afterwards.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from minsae_jax.sae.kinds.base import BatchContext, Hyper, Params
from minsae_jax.sae.kinds.linear import Activated, LinearSAE, Vectors
from minsae_jax.sae.kinds.select import keep_largest


@dataclass(frozen=True)
class TopK(LinearSAE):
    name = "topk"
    param_names = ("W_enc", "b_enc", "W_dec", "b_dec", "k")
    starts_at_median = True
    unit_decoder = True
    uses_aux = True

    @property
    def sparsity_name(self) -> str:
        return "k"

    def shapes(self, d_model: int, d_sae: int) -> dict[str, tuple[int, ...]]:
        return super().shapes(d_model, d_sae) | {"k": ()}

    def with_hyper(self, params: Params, hyper: Hyper) -> Params:
        return params | {"k": hyper["k"]}

    def encode(
        self, params: Params, x: Float[Array, "*tokens d_model"]
    ) -> Float[Array, "*tokens d_sae"]:
        pre = self.pre_activations(params, x)
        rows = pre.reshape(-1, pre.shape[-1])
        return keep_largest(jax.nn.relu(rows).T, params["k"]).T.reshape(pre.shape)

    def activate(
        self,
        pre: Float[Array, "d_sae tile"],
        vectors: Vectors,
        hyper: Hyper,
        context: BatchContext,
    ) -> Activated:
        zeros = jnp.zeros(pre.shape[1])
        return Activated(keep_largest(jax.nn.relu(pre), hyper["k"]), zeros, zeros)
