"""One pass over a store: the top examples of every feature, and statistics of its activity.

The top examples are exact: of all tokens of the store the `top` largest activations of a feature,
with at most `per_recording` from one recording, and earlier tokens first if two are equal. The
random examples are a uniform sample of the feature's active tokens.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from minsae_jax.evaluation.dataset import Dataset
from minsae_jax.monitor import progress
from minsae_jax.sae.member import SparseAutoencoder

BATCH_TOKENS = 16_384
COACTIVE_TOKENS = 200_000  # sample for co-activity
MAX_COACTIVE_FEATURES = 8192  # above it, pairs are not counted
EDGES = np.geomspace(1e-4, 1e4, 8 * 8 + 1)  # of the activation histogram


@dataclass(frozen=True)
class Tokens:
    """Up to n tokens of each feature, best first; `token` is -1 if a feature has fewer."""

    sequence: Int[np.ndarray, "d_sae n"]
    token: Int[np.ndarray, "d_sae n"]
    activation: Float[np.ndarray, "d_sae n"]


@dataclass(frozen=True)
class Activity:
    """Activity of every feature over all tokens."""

    n_tokens: int
    top: Tokens
    random: Tokens
    # Number of active tokens
    active: Int[np.ndarray, " d_sae"]
    # Sum of activations
    total: Float[np.ndarray, " d_sae"]
    largest: Float[np.ndarray, " d_sae"]
    # Active tokens by activation between EDGES; the outer bins contain those beyond
    histogram: Int[np.ndarray, "d_sae bins"]
    # Number of active tokens
    by_recording: Int[np.ndarray, "d_sae recordings"]
    # Sum of activations, without tokens over all channels and recordings with shifted columns
    by_channel: Float[np.ndarray, "d_sae n_vars"]
    # Active tokens by position in the sequence; a CLS token is first
    by_token: Int[np.ndarray, "d_sae n_tokens"]
    # All tokens by channel, of the recordings in by_channel
    channel_tokens: Int[np.ndarray, " n_vars"]
    # Sampled tokens with both features active; None with over MAX_COACTIVE_FEATURES features.
    together: Float[np.ndarray, "d_sae d_sae"] | None

    @property
    def density(self) -> Float[np.ndarray, " d_sae"]:
        """Share of tokens with the feature active."""
        return self.active / self.n_tokens

    @property
    def mean(self) -> Float[np.ndarray, " d_sae"]:
        """Mean activation over active tokens."""
        return self.total / np.maximum(self.active, 1)

    def quantiles(self, count: int = 10) -> Tokens:
        """Return one random example from each of `count` equal parts of a feature's activations.

        The lowest part is first, and the example is near the middle of its part. Features with
        under `count` random examples have none.
        """
        is_example = self.random.token >= 0
        n_examples = is_example.sum(axis=1)
        # Missing examples sort last.
        sortable = np.where(is_example, self.random.activation, np.inf)
        order = np.argsort(sortable, axis=1, kind="stable")
        middles = (np.arange(count) + 0.5) / count
        ranks = (middles * n_examples[:, None]).astype(int)
        chosen = np.take_along_axis(order, ranks, axis=1)
        token = np.take_along_axis(self.random.token, chosen, axis=1)
        return Tokens(
            sequence=np.take_along_axis(self.random.sequence, chosen, axis=1),
            token=np.where((n_examples >= count)[:, None], token, -1),
            activation=np.take_along_axis(self.random.activation, chosen, axis=1),
        )


def collect(
    dataset: Dataset,
    sae: SparseAutoencoder,
    top: int = 16,
    per_recording: int = 3,
    random: int = 64,
    seed: int = 0,
) -> Activity:
    """Return the activity of every feature; memory grows with d_sae, not with the store."""
    n_tokens = dataset.n_tokens
    strongest = _StrongestExamples(sae.d_sae, top, per_recording)
    sample = _LargestByFeature(sae.d_sae, random)
    counts = _Counts(dataset, sae.d_sae)
    n_sequences = len(dataset.recording)
    pairs = _PairCounts(sae.d_sae, every=max(1, n_sequences * n_tokens // COACTIVE_TOKENS))
    with progress("find examples", n_sequences, "sequences", delay=2.0) as bar:
        for first, x in dataset.batches(max(1, BATCH_TOKENS // n_tokens)):
            features = np.asarray(sae.encode(x)).reshape(-1, sae.d_sae)
            entries = _find_active(features)
            recording = int(dataset.recording[first])
            strongest.add(entries, first * n_tokens, recording)
            # Each token gets a random key; the active tokens with the largest keys are a
            # uniform sample of all active tokens.
            rng = np.random.default_rng([seed, first])
            keys = rng.random(len(features)).astype(np.float32)
            sample.add(
                entries.feature,
                keys[entries.row],
                first * n_tokens + entries.row,
                activation=entries.value,
            )
            counts.add(features, entries, first, recording)
            pairs.add(features)
            bar.advance(len(x))
    return Activity(
        n_tokens=counts.n_tokens,
        top=strongest.finish().to_tokens(n_tokens),
        random=sample.to_tokens(n_tokens),
        active=counts.by_token.sum(axis=1),
        total=counts.total,
        largest=counts.largest,
        histogram=counts.histogram,
        by_recording=counts.by_recording,
        by_channel=counts.by_channel,
        by_token=counts.by_token,
        channel_tokens=counts.channel_tokens,
        together=pairs.together,
    )


@dataclass(frozen=True)
class _ActiveEntries:
    """The entries of a batch's features [rows, d_sae] that are not 0; a row is a token."""

    row: Int[np.ndarray, " n"]
    feature: Int[np.ndarray, " n"]
    value: Float[np.ndarray, " n"]


def _find_active(features: Float[np.ndarray, "rows d_sae"]) -> _ActiveEntries:
    flat = np.flatnonzero(features)
    row, feature = np.divmod(flat, features.shape[1])
    return _ActiveEntries(row, feature, features.ravel()[flat])


class _Counts:
    """Counts and sums of active entries, with the names of Activity's fields."""

    def __init__(self, dataset: Dataset, d_sae: int):
        self.dataset = dataset
        self.d_sae = d_sae
        n_vars = dataset.n_vars
        self.n_tokens = 0
        self.total = np.zeros(d_sae)
        self.largest = np.zeros(d_sae, np.float32)
        self.histogram = np.zeros((d_sae, len(EDGES) - 1), np.int64)
        self.by_recording = np.zeros((d_sae, len(dataset.recordings)), np.int64)
        self.by_channel = np.zeros((d_sae, n_vars))
        self.by_token = np.zeros((d_sae, dataset.n_tokens), np.int64)
        self.channel_tokens = np.zeros(n_vars, np.int64)

    def add(
        self,
        features: Float[np.ndarray, "rows d_sae"],
        entries: _ActiveEntries,
        first: int,
        recording: int,
    ) -> None:
        """Add a batch that begins with sequence `first`, all of one recording."""
        n_tokens = self.dataset.n_tokens
        by_token = self._count(entries, entries.row % n_tokens, n_tokens)
        self.n_tokens += len(features)
        self.by_token += by_token
        self.by_recording[:, recording] += by_token.sum(axis=1)
        self.total += np.bincount(entries.feature, entries.value, self.d_sae)
        self.largest = np.maximum(self.largest, features.max(axis=0))
        n_bins = len(EDGES) - 1
        bins = np.searchsorted(EDGES, entries.value, "right") - 1
        self.histogram += self._count(entries, np.clip(bins, 0, n_bins - 1), n_bins)
        if self.dataset.has_channels and not self.dataset.shifted[recording]:
            self._count_channels(entries, first, len(features) // n_tokens)

    def _count_channels(self, entries: _ActiveEntries, first: int, n_sequences: int) -> None:
        n_tokens = self.dataset.n_tokens
        n_vars = len(self.channel_tokens)
        sequence = np.repeat(np.arange(first, first + n_sequences), n_tokens)
        token = np.tile(np.arange(n_tokens), n_sequences)
        # Of every row; moved up by one, so that the tokens over all channels have the index 0.
        channel = self.dataset.channels_of(sequence, token) + 1
        activation = self._count(entries, channel[entries.row], n_vars + 1, entries.value)
        self.by_channel += activation[:, 1:]
        self.channel_tokens += np.bincount(channel, minlength=n_vars + 1)[1:]

    def _count(
        self,
        entries: _ActiveEntries,
        category: Int[np.ndarray, " n"],
        n_categories: int,
        weights: Float[np.ndarray, " n"] | None = None,
    ) -> np.ndarray:
        """Return the entries, or the sum of their weights, by feature and category."""
        # One bincount over pairs of feature and category; np.add.at is slower.
        index = entries.feature * n_categories + category
        counts = np.bincount(index, weights, self.d_sae * n_categories)
        return counts.reshape(self.d_sae, n_categories)


class _PairCounts:
    """Counts how often two features are active together, on every n-th batch."""

    def __init__(self, d_sae: int, every: int):
        self.every = every
        self.n_batches = 0
        self.together = None
        if d_sae <= MAX_COACTIVE_FEATURES:
            self.together = np.zeros((d_sae, d_sae), np.float32)

    def add(
        self,
        features: Float[np.ndarray, "rows d_sae"],
    ) -> None:
        if self.together is not None and self.n_batches % self.every == 0:
            self.together += np.asarray(_count_pairs(jnp.asarray(features)))
        self.n_batches += 1


@jax.jit
def _count_pairs(features: Float[Array, "rows d_sae"]) -> Float[Array, "d_sae d_sae"]:
    is_active = (features > 0).astype(jnp.float32)
    return is_active.T @ is_active


class _LargestByFeature:
    """The `size` entries of each feature with the largest keys; the earlier position if equal.

    Entries are flat arrays sorted by feature, then by falling key.
    """

    def __init__(self, d_sae: int, size: int):
        self.d_sae = d_sae
        self.size = size
        self.clear()

    def clear(self) -> None:
        self.feature = np.zeros(0, np.int64)
        self.position = np.zeros(0, np.int64)
        self.key = np.zeros(0, np.float32)
        self.activation = np.zeros(0, np.float32)
        # The smallest key of each feature that is full. Keys that do not exceed it are dropped
        # before anything is sorted, which is nearly all of them after a few batches.
        self.threshold = np.full(self.d_sae, -np.inf)

    def add(
        self,
        feature: Int[np.ndarray, " n"],
        key: Float[np.ndarray, " n"],
        position: Int[np.ndarray, " n"],
        activation: Float[np.ndarray, " n"] | None = None,
        above: Float[np.ndarray, " d_sae"] | None = None,
    ) -> None:
        """Add entries; positions are later than all earlier ones.

        activation: stored with each entry, its key unless passed. above: for each feature, a
        second threshold that keys must exceed.
        """
        threshold = self.threshold if above is None else np.maximum(self.threshold, above)
        # Not >=: of equal keys the earlier position wins, and that one is already here.
        is_candidate = key > threshold[feature]
        if not is_candidate.any():
            return
        activation = key if activation is None else activation
        feature = np.concatenate([self.feature, feature[is_candidate]])
        key = np.concatenate([self.key, key[is_candidate]])
        position = np.concatenate([self.position, position[is_candidate]])
        activation = np.concatenate([self.activation, activation[is_candidate]])

        # By feature, then falling key, then position: lexsort takes the main key last.
        order = np.lexsort((position, -key, feature))
        rank = self._ranks(feature[order])
        order = order[rank < self.size]
        self.feature = feature[order]
        self.key = key[order]
        self.position = position[order]
        self.activation = activation[order]
        is_last = self._ranks(self.feature) == self.size - 1
        self.threshold[self.feature[is_last]] = self.key[is_last]

    def _ranks(
        self,
        feature: Int[np.ndarray, " n"],
    ) -> Int[np.ndarray, " n"]:
        """Return each entry's place among those of its feature; `feature` is sorted."""
        starts = np.searchsorted(feature, np.arange(self.d_sae))
        return np.arange(len(feature)) - starts[feature]

    def to_tokens(self, n_tokens: int) -> Tokens:
        """Return a table; a position is sequence * n_tokens + token."""
        rank = self._ranks(self.feature)
        position = np.full((self.d_sae, self.size), -1, np.int64)
        position[self.feature, rank] = self.position
        activation = np.zeros((self.d_sae, self.size), np.float32)
        activation[self.feature, rank] = self.activation
        token = np.where(position < 0, -1, position % n_tokens)
        return Tokens(position // n_tokens, token, activation)


class _StrongestExamples:
    """The largest activations of each feature, at most per_recording of them from one recording.

    Batches come recording by recording. The best of the current recording are merged into the best
    of all once the recording ends.
    """

    def __init__(self, d_sae: int, top: int, per_recording: int):
        self.best = _LargestByFeature(d_sae, top)
        self.in_recording = _LargestByFeature(d_sae, per_recording)
        self.recording = -1

    def add(self, entries: _ActiveEntries, first_position: int, recording: int) -> None:
        if recording != self.recording:
            self._merge()
            self.recording = recording
        # Entries that cannot enter the best of all are dropped here already.
        self.in_recording.add(
            entries.feature,
            entries.value,
            first_position + entries.row,
            above=self.best.threshold,
        )

    def _merge(self) -> None:
        current = self.in_recording
        self.best.add(current.feature, current.key, current.position)
        current.clear()

    def finish(self) -> _LargestByFeature:
        self._merge()
        return self.best
