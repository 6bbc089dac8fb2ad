"""JumpReLU: f = z where z > θ, else 0, with a trained threshold θ for each feature.

The step at θ has no gradient; where |z - θ| is below half a bandwidth ε, θ gets that of a ramp of
width ε (Rajamanoharan et al. 2024). Three penalties:

    tanh        λ Σ_i tanh(4 f_i n_i) + 3e-6 Σ_i relu(θ_i - z_i) n_i,   n_i = ‖W_dec,i‖₂
                (Anthropic, January 2025; the ramp's gradient also goes to z)
    step        λ L0, where L0 is the number of active features (Rajamanoharan et al. 2024)
    target_l0   d_model (L0 / target - 1)², where L0 is the batch's mean number of active features
                (d_model, since E‖x‖² is about d_model; dictionary_learning has 1 for E‖x‖² = 1),
                + 3e-6 d_model Σ relu(θ_i - z_i) over dead features

The loss also has AuxK. It raises z_i of dead features, but leaves θ_i where z_i may never reach it;
the last term lowers θ_i.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from minsae_jax.sae.config import TrainConfig
from minsae_jax.sae.kinds.base import BatchContext, HyperArrays, Params
from minsae_jax.sae.kinds.linear import Activated, LinearSAE, Vectors
from minsae_jax.sae.kinds.products import is_positive, row_sums, tanh_of_positive

TANH_SLOPE = 4.0
PRE_ACTIVATION_WEIGHT = 3e-6
# Initial threshold and bandwidth with the penalty `step`, for E‖x‖² = 1 (Lieberum et al. 2024,
# "Gemma Scope").
STEP_WIDTH = 1e-3


@dataclass(frozen=True)
class JumpReLU(LinearSAE):
    """mode: the penalty. bandwidth: ε, in the unit of scaled activations, as initial_threshold.

    dead_weight: of the distance of dead features below their thresholds, with mode `target_l0`.
    """

    mode: Literal["tanh", "step", "target_l0"] = "tanh"
    bandwidth: float = 2.0
    initial_threshold: float = 0.1
    dead_weight: float = 0.0

    name = "jumprelu"
    param_names = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
    independent = True
    starts_at_median = True

    def for_run(self, config: TrainConfig, d_model: int) -> "JumpReLU":
        if config.target_l0:
            return JumpReLU(mode="target_l0", dead_weight=PRE_ACTIVATION_WEIGHT * d_model)
        if config.jumprelu_penalty == "step":
            # Scaled activations have a mean norm of √d_model.
            width = STEP_WIDTH * d_model**0.5
            return JumpReLU(mode="step", bandwidth=width, initial_threshold=width)
        return JumpReLU(mode="tanh")

    @property
    def sparsity_name(self) -> str:
        return "target_l0" if self.mode == "target_l0" else "lambda_sparsity"

    @property
    def weighs_batch_penalty(self) -> bool:
        return self.mode == "target_l0"

    def shapes(self, d_model: int, d_sae: int) -> dict[str, tuple[int, ...]]:
        return super().shapes(d_model, d_sae) | {"threshold": (d_sae,)}

    def complete_init(self, params: Params, median: Float[Array, " d_model"] | None) -> Params:
        params = super().complete_init(params, median)
        # With a dtype, since a weakly typed array would make the second step compile again.
        threshold = jnp.full(params["b_enc"].shape, self.initial_threshold, jnp.float32)
        return params | {"threshold": threshold}

    def encode(
        self, params: Params, x: Float[Array, "*tokens d_model"]
    ) -> Float[Array, "*tokens d_sae"]:
        pre = self.pre_activations(params, x)
        threshold = jnp.broadcast_to(params["threshold"], pre.shape)
        return jnp.where(pre > threshold, jax.nn.relu(pre), 0)

    def vectors(self, params: Params) -> Vectors:
        vectors = {"threshold": params["threshold"]}
        if self.mode == "tanh":
            vectors["norm"] = jnp.linalg.norm(params["W_dec"], axis=1)
        return vectors

    def activate(
        self,
        pre: Float[Array, "d_sae tile"],
        vectors: Vectors,
        hyper: HyperArrays,
        context: BatchContext,
    ) -> Activated:
        threshold = vectors["threshold"][:, None]
        if self.mode == "tanh":
            norms = vectors["norm"][:, None]
            return tanh_penalised(pre, threshold, norms, self.bandwidth)
        active = step(pre, threshold, self.bandwidth)
        # The value is pre * active, and the ramp's gradient is multiplied by θ, as in the paper.
        constant = jax.lax.stop_gradient(active)
        features = pre * constant + jax.lax.stop_gradient(threshold) * (active - constant)
        if self.mode == "step":
            return Activated(features, penalty=active)
        below = jnp.where(context.is_dead[:, None], jax.nn.relu(threshold - pre), 0)
        return Activated(features, penalty=active, other=self.dead_weight * below)

    def penalty(
        self, params: Params, features: Float[Array, "tokens d_sae"]
    ) -> Float[Array, " tokens"]:
        if self.mode != "tanh":
            return (features > 0).sum(1).astype(jnp.float32)
        norms = jnp.linalg.norm(params["W_dec"], axis=1)
        return jnp.tanh(TANH_SLOPE * features * norms[None]).sum(1)

    def penalty_weight(self, hyper: HyperArrays) -> Float[Array, ""]:
        if self.mode == "target_l0":
            return jnp.zeros(())
        return hyper["lambda_sparsity"]

    def batch_penalty(
        self, mean_penalty: Float[Array, ""], hyper: HyperArrays, d_model: int
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        if self.mode != "target_l0":
            return super().batch_penalty(mean_penalty, hyper, d_model)
        target = hyper["target_l0"]
        excess = mean_penalty / target - 1
        return d_model * jnp.square(excess), 2 * d_model * excess / target

    def finish_update(self, params: Params, context: BatchContext) -> Params:
        return params | {"threshold": jnp.maximum(params["threshold"], 0)}


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def step(
    pre: Float[Array, "d_sae tile"], threshold: Float[Array, "d_sae 1"], bandwidth: float
) -> Float[Array, "d_sae tile"]:
    """Return 1 where pre > threshold, else 0; the threshold gets the gradient of a ramp."""
    return is_positive(pre - threshold)


def _step_forward(
    pre: Array, threshold: Array, bandwidth: float
) -> tuple[Array, tuple[Array, Array]]:
    return step(pre, threshold, bandwidth), (pre, threshold)


def _step_backward(
    bandwidth: float, saved: tuple[Array, Array], cotangent: Array
) -> tuple[Array, Array]:
    pre, threshold = saved
    on_ramp = is_positive(bandwidth / 2 - jnp.abs(pre - threshold))
    ramp = on_ramp * cotangent / bandwidth
    return jnp.zeros_like(pre), -row_sums(ramp)[:, None]


step.defvjp(_step_forward, _step_backward)


class TanhSaved(NamedTuple):
    """Values for the gradient of `tanh_penalised`."""

    pre: Float[Array, "d_sae tile"]
    features: Float[Array, "d_sae tile"]
    tanh: Float[Array, "d_sae tile"]
    threshold: Float[Array, "d_sae 1"]
    norms: Float[Array, "d_sae 1"]


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def tanh_penalised(
    pre: Float[Array, "d_sae tile"],
    threshold: Float[Array, "d_sae 1"],
    norms: Float[Array, "d_sae 1"],
    bandwidth: float,
) -> Activated:
    """Return the features with the tanh penalty and the pre-activation loss.

    The gradient is written by hand: it needs fewer passes over [d_sae, tile] than autodiff's.
    """
    return _tanh_forward(pre, threshold, norms, bandwidth)[0]


def _tanh_forward(
    pre: Array, threshold: Array, norms: Array, bandwidth: float
) -> tuple[Activated, TanhSaved]:
    features = jnp.where(pre > threshold, pre, 0)
    tanh = tanh_of_positive(TANH_SLOPE * features * norms)
    below = PRE_ACTIVATION_WEIGHT * jax.nn.relu(threshold - pre) * norms
    activated = Activated(features, penalty=tanh, other=below)
    return activated, TanhSaved(pre, features, tanh, threshold, norms)


def _tanh_backward(
    bandwidth: float, saved: TanhSaved, cotangent: Activated
) -> tuple[Array, Array, Array]:
    pre, features, tanh, threshold, norms = saved
    assert cotangent.penalty is not None
    assert cotangent.other is not None
    below_weight = PRE_ACTIVATION_WEIGHT * cotangent.other
    # d tanh(4 f n) / d(f n), times the penalty's weight
    tanh_gradient = TANH_SLOPE * cotangent.penalty * (1 - jnp.square(tanh))
    feature_gradient = cotangent.features + tanh_gradient * norms
    on_ramp = jnp.abs(pre - threshold) < bandwidth / 2
    ramp = jnp.where(on_ramp, feature_gradient * threshold / bandwidth, 0)
    # By pre - threshold: of the step from 0 to the threshold, and of what is below it.
    distance_gradient = ramp - jnp.where(threshold > pre, below_weight * norms, 0)
    pre_gradient = jnp.where(pre > threshold, feature_gradient, 0) + distance_gradient
    below = jax.nn.relu(threshold - pre)
    norm_gradient = row_sums(tanh_gradient * features + below_weight * below)
    return pre_gradient, -row_sums(distance_gradient)[:, None], norm_gradient[:, None]


tanh_penalised.defvjp(_tanh_forward, _tanh_backward)
