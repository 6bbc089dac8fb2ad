"""Interface of a kind of sparse autoencoder, with a default gradient by autodiff.

Sweep, checkpoints, measures, evaluation and report use this interface only.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from minsae_jax.sae.config import TrainConfig

Params = dict[str, Any]  # parameter name -> array, NumPy's or JAX's
# Hyper-parameter -> scalar; under vmap one value for each member.
HyperArrays = dict[str, Array]


@dataclass(frozen=True)
class Objective:
    """The part of the loss that all kinds share.

    loss = recon_weight * mse + penalty, where mse is the mean over tokens of Σ_d (x̂ - x)²
    (Anthropic's April 2024 update), or also the mean over d_model (minSAE).
    """

    mean_over_d_model: bool
    recon_weight: float = 1.0
    # Precision of the factors of matrix products, which are summed in float32.
    # "rounded" rounds to bfloat16 but multiplies in float32, where XLA has no bfloat16 product.
    factors: Literal["float32", "bfloat16", "rounded"] = "float32"

    def mse_factor(self, d_model: int) -> float:
        """Return the factor from Σ_d (x̂ - x)² to the mse of a token."""
        return 1 / d_model if self.mean_over_d_model else 1.0

    def error_weight(self, d_model: int) -> float:
        """Return the weight of Σ_d (x̂ - x)² in the loss of a token."""
        return self.recon_weight * self.mse_factor(d_model)

    def round_factor(self, a: Array) -> Array:
        """Round a factor of a matrix product as `factors` says."""
        if self.factors == "bfloat16":
            return a.astype(jnp.bfloat16)
        if self.factors == "rounded":
            return jax.lax.reduce_precision(a, exponent_bits=8, mantissa_bits=7)
        return a


class Batch(NamedTuple):
    """One device's share of a batch, in tiles, so that one tile's features are in memory."""

    x: Float[Array, "tiles tile d_model"]
    is_token: Float[Array, "tiles tile"] | None  # 0 for padding; None if there is no padding

    def masked(self, a: Array) -> Array:
        """Return `a` [..., tile] with 0 for padding; this batch is a single tile."""
        return a if self.is_token is None else a * self.is_token[None]


class BatchContext(NamedTuple):
    """Inputs of the loss besides the token: from the whole batch and from the member's state."""

    is_dead: Bool[Array, " d_sae"]
    # Number of dead features: of this member, or the largest of the members of the group.
    n_dead: Int[Array, ""]
    # Pre-activations that reach it are active: one threshold for the whole batch.
    threshold: Float[Array, ""] | None = None
    # All pre-activations, where they were needed for the threshold already.
    pre: Float[Array, "tiles d_sae tile"] | None = None


class BatchSums(NamedTuple):
    """Sums over tokens, which may be added over tiles and devices."""

    gradients: Params  # of loss * tokens
    residual: Float[Array, ""]  # Σ over tokens and d_model of (x̂ - x)²
    penalty: Float[Array, ""]  # without its weight λ
    active: Int[Array, " d_sae"]  # tokens on which each feature is active


class BatchMetrics(NamedTuple):
    """Metrics of a whole batch."""

    loss: Float[Array, ""]
    mse: Float[Array, ""]  # without recon_weight
    l1: Float[Array, ""]  # penalty, mean over tokens, without λ
    l0: Float[Array, ""]  # active features, mean over tokens
    residual: Float[Array, ""]  # Σ over tokens and d_model of (x̂ - x)²
    active: Int[Array, " d_sae"]  # tokens on which each feature is active


class SAEKind:
    """A kind of sparse autoencoder; subclasses are frozen dataclasses of static settings.

    Members of equal kind and size form a group and share one compiled program. The sparsity setting
    and lr are arrays over the members of a group.
    """

    name: ClassVar[str]
    # Also the tensor names in sae.safetensors; W_dec and b_dec must be among them.
    param_names: ClassVar[tuple[str, ...]]
    # Whether a feature does not depend on the other features of its token, so that `encode` of some
    # columns of the parameters gives these features alone.
    independent: ClassVar[bool] = False
    # Whether b_dec starts at the geometric median of the data.
    starts_at_median: ClassVar[bool] = False
    # Steps until averages over steps among the parameters have settled; 0 without such averages.
    settling_steps: ClassVar[int] = 0
    # Whether a step on an accelerator has a loop whose end depends on the data.
    has_data_dependent_loop: ClassVar[bool] = False

    @property
    def settings(self) -> dict[str, Any]:
        """The kind's static settings by name, for config.json."""
        return dict(vars(self))

    @property
    def sparsity_name(self) -> str:
        """The hyper-parameter that sets how sparse the features are."""
        raise NotImplementedError

    def for_run(self, config: TrainConfig, d_model: int) -> "SAEKind":
        """Return this kind with its settings for a run."""
        return self

    def shapes(self, d_model: int, d_sae: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of every parameter."""
        return {
            "W_enc": (d_model, d_sae),
            "b_enc": (d_sae,),
            "W_dec": (d_sae, d_model),
            "b_dec": (d_model,),
        }

    def init_tied(
        self, key: Key[Array, ""], d_model: int, d_sae: int, decoder_norm: float
    ) -> Params:
        """Initialise with W_enc = W_decᵀ and decoder rows of L2 norm decoder_norm."""
        rows = jax.random.normal(key, (d_sae, d_model))
        w_dec = decoder_norm * rows / jnp.linalg.norm(rows, axis=1, keepdims=True)
        b_enc = jnp.zeros(d_sae)
        b_dec = jnp.zeros(d_model)
        return {"W_enc": w_dec.T, "b_enc": b_enc, "W_dec": w_dec, "b_dec": b_dec}

    def init_torch(self, key: Key[Array, ""], d_model: int, d_sae: int) -> Params:
        """Initialise as minSAE does, by the defaults of torch's nn.Linear."""
        raise NotImplementedError

    def with_hyper(self, params: Params, hyper: HyperArrays) -> Params:
        """Return initial parameters, or those of --init, with those that hyper-parameters set."""
        return params

    def complete_init(self, params: Params, median: Float[Array, " d_model"] | None) -> Params:
        """Return initial parameters with those that depend on data, and constant ones.

        median: geometric median of the tokens; given if `starts_at_median`.
        """
        return params

    def encode(
        self, params: Params, x: Float[Array, "*tokens d_model"]
    ) -> Float[Array, "*tokens d_sae"]:
        """Return the features of activations."""
        raise NotImplementedError

    def decode(
        self, params: Params, features: Float[Array, "*tokens d_sae"]
    ) -> Float[Array, "*tokens d_model"]:
        """Return the reconstruction x̂ from features."""
        x_hat = features @ params["W_dec"]
        return x_hat + jnp.broadcast_to(params["b_dec"], x_hat.shape)

    def encode_features(
        self, params: Params, x: Float[Array, "*tokens d_model"], indices: Int[Array, " n"]
    ) -> Float[Array, "*tokens n"]:
        """Return some of the features; kinds whose features are independent compute only these."""
        if not self.independent:
            return self.encode(params, x)[..., indices]
        # With sizes that differ, as those of the parameters may not.
        shapes = self.shapes(d_model=1, d_sae=2)
        columns = {}
        for name, p in params.items():
            is_by_feature = shapes[name][-1:] == (2,)
            columns[name] = p[..., indices] if is_by_feature else p
        return self.encode(columns, x)

    def penalty(
        self, params: Params, features: Float[Array, "tokens d_sae"]
    ) -> Float[Array, " tokens"]:
        """Return every token's sparsity penalty, without its weight λ; 0 without a penalty."""
        return jnp.zeros(features.shape[0])

    def penalty_weight(self, hyper: HyperArrays) -> Float[Array, ""]:
        """Return the weight λ of the penalty in the loss."""
        return jnp.zeros(())

    def fold_scale(self, params: Params, scale: float) -> Params:
        """Return parameters for x from parameters for scale * x.

        Features stay the same, so biases of the encoder and thresholds do too; x̂ is in the unit
        of x.
        """
        return params | {
            "W_enc": params["W_enc"] * scale,
            "W_dec": params["W_dec"] / scale,
            "b_dec": params["b_dec"] / scale,
        }

    def normalize_decoder(self, params: Params) -> Params:
        """Return parameters with decoder rows of the norm that training keeps.

        Kinds with rows of norm 1 multiply each feature by the norm of its row. x̂ is the same if all
        norms are equal, and otherwise unless features are selected by their size.
        """
        return params

    # The loss and its gradient. A kind may override `batch_sums` and `gradients` where a
    # hand-written gradient is faster, as ReLU does; tests compare it with these definitions.

    def batch_context(
        self,
        params: Params,
        batch: Batch,
        hyper: HyperArrays,
        objective: Objective,
        context: BatchContext,
    ) -> BatchContext:
        """Return the context with values computed from the tokens of all devices."""
        return context

    def loss(
        self,
        params: Params,
        x: Float[Array, "tokens d_model"],
        hyper: HyperArrays,
        objective: Objective,
        context: BatchContext,
        is_token: Float[Array, " tokens"] | None = None,
    ) -> tuple[Float[Array, ""], BatchSums]:
        """Return the loss summed over tokens, and its parts (without gradients)."""
        rounded = {name: objective.round_factor(p) for name, p in params.items()}
        weights = jax.tree.map(lambda p: p.astype(jnp.float32), rounded)
        features = self.encode(weights, x)
        error = self.decode(weights, features) - x
        penalties = self.penalty(params, features)
        active = features > 0
        if is_token is not None:
            error = error * is_token[:, None]
            penalties = penalties * is_token
            active = active & (is_token[:, None] > 0)
        residual = jnp.square(error).sum()
        penalty = penalties.sum()
        total = objective.error_weight(x.shape[-1]) * residual
        total += self.penalty_weight(hyper) * penalty
        return total, BatchSums({}, residual, penalty, active.sum(0, dtype=jnp.int32))

    def batch_sums(
        self,
        params: Params,
        batch: Batch,
        hyper: HyperArrays,
        objective: Objective,
        context: BatchContext,
    ) -> Any:
        """Return sums over this device's tokens, one tile after the other, by autodiff."""

        def add_tile(sums: BatchSums, tile: Batch) -> tuple[BatchSums, None]:
            gradient = jax.grad(self.loss, has_aux=True)
            gradients, parts = gradient(params, tile.x, hyper, objective, context, tile.is_token)
            return jax.tree.map(jnp.add, sums, parts._replace(gradients=gradients)), None

        d_sae = params["W_dec"].shape[-2]
        zeros = jax.tree.map(jnp.zeros_like, params)
        start = BatchSums(
            gradients=zeros,
            residual=jnp.zeros(()),
            penalty=jnp.zeros(()),
            active=jnp.zeros(d_sae, jnp.int32),
        )
        return jax.lax.scan(add_tile, start, batch)[0]

    def gradients(
        self, params: Params, sums: Any, n_tokens: int, hyper: HyperArrays, objective: Objective
    ) -> tuple[Params, BatchMetrics]:
        """Return the gradient of the mean loss and the metrics, from sums over all tokens."""
        gradients = jax.tree.map(lambda g: g / n_tokens, sums.gradients)
        d_model = params["b_dec"].shape[-1]
        mse = objective.mse_factor(d_model) * sums.residual / n_tokens
        penalty = sums.penalty / n_tokens
        metrics = BatchMetrics(
            loss=objective.recon_weight * mse + self.penalty_weight(hyper) * penalty,
            mse=mse,
            l1=penalty,
            l0=sums.active.astype(jnp.float32).sum() / n_tokens,
            residual=sums.residual,
            active=sums.active,
        )
        return gradients, metrics

    def finish_update(self, params: Params, context: BatchContext) -> Params:
        """Return the parameters after the optimizer's update, such as with a decoder of norm 1."""
        return params
