"""One pass over a store: the top examples of every feature, and statistics of its activity.

The top examples are the tokens with the largest activations of a feature that do not show the same
seconds, see `StrongestExamples`, and at most `per_recording` of one recording, so that several
recordings are shown. They are exact, and earlier tokens come first if two are equal. The random
examples are a uniform sample of the feature's active tokens.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import csr_array

from minsae_jax.evaluation.dataset import Dataset
from minsae_jax.monitor import progress
from minsae_jax.report.entries import EDGES, ActiveEntries, active_entries
from minsae_jax.report.selection import LargestByFeature, StrongestExamples
from minsae_jax.sae.member import SparseAutoencoder

BATCH_TOKENS = 8192
BATCH_FEATURES = 1 << 25  # 128 MB of features
N_QUANTILES = 10  # parts of a feature's activations with an example each
COACTIVE_TOKENS = 65_536  # sample for co-activity
COACTIVE_PAIRS = 100_000_000  # at most, of active features of the sampled tokens


@dataclass(frozen=True)
class Tokens:
    """Up to n tokens of each feature, best first; `token` is -1 if a feature has fewer."""

    sequence: Int[np.ndarray, "d_sae n"]
    token: Int[np.ndarray, "d_sae n"]
    activation: Float[np.ndarray, "d_sae n"]

    @property
    def n(self) -> int:
        return self.token.shape[1]


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
    # Sampled tokens with both features active [d_sae, d_sae]
    together: csr_array

    @property
    def density(self) -> Float[np.ndarray, " d_sae"]:
        """Share of tokens with the feature active."""
        return self.active / self.n_tokens

    @property
    def mean(self) -> Float[np.ndarray, " d_sae"]:
        """Mean activation over active tokens."""
        return self.total / np.maximum(self.active, 1)

    def quantiles(self) -> Tokens:
        """Return one random example from each tenth of a feature's activations.

        The lowest tenth is first, and the example is near the middle of its tenth. Features with
        under N_QUANTILES random examples have none.
        """
        is_example = self.random.token >= 0
        n_examples = is_example.sum(axis=1)
        # Missing examples sort last.
        sortable = np.where(is_example, self.random.activation, np.inf)
        order = np.argsort(sortable, axis=1, kind="stable")
        middles = (np.arange(N_QUANTILES) + 0.5) / N_QUANTILES
        ranks = (middles * n_examples[:, None]).astype(int)
        chosen = np.take_along_axis(order, ranks, axis=1)
        token = np.take_along_axis(self.random.token, chosen, axis=1)
        return Tokens(
            sequence=np.take_along_axis(self.random.sequence, chosen, axis=1),
            token=np.where((n_examples >= N_QUANTILES)[:, None], token, -1),
            activation=np.take_along_axis(self.random.activation, chosen, axis=1),
        )


def collect(
    dataset: Dataset,
    sae: SparseAutoencoder,
    top: int = 16,
    per_recording: int = 3,
    random: int = 64,
    seed: int = 0,
    n_samples: int = 0,
) -> Activity:
    """Return the activity of every feature.

    n_samples: of EEG that is shown around an example, see `shown_samples`. Memory grows with d_sae,
    and by 4 bytes for each feature and recording.
    """
    n_tokens = dataset.n_tokens
    strongest = StrongestExamples(dataset, sae.d_sae, top, per_recording, n_samples)
    sample = LargestByFeature(sae.d_sae, random)
    counts = _Counts(dataset, sae.d_sae)
    n_sequences = len(dataset.recording)
    at_once = min(max(1, batch_tokens(sae) // n_tokens), n_sequences)
    pairs = _PairSample(n_sequences * n_tokens, n_tokens)
    with progress("find examples", n_sequences, "sequences", delay=2.0) as bar:
        for first in range(0, n_sequences, at_once):
            x = dataset.read(first, first + at_once)
            entries = active_entries(sae, x, at_once)
            first_position = first * n_tokens
            recording = dataset.recording[first : first + at_once]
            strongest.add(first_position, np.repeat(recording, n_tokens), entries)
            # Each token gets a random key; the active tokens with the largest keys are a
            # uniform sample of all active tokens.
            keys = _random_keys(seed, first_position, len(x) * n_tokens)
            sample.add(
                entries.feature,
                keys[entries.row],
                first_position + entries.row.astype(np.int64),
                entries.value,
            )
            counts.add(first, len(x), entries)
            pairs.add(first_position, entries)
            bar.advance(len(x))
    return Activity(
        n_tokens=counts.n_tokens,
        top=_to_tokens(strongest.finish(), n_tokens),
        random=_to_tokens(sample, n_tokens),
        active=counts.by_token.sum(axis=1),
        total=counts.total,
        largest=counts.largest,
        histogram=counts.histogram,
        by_recording=counts.by_recording,
        by_channel=counts.by_channel,
        by_token=counts.by_token,
        channel_tokens=counts.channel_tokens,
        together=pairs.count(sae.d_sae),
    )


def batch_tokens(sae: SparseAutoencoder) -> int:
    """Return the number of tokens to encode at once, so that their features fit in memory."""
    return max(1, min(BATCH_TOKENS, BATCH_FEATURES // sae.d_sae))


def _random_keys(seed: int, first_position: int, count: int) -> Float[np.ndarray, " count"]:
    """Return a random number for each token, which does not depend on the batches."""
    generator = np.random.PCG64(seed).advance(first_position)
    return np.random.Generator(generator).random(count)


def _to_tokens(selected: LargestByFeature, n_tokens: int) -> Tokens:
    """Return sequence and token of positions, which are sequence * n_tokens + token."""
    position, activation = selected.to_table()
    token = np.where(position < 0, -1, position % n_tokens)
    return Tokens(position // n_tokens, token, activation)


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
        self.by_recording = np.zeros((d_sae, len(dataset.recordings)), np.int32)
        self.by_channel = np.zeros((d_sae, n_vars))
        self.by_token = np.zeros((d_sae, dataset.n_tokens), np.int64)
        self.channel_tokens = np.zeros(n_vars, np.int64)

    def add(self, first_sequence: int, n_sequences: int, entries: ActiveEntries) -> None:
        """Add a batch of sequences."""
        n_tokens = self.dataset.n_tokens
        sequences = np.arange(first_sequence, first_sequence + n_sequences)
        # Of every row, which is a token.
        sequence = np.repeat(sequences, n_tokens)
        token = np.tile(np.arange(n_tokens), n_sequences)
        recording = self.dataset.recording[sequence]
        self.n_tokens += len(token)
        _add(self.by_token, entries.feature, token[entries.row])
        self.total += np.bincount(entries.feature, entries.value, self.d_sae)
        np.maximum.at(self.largest, entries.feature, entries.value)
        _add(self.histogram, entries.feature, entries.histogram_bin)
        # Sequences are in the order of the recordings.
        first = int(recording[0])
        stop = int(recording[-1]) + 1
        by_recording = np.zeros((self.d_sae, stop - first), np.int32)
        _add(by_recording, entries.feature, (recording - first)[entries.row])
        self.by_recording[:, first:stop] += by_recording
        if self.dataset.has_channels:
            channel = self.dataset.channels_of(sequence, token)
            channel = np.where(self.dataset.shifted[recording], -1, channel)
            n_vars = len(self.channel_tokens)
            self.channel_tokens += np.bincount(channel[channel >= 0], minlength=n_vars)
            of_entry = channel[entries.row]
            has_channel = np.flatnonzero(of_entry >= 0)
            feature = entries.feature[has_channel]
            _add(self.by_channel, feature, of_entry[has_channel], entries.value[has_channel])


def _add(
    table: np.ndarray,
    feature: Int[np.ndarray, " n"],
    category: Int[np.ndarray, " n"],
    weights: Float[np.ndarray, " n"] | None = None,
) -> None:
    """Add entries, or their weights, to a table [d_sae, categories]."""
    flat = table.reshape(-1)
    index = feature.astype(np.int64) * table.shape[1] + category
    # bincount is faster for each entry, but returns a whole table.
    if len(index) > flat.size // 8:
        flat += np.bincount(index, weights, flat.size).astype(table.dtype, copy=False)
    elif weights is None:
        np.add.at(flat, index, 1)
    else:
        np.add.at(flat, index, weights.astype(table.dtype))


class _PairSample:
    """Every n-th token, to count how often two features are active together.

    n has no common divisor with the tokens of a sequence: otherwise, only some of their positions
    would be in the sample, such as CLS tokens alone.
    """

    def __init__(self, total_tokens: int, n_tokens: int):
        self.n_tokens = n_tokens  # of a sequence
        self.every = _coprime(-(-total_tokens // COACTIVE_TOKENS), n_tokens)
        self.row: list[np.ndarray] = []
        self.feature: list[np.ndarray] = []

    def add(self, first_position: int, entries: ActiveEntries) -> None:
        n_rows = int(entries.row.max(initial=-1)) + 1
        number, remainder = np.divmod(first_position + np.arange(n_rows), self.every)
        is_used = np.flatnonzero((remainder == 0)[entries.row])
        self.row.append(number[entries.row[is_used]])
        self.feature.append(entries.feature[is_used])

    def count(self, d_sae: int) -> csr_array:
        """Return the number of sampled tokens with both features active, for all pairs.

        If the sampled tokens have more than COACTIVE_PAIRS pairs of features, only every n-th of
        them is used.
        """
        row = np.concatenate(self.row)
        feature = np.concatenate(self.feature)
        active = np.bincount(row).astype(np.int64)
        n_pairs = int((active**2).sum())
        step = _coprime(max(1, -(-n_pairs // COACTIVE_PAIRS)), self.n_tokens)
        is_used = row % step == 0
        ones = np.ones(int(is_used.sum()), np.int32)
        shape = (len(active), d_sae)
        is_active = csr_array((ones, (row[is_used], feature[is_used])), shape)
        return csr_array(is_active.T @ is_active)


def _coprime(least: int, n: int) -> int:
    """Return the smallest number from `least` on that has no common divisor with n.

    >>> _coprime(10, 37 * 10)
    11
    """
    number = least
    while math.gcd(number, n) > 1:
        number += 1
    return number
