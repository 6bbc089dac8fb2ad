"""One pass over the test store: for every feature its moments and strongest tokens.

The strongest tokens of a feature are those with its largest activations, at most one of each
sequence (one channel of a window, or a whole window), since neighbouring tokens of one burst would
all be the same example. Their shares in events are statistics of the feature, so that there is no
limit for a recording, unlike for the examples in the report. CLS tokens, which have no samples, are
left out, and so are recordings without any labelled event, whose events nobody may have labelled.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from minsae_jax.estimates import Estimate
from minsae_jax.evaluation.bootstrap import SHARE, Resamples, estimate
from minsae_jax.evaluation.dataset import Dataset
from minsae_jax.evaluation.ranking import auc
from minsae_jax.monitor import progress
from minsae_jax.parallel.mesh import fetch_late, on_cpu
from minsae_jax.sae.kinds import Params, SAEKind
from minsae_jax.sae.member import SparseAutoencoder
from minsae_jax.sae.padding import pad_rows

TOP = 50  # strongest tokens of a feature
BATCH_VALUES = 2**23  # features of a batch, which bounds the memory
# On CPU: malloc reuses memory of this size, while new pages of larger arrays take twice as long as
# the computation.
CPU_BATCH_VALUES = 2**21
MAX_SEQUENCES = 64  # of a batch, and between two merges of the strongest tokens


class TopTokens(NamedTuple):
    """The strongest tokens of every feature, by decreasing activation; 0 where there are fewer."""

    # Rounded down to 16 bits of precision or so
    value: Float[Array, "d_sae top"]
    sequence: Int[Array, "d_sae top"]
    # Index into the tokens with samples
    token: Int[Array, "d_sae top"]


class BatchNumbers(NamedTuple):
    """Numbers of one batch and autoencoder that the host adds up."""

    sums: Float[Array | np.ndarray, "3 d_sae"]
    # Activations of the chosen features; None of recordings without labels
    chosen: Float[Array | np.ndarray, "rows n_located chosen"] | None


@dataclass(frozen=True)
class FeatureTokens:
    """One autoencoder's features over all test tokens."""

    # Tokens with each feature active
    active: Float[np.ndarray, " d_sae"]
    # Mean of f_i ‖W_dec,i‖ and of its square over these tokens
    mean: Float[np.ndarray, " d_sae"]
    mean_square: Float[np.ndarray, " d_sae"]
    value: Float[np.ndarray, "d_sae top"]
    sequence: Int[np.ndarray, "d_sae top"]
    token: Int[np.ndarray, "d_sae top"]
    # Activations of the features asked for, at the tokens with samples of labelled recordings
    chosen: Float[np.ndarray, "chosen labelled n_located"]

    @property
    def examples(self) -> Int[np.ndarray, " d_sae"]:
        """The number of strongest tokens of every feature, at most TOP."""
        return (self.value > 0).sum(axis=1)

    def precision(
        self, is_inside: Bool[np.ndarray, "sequences n_located"]
    ) -> Float[np.ndarray, " d_sae"]:
        """Return the share of each feature's strongest tokens that are inside, NaN without any."""
        hits = is_inside[self.sequence, self.token] & (self.value > 0)
        examples = self.examples
        return hits.sum(axis=1) / np.where(examples > 0, examples, np.nan)

    def precision_of(
        self,
        feature: int,
        is_inside: Bool[np.ndarray, "sequences n_located"],
        recording: Int[np.ndarray, " sequences"],
        resamples: Resamples,
    ) -> Estimate:
        """Return one feature's precision; the first resample is the recordings as they are."""
        sequence = self.sequence[feature, : self.examples[feature]]
        hits = is_inside[sequence, self.token[feature, : len(sequence)]]
        of_examples = resamples.weights[:, resamples.unit[recording[sequence]]]
        total = of_examples.sum(axis=1)
        # NaN in resamples without any of the tokens.
        precision = of_examples @ hits / np.where(total > 0, total, np.nan)
        return estimate(precision, resamples.n_units(recording[sequence]), SHARE)


def read_features(
    dataset: Dataset,
    saes: Mapping[str, SparseAutoencoder],
    chosen: Mapping[str, Sequence[int]],
    is_labelled: Bool[np.ndarray, " recordings"],
) -> dict[str, FeatureTokens]:
    """Return the features of several autoencoders, by name, from one pass over a store.

    chosen: features whose activations are returned for all tokens with samples of labelled
    recordings. Memory does not grow with the store otherwise.
    """
    n_sequences = len(dataset.recording)
    n_labelled = int(is_labelled[dataset.recording].sum())
    located = dataset.tokens.located
    passes = {}
    for name, sae in saes.items():
        values = np.empty((len(chosen[name]), n_labelled, len(located)), np.float32)
        passes[name] = _Pass(sae, chosen[name], values)
    largest = max((sae.d_sae for sae in saes.values()), default=1)
    batch_values = CPU_BATCH_VALUES if on_cpu() else BATCH_VALUES
    n_rows = max(1, min(MAX_SEQUENCES, batch_values // (dataset.n_tokens * largest)))
    with progress("read features", n_sequences, "sequences", delay=2.0) as bar:

        def run_batches() -> Iterator[tuple[str, int, BatchNumbers]]:
            for start, x in dataset.batches(n_rows):
                batch = jax.device_put(pad_rows(x, n_rows))
                places = np.array([start, len(x)], np.int32)
                # All sequences of a batch are of one recording.
                are_labelled = bool(is_labelled[dataset.recording[start]])
                for name, one in passes.items():
                    yield name, len(x), one.measure(batch, places, located, are_labelled)
                bar.advance(len(x))

        for name, n_valid, numbers in fetch_late(run_batches()):
            passes[name].add(numbers, n_valid)
    return {name: one.finish() for name, one in passes.items()}


class _Pass:
    """Sums and strongest tokens of one autoencoder so far."""

    def __init__(self, sae: SparseAutoencoder, chosen: Sequence[int], values: np.ndarray):
        self.sae = sae
        self.chosen = np.asarray(chosen, np.int32)
        self.values = values
        self.n_values = 0  # sequences
        self.sums = np.zeros((3, sae.d_sae))
        zeros = jnp.zeros((sae.d_sae, TOP))
        # Two arrays, since each is donated.
        sequence = jnp.zeros((sae.d_sae, TOP), jnp.int32)
        token = jnp.zeros((sae.d_sae, TOP), jnp.int32)
        self.top = TopTokens(zeros, sequence, token)
        # The strongest tokens of batches that are not merged yet
        self.batches: list[TopTokens] = []

    def measure(
        self,
        x: Float[Array, "rows n_tokens d_model"],
        places: Int[np.ndarray, " 2"],
        located: Int[np.ndarray, " n_located"],
        are_labelled: bool,
    ) -> BatchNumbers:
        """Start measuring a batch, and return what `add` takes.

        places: the batch's first sequence, and how many of its rows are sequences.
        """
        with jax.default_matmul_precision("highest"):
            sums, strongest, chosen = measure_batch(
                self.sae.kind, self.sae.params, x, places, located, self.chosen
            )
        if not are_labelled:
            return BatchNumbers(sums, None)
        self.batches.append(strongest)
        if (len(self.batches) + 1) * len(x) > MAX_SEQUENCES:
            self._merge()
        return BatchNumbers(sums, chosen)

    def add(self, numbers: BatchNumbers, n_valid: int) -> None:
        """Add the numbers of a batch of n_valid sequences, on the host."""
        self.sums += numbers.sums
        if numbers.chosen is None:
            return
        by_feature = np.moveaxis(np.asarray(numbers.chosen), -1, 0)
        self.values[:, self.n_values : self.n_values + n_valid] = by_feature[:, :n_valid]
        self.n_values += n_valid

    def _merge(self) -> None:
        # A merge sorts, and takes as long for one sequence as for many.
        self.top = merge_top(self.top, self.batches)
        self.batches = []

    def finish(self) -> FeatureTokens:
        if self.batches:
            self._merge()
        active, total, squares = self.sums
        norms = np.linalg.norm(self.sae.decoder_directions.astype(np.float64), axis=1)
        n = np.maximum(active, 1)
        value, sequence, token = map(np.asarray, self.top)
        mean = norms * total / n
        mean_square = norms**2 * squares / n
        return FeatureTokens(active, mean, mean_square, value, sequence, token, self.values)


@partial(jax.jit, static_argnums=0)
def measure_batch(
    kind: SAEKind,
    params: Params,
    x: Float[Array, "rows n_tokens d_model"],
    places: Int[Array, " 2"],
    located: Int[Array, " n_located"],
    chosen: Int[Array, " chosen"],
) -> tuple[Float[Array, "3 d_sae"], TopTokens, Float[Array, "rows n_located chosen"]]:
    """Return sums over the batch, the strongest token of each sequence, and the chosen features."""
    start, n_valid = places
    n_rows, n_tokens, d_model = x.shape
    is_valid = jnp.arange(n_rows) < n_valid
    features = kind.encode(params, x.reshape(-1, d_model)).reshape(n_rows, n_tokens, -1)
    # Biases can activate features on padding.
    features = jnp.where(is_valid[:, None, None], features, 0)
    # Without the barrier XLA computes the features again for each reduction.
    features = jax.lax.optimization_barrier(features)
    active = (features > 0).sum((0, 1), dtype=jnp.float32)
    sums = jnp.stack([active, features.sum((0, 1)), jnp.square(features).sum((0, 1))])
    # The order of positive floats is that of their bits as integers. With the token in the lowest
    # bits, one maximum finds value and place, which argmax takes several times as long for.
    n_bits = max(n_tokens - 1, 1).bit_length()
    lowest = (1 << n_bits) - 1
    bits = jax.lax.bitcast_convert_type(features, jnp.int32) & ~lowest
    packed = jnp.where(features > 0, bits | jnp.arange(n_tokens)[None, :, None], 0)
    is_located = jnp.zeros(n_tokens, bool).at[located].set(True)
    strongest = jnp.where(is_located[None, :, None], packed, 0).max(axis=1)
    sequence = jnp.broadcast_to((start + jnp.arange(n_rows))[:, None], strongest.shape)
    index_of = jnp.zeros(n_tokens, jnp.int32).at[located].set(jnp.arange(len(located)))
    top = TopTokens(
        jax.lax.bitcast_convert_type(strongest & ~lowest, jnp.float32).T,
        sequence.T,
        index_of[strongest & lowest].T,
    )
    return sums, top, features[:, :, chosen][:, located]


@partial(jax.jit, donate_argnums=0)
def merge_top(top: TopTokens, batches: Sequence[TopTokens]) -> TopTokens:
    """Return the strongest tokens of all, of equally strong ones the first."""
    parts = [top, *batches]
    value = jnp.concatenate([part.value for part in parts], axis=1)
    sequence = jnp.concatenate([part.sequence for part in parts], axis=1)
    token = jnp.concatenate([part.token for part in parts], axis=1)
    value, order = jax.lax.top_k(value, TOP)
    return TopTokens(
        value,
        jnp.take_along_axis(sequence, order, axis=1),
        jnp.take_along_axis(token, order, axis=1),
    )


def token_auc(
    values: Float[np.ndarray, "labelled n_located"],
    is_covered: Bool[np.ndarray, "labelled n_located"],
) -> float:
    """Return the AUC of a feature over tokens: covered by an event or not.

    NaN if all tokens are covered, or no token is.
    """
    if is_covered.all() or not is_covered.any():
        return math.nan
    return float(auc(values.reshape(-1, 1), is_covered.reshape(-1))[0])
