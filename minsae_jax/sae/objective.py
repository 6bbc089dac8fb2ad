"""Loss, gradients and statistics of one autoencoder on a batch of tokens.

    loss = recon_weight * mse + λ * l1,    l1 = mean over tokens of Σ_i f_i ‖W_dec_i‖₂

with mse = mean over tokens of Σ_d (x̂ - x)², as in Anthropic's April 2024 update, or its mean over d_model, as minSAE
has it.
"""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from minsae_jax.sae import member as model
from minsae_jax.sae.member import Params


@dataclass(frozen=True)
class Objective:
    mean_over_d_model: bool
    recon_weight: float = 1.0
    factors: Literal["float32", "bfloat16", "rounded"] = (
        "float32"  # of products, which are added up in float32
    )

    def mse_factor(self, d_model: int) -> float:
        """From Σ_d (x̂ - x)² to the mse of a token."""
        return 1 / d_model if self.mean_over_d_model else 1.0


class Statistics(NamedTuple):
    """Of a batch; f is a token's features."""

    loss: Float[Array, ""]
    mse: Float[Array, ""]  # without recon_weight
    l1: Float[Array, ""]  # without λ
    l0: Float[Array, ""]  # active features a token
    residual: Float[Array, ""]  # Σ over tokens and d_model of (x̂ - x)²
    active: Int[Array, " d_sae"]  # tokens on which each feature is active


class Sums(NamedTuple):
    """What pieces of a batch, on whatever device, are added up to. Gradients are of loss * tokens, without the part
    that reaches W_dec through its norm."""

    gradients: Params
    residual: Float[Array, ""]
    features: Float[Array, " d_sae"]
    active: Int[Array, " d_sae"]


def plain_loss(
    params: Params,
    x: Float[Array, "tokens d_model"],
    lambda_sparsity: Float[Array, ""],
    objective: Objective,
) -> Float[Array, ""]:
    """The loss as it is written above; `batch_sums` and `finish` give its gradient without holding all features."""
    features = model.encode(params, x)
    error = jnp.square(model.decode(params, features) - x).sum(-1).mean()
    l1 = (features @ jnp.linalg.norm(params["W_dec"], axis=1)).mean()
    return objective.recon_weight * objective.mse_factor(x.shape[1]) * error + lambda_sparsity * l1


def batch_sums(
    params: Params,
    x: Float[Array, "pieces piece d_model"],
    is_token: Float[Array, "pieces piece"] | None,
    lambda_sparsity: Float[Array, ""],
    objective: Objective,
) -> Sums:
    """Sums over a batch, piece by piece, so that the features of one piece alone are in memory.

    Rows with is_token 0 are padding. Within a piece features are [d_sae, piece]: every product is then one of two
    contiguous matrices, and only d_model x piece blocks are transposed, which on CPU is worth a quarter of the time.
    """

    def factor(a: Array) -> Array:
        if objective.factors == "rounded":
            return jax.lax.reduce_precision(a, exponent_bits=8, mantissa_bits=7)
        return a.astype(jnp.bfloat16) if objective.factors == "bfloat16" else a

    w_enc_t, w_dec = factor(params["W_enc"].T), factor(params["W_dec"])
    w_dec_t = w_dec.T
    error_factor = 2 * objective.recon_weight * objective.mse_factor(x.shape[-1])
    penalty = (lambda_sparsity * jnp.linalg.norm(params["W_dec"], axis=1))[:, None]
    b_enc, b_dec = params["b_enc"][:, None], params["b_dec"][:, None]

    def add(sums: Sums, piece: tuple[Array, Array | None]) -> tuple[Sums, None]:
        x, mask = piece
        x_low, x_t = factor(x), x.T
        f_t = jax.nn.relu(product(w_enc_t, x_low.T) + b_enc)
        if mask is not None:
            f_t = f_t * mask[None]
        f_low = factor(f_t)
        error_t = product(w_dec_t, f_low) + b_dec - x_t
        if mask is not None:
            error_t = error_t * mask[None]
        error_low = factor(error_t)
        active = f_t > 0
        pre_t = jnp.where(active, error_factor * product(w_dec, error_low) + penalty, 0)
        gradients = {
            "W_enc": product(factor(pre_t), x_low),  # transposed until all pieces are added
            "b_enc": pre_t.sum(1),
            "W_dec": error_factor * product(f_low, error_low.T),
            "b_dec": error_factor * error_t.sum(1),
        }
        here = Sums(
            gradients, jnp.square(error_t).sum(), f_t.sum(1), active.sum(1, dtype=jnp.int32)
        )
        return jax.tree.map(jnp.add, sums, here), None

    d_sae, d_model = w_dec.shape
    zero = Sums(
        {
            "W_enc": jnp.zeros((d_sae, d_model)),
            **{n: jnp.zeros_like(params[n]) for n in ("b_enc", "W_dec", "b_dec")},
        },
        jnp.zeros(()),
        jnp.zeros(d_sae),
        jnp.zeros(d_sae, jnp.int32),
    )
    sums, _ = jax.lax.scan(add, zero, (x, is_token))
    return sums._replace(gradients=sums.gradients | {"W_enc": sums.gradients["W_enc"].T})


def product(a: Float[Array, "m k"], b: Float[Array, "k n"]) -> Float[Array, "m n"]:
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def with_bfloat16(
    objective: Objective, d_model: int, d_sae: int, pieces: int, piece: int
) -> Objective:
    """The objective with products of bfloat16 numbers; where XLA has none, as its CPU runtime has none for a single
    piece, of float32 numbers that are rounded to bfloat16."""
    low = replace(objective, factors="bfloat16")
    params = {
        name: np.zeros(shape, np.float32) for name, shape in model.shapes(d_model, d_sae).items()
    }
    try:
        with jax.ensure_compile_time_eval():
            x = jnp.zeros((min(pieces, 2), piece, d_model))
            jax.block_until_ready(
                jax.jit(batch_sums, static_argnums=4)(params, x, None, jnp.zeros(()), low)
            )
    except jax.errors.JaxRuntimeError:
        return replace(objective, factors="rounded")
    return low


def finish(
    params: Params, sums: Sums, tokens: int, lambda_sparsity: Float[Array, ""], objective: Objective
) -> tuple[Params, Statistics]:
    """Gradients and statistics of the whole batch from the sums over all of its tokens."""
    w_dec = params["W_dec"]
    norm = jnp.linalg.norm(w_dec, axis=1)
    gradients = jax.tree.map(lambda g: g / tokens, sums.gradients)
    direction = jnp.where(norm[:, None] > 0, w_dec / norm[:, None], 0)
    gradients["W_dec"] += lambda_sparsity * (sums.features / tokens)[:, None] * direction
    mse = objective.mse_factor(w_dec.shape[1]) * sums.residual / tokens
    l1 = (sums.features * norm).sum() / tokens
    loss = objective.recon_weight * mse + lambda_sparsity * l1
    return gradients, Statistics(
        loss, mse, l1, sums.active.astype(jnp.float32).sum() / tokens, sums.residual, sums.active
    )
