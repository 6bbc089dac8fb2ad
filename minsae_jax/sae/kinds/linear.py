"""Kinds that are an activation between two linear maps, with the gradient of the maps by hand.

    pre = x W_enc + b_enc,    features = activate(pre),    x̂ = features W_dec + b_dec
    loss = mse + penalties of the kind + AuxK

A kind says what `activate` is, and autodiff gives its gradient, which is elementwise and cheap. The
five matrix products of a step are written out, so that features are computed once, [d_sae, tile],
and every product is one of two contiguous matrices (on CPU a quarter faster than autodiff of x̂).
"""

from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, Num

from minsae_jax.parallel.mesh import materialize, on_cpu
from minsae_jax.sae.kinds.auxk import aux_sums
from minsae_jax.sae.kinds.base import (
    Batch,
    BatchContext,
    BatchMetrics,
    BatchSums,
    HyperArrays,
    Objective,
    Params,
    SAEKind,
)
from minsae_jax.sae.kinds.products import (
    Weights,
    column_sums,
    count_active,
    encoder_gradient,
    norm_gradient,
    pre_activations,
    product,
    project_back,
    round_weights,
    store_features,
    zero_gradients,
)

Vectors = dict[str, Array]  # name -> [d_sae]


class Activated(NamedTuple):
    """Features of a tile, and the terms of the loss that depend on them, before they are summed."""

    features: Float[Array, "d_sae tile"]
    penalty: Float[Array, "d_sae tile"] | None = None  # without its weight λ
    other: Float[Array, "d_sae tile"] | None = None  # further loss, with its weight


class BackProjected(NamedTuple):
    """Gradients of half the squared error, summed over the prefixes that contain a feature."""

    features: Num[Array, "d_sae tile"]  # W_dec error
    w_dec: Float[Array, "d_sae d_model"]  # features errorᵀ
    error_sum: Float[Array, "d_model tile"]  # over all prefixes


def _activate_selected(features: Float[Array, "d_sae tile"], vectors: Vectors) -> Activated:
    """Return the features of a kind that `selects` from these features themselves."""
    return Activated(jax.nn.relu(features))


def _by_token(
    terms: Float[Array, "d_sae tile"] | None, mask: Float[Array, " tile"]
) -> Float[Array, " tile"]:
    """Return the sum of a term over the features of each token, 0 for padding."""
    return jnp.zeros_like(mask) if terms is None else column_sums(terms) * mask


def _total(
    terms: Float[Array, "d_sae tile"] | None, mask: Float[Array, " tile"]
) -> Float[Array, ""]:
    """Return the sum of a term over features and tokens."""
    if terms is None or on_cpu():
        return _by_token(terms, mask).sum()
    # Over tokens first, as the other sums of the pass that this is part of.
    return materialize((terms * mask[None]).sum(1)).sum()


def _gradient_of_sum(
    terms: Float[Array, "d_sae tile"] | None, weight: Float[Array, " tile"]
) -> Float[Array, "d_sae tile"] | None:
    """Return the derivative of a weighted sum over features and tokens by each of its terms."""
    return None if terms is None else jnp.broadcast_to(weight[None], terms.shape)


class LinearSums(NamedTuple):
    """Sums over tokens, which may be added over tiles and devices."""

    gradients: Params  # of loss * tokens, with W_enc transposed
    vectors: Vectors  # gradients of loss * tokens
    penalty_vectors: Vectors  # gradients of the penalty, if its weight depends on the whole batch
    reconstruction: Float[Array, ""]  # Σ‖x̂ - x‖², for Matryoshka the mean over its prefixes
    residual: Float[Array, ""]  # Σ‖x̂ - x‖²
    penalty: Float[Array, ""]
    other: Float[Array, ""]
    active: Int[Array, " d_sae"]  # tokens on which each feature is active


class LinearSAE(SAEKind):
    """Base of the kinds that are an activation between two linear maps."""

    # Whether decoder rows have L2 norm 1 after every step.
    unit_decoder: ClassVar[bool] = False
    # Whether a feature is its pre-activation where that reaches a threshold, which is above 0 and
    # not differentiated, and there is no penalty.
    selects: ClassVar[bool] = False

    @property
    def weighs_batch_penalty(self) -> bool:
        """Whether the penalty's weight depends on sums over the batch."""
        return False

    def activate(
        self,
        pre: Float[Array, "d_sae tile"],
        vectors: Vectors,
        hyper: HyperArrays,
        context: BatchContext,
    ) -> Activated:
        """Return the features of pre-activations in training, and the penalties."""
        raise NotImplementedError

    def vectors(self, params: Params) -> Vectors:
        """Return the vectors that `activate` differentiates by.

        They are parameters, or "norm", the L2 norms of the decoder's rows.
        """
        return {}

    def prefixes(self, d_sae: int) -> tuple[int, ...]:
        """Return how many of the first features reconstruct x on their own; the last is d_sae."""
        return (d_sae,)

    def init_tied(
        self, key: Key[Array, ""], d_model: int, d_sae: int, decoder_norm: float
    ) -> Params:
        norm = 1.0 if self.unit_decoder else decoder_norm
        return super().init_tied(key, d_model, d_sae, norm)

    def complete_init(self, params: Params, median: Float[Array, " d_model"] | None) -> Params:
        if median is None:
            return params
        # The literature encodes x - b_dec; at the start this bias does the same.
        return params | {"b_dec": median, "b_enc": -(median @ params["W_enc"])}

    def pre_activations(
        self, params: Params, x: Float[Array, "*tokens d_model"]
    ) -> Float[Array, "*tokens d_sae"]:
        pre = x @ params["W_enc"]
        return pre + jnp.broadcast_to(params["b_enc"], pre.shape)

    def loss(
        self,
        params: Params,
        x: Float[Array, "tokens d_model"],
        hyper: HyperArrays,
        objective: Objective,
        context: BatchContext,
        is_token: Float[Array, " tokens"] | None = None,
    ) -> tuple[Float[Array, ""], BatchSums]:
        """Return the loss summed over tokens, without AuxK, and its parts (without gradients)."""
        mask = jnp.ones(len(x)) if is_token is None else is_token
        pre = self.pre_activations(params, x).T
        activated = self.activate(pre, self.vectors(params), hyper, context)
        features = activated.features.T
        d_sae, d_model = params["W_dec"].shape
        errors = []
        for end in self.prefixes(d_sae):
            x_hat = features[:, :end] @ params["W_dec"][:end] + params["b_dec"][None]
            errors.append(jnp.square(x_hat - x).sum(1) * mask)
        loss = objective.error_weight(d_model) * jnp.stack(errors).mean(0)
        penalty = _by_token(activated.penalty, mask)
        loss += self.penalty_weight(hyper) * penalty + _by_token(activated.other, mask)
        active = (features * mask[:, None] > 0).sum(0, dtype=jnp.int32)
        return loss.sum(), BatchSums({}, errors[-1].sum(), penalty.sum(), active)

    def batch_sums(
        self,
        params: Params,
        batch: Batch,
        hyper: HyperArrays,
        objective: Objective,
        context: BatchContext,
    ) -> LinearSums:
        weights = round_weights(params, objective)
        vectors = self.vectors(params)

        def add_tile(
            sums: LinearSums, tile_and_pre: tuple[Batch, Array | None]
        ) -> tuple[LinearSums, Array]:
            tile, pre = tile_and_pre
            tile_context = context._replace(pre=pre)
            return self.add_tile(sums, weights, vectors, tile, hyper, objective, tile_context)

        zero = jnp.zeros(())
        d_sae = params["W_dec"].shape[0]
        zero_vectors = jax.tree.map(jnp.zeros_like, vectors)
        start = LinearSums(
            gradients=zero_gradients(params),
            vectors=zero_vectors,
            penalty_vectors=zero_vectors if self.weighs_batch_penalty else {},
            reconstruction=zero,
            residual=zero,
            penalty=zero,
            other=zero,
            active=jnp.zeros(d_sae, jnp.int32),
        )
        sums, errors = jax.lax.scan(add_tile, start, (batch, context.pre))
        gradients, aux = aux_sums(params, weights, batch, errors, objective, context)
        return sums._replace(
            gradients=jax.tree.map(jnp.add, sums.gradients, gradients), other=sums.other + aux
        )

    def add_tile(
        self,
        sums: LinearSums,
        weights: Weights,
        vectors: Vectors,
        tile: Batch,
        hyper: HyperArrays,
        objective: Objective,
        context: BatchContext,
    ) -> tuple[LinearSums, Float[Array, "d_model tile"]]:
        """Return the sums with those of one tile added, and the tile's x̂ - x.

        context.pre: of this tile, if known. A suffix says the layout: F features, B tokens of the
        tile, D d_model.
        """
        round_factor = objective.round_factor
        x_BxD = round_factor(tile.x)
        mask = jnp.ones(len(x_BxD)) if tile.is_token is None else tile.is_token

        def activate(pre_FxB: Array, vectors: Vectors) -> Activated:
            return self.activate(pre_FxB, vectors, hyper, context)

        pre_FxB = context.pre
        if pre_FxB is None:
            pre_FxB = pre_activations(weights, tile.x, objective)
        activated, pull_back = jax.vjp(activate, pre_FxB, vectors)
        f_FxB = tile.masked(activated.features)
        stored_f_FxB = store_features(f_FxB, objective)
        rounded_f_FxB = round_factor(stored_f_FxB)

        errors = self._errors(weights, tile, rounded_f_FxB)
        back = self._project_back(weights, rounded_f_FxB, errors, objective)
        back_FxB = back.features
        if not on_cpu():
            # One pass over two arrays gives all that follows: it activates once more instead of
            # reading the values that autodiff would store.
            source_FxB = stored_f_FxB if self.selects else pre_FxB
            source_FxB, back_FxB = materialize((source_FxB, back_FxB))
            again = _activate_selected if self.selects else activate
            activated, pull_back = jax.vjp(again, source_FxB.astype(jnp.float32), vectors)
            f_FxB = tile.masked(activated.features)
        # dloss/dx̂ = error_factor * error, for each prefix
        error_factor = 2 * objective.error_weight(x_BxD.shape[1]) / len(errors)
        f_gradient_FxB = error_factor * back_FxB.astype(jnp.float32)
        gradient = Activated(
            f_gradient_FxB,
            penalty=_gradient_of_sum(activated.penalty, self.penalty_weight(hyper) * mask),
            other=_gradient_of_sum(activated.other, mask),
        )
        pre_gradient_FxB, vector_gradients = pull_back(gradient)
        penalty_vectors = {}
        if self.weighs_batch_penalty:
            of_penalty = Activated(
                jnp.zeros_like(f_FxB),
                penalty=_gradient_of_sum(activated.penalty, mask),
                other=_gradient_of_sum(activated.other, jnp.zeros_like(mask)),
            )
            _, penalty_vectors = pull_back(of_penalty)
        gradients = {
            "W_enc": encoder_gradient(round_factor(pre_gradient_FxB), x_BxD),
            "b_enc": pre_gradient_FxB.sum(1),
            "W_dec": error_factor * back.w_dec,
            "b_dec": error_factor * back.error_sum.sum(1),
        }
        squares = [jnp.square(error).sum() for error in errors]
        tile_sums = LinearSums(
            gradients=gradients,
            vectors=vector_gradients,
            penalty_vectors=penalty_vectors,
            reconstruction=jnp.stack(squares).mean(),
            residual=squares[-1],
            penalty=_total(activated.penalty, mask),
            other=_total(activated.other, mask),
            active=count_active(f_FxB),
        )
        return jax.tree.map(jnp.add, sums, tile_sums), errors[-1]

    def _segments(self, d_sae: int) -> list[slice]:
        """Return the features by which each prefix is longer than the one before it."""
        ends = self.prefixes(d_sae)
        starts = (0, *ends[:-1])
        return [slice(start, end) for start, end in zip(starts, ends, strict=True)]

    def _errors(
        self, weights: Weights, tile: Batch, features: Num[Array, "d_sae tile"]
    ) -> list[Float[Array, "d_model tile"]]:
        """Return x̂ - x for each prefix, 0 for padding. features: rounded."""
        x_hat_DxB = weights.b_dec[:, None]
        errors = []
        for segment in self._segments(len(features)):
            part = materialize(product(weights.w_dec_T[:, segment], features[segment]))
            x_hat_DxB = x_hat_DxB + part
            errors.append(tile.masked(x_hat_DxB - tile.x.T))
        return errors

    def _project_back(
        self,
        weights: Weights,
        features: Num[Array, "d_sae tile"],
        errors: list[Float[Array, "d_model tile"]],
        objective: Objective,
    ) -> BackProjected:
        """Project the errors of all prefixes back to the features. features: rounded."""
        error_sum_DxB = jnp.zeros_like(errors[-1])
        of_features = []
        of_w_dec = []
        segments = self._segments(len(features))
        # Features of a segment are in its own prefix and in all longer ones.
        for segment, error_DxB in zip(reversed(segments), reversed(errors), strict=True):
            error_sum_DxB = error_sum_DxB + error_DxB
            rounded_error_DxB = objective.round_factor(error_sum_DxB)
            of_features.append(project_back(weights.w_dec[segment], rounded_error_DxB))
            of_w_dec.append(product(features[segment], rounded_error_DxB.T))
        return BackProjected(
            features=jnp.concatenate(of_features[::-1]),
            w_dec=jnp.concatenate(of_w_dec[::-1]),
            error_sum=error_sum_DxB,
        )

    def gradients(
        self,
        params: Params,
        sums: LinearSums,
        n_tokens: int,
        hyper: HyperArrays,
        objective: Objective,
    ) -> tuple[Params, BatchMetrics]:
        w_dec = params["W_dec"]
        of_maps, metrics = super().gradients(params, sums, n_tokens, hyper, objective)
        gradients = {name: jnp.zeros_like(p) for name, p in params.items()}
        gradients |= of_maps | {"W_enc": of_maps["W_enc"].T}
        vectors = {name: a / n_tokens for name, a in sums.vectors.items()}
        batch_loss, weight = self.batch_penalty(metrics.l1, hyper, w_dec.shape[1])
        for name, gradient in sums.penalty_vectors.items():
            vectors[name] += weight * (gradient / n_tokens)
        gradients |= {name: vectors[name] for name in vectors.keys() & params.keys()}
        if "norm" in vectors:
            gradients["W_dec"] += vectors["norm"][:, None] * norm_gradient(w_dec)
        if self.unit_decoder:
            # Rows stay on the unit sphere, so only the part along it counts.
            along = (gradients["W_dec"] * w_dec).sum(1, keepdims=True)
            gradients["W_dec"] -= along * w_dec

        loss = objective.error_weight(w_dec.shape[1]) * (sums.reconstruction / n_tokens)
        loss += sums.other / n_tokens
        loss += self.penalty_weight(hyper) * metrics.l1 + batch_loss
        return gradients, metrics._replace(loss=loss)

    def batch_penalty(
        self, mean_penalty: Float[Array, ""], hyper: HyperArrays, d_model: int
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Return a loss of the batch's mean penalty, and its derivative by the mean penalty."""
        return jnp.zeros(()), jnp.zeros(())

    def finish_update(self, params: Params, context: BatchContext) -> Params:
        if not self.unit_decoder:
            return params
        norms = jnp.linalg.norm(params["W_dec"], axis=1, keepdims=True)
        return params | {"W_dec": params["W_dec"] / norms}

    def normalize_decoder(self, params: Params) -> Params:
        if not self.unit_decoder:
            return params
        w_dec = params["W_dec"]
        norms = jnp.linalg.norm(w_dec, axis=1, keepdims=True)
        # The feature of a row of zeros becomes 0, so that any direction leaves x̂ as it is.
        any_direction = w_dec.shape[1] ** -0.5
        return params | {
            "W_enc": params["W_enc"] * norms.T,
            "b_enc": params["b_enc"] * norms[:, 0],
            "W_dec": jnp.where(norms > 0, w_dec / norms, any_direction),
        }
