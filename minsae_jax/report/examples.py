"""One pass over a store: where each feature is most active, and how often, how strongly, on what it is.

The strongest tokens are exact: of all tokens of the store the `top` largest activations of a feature, with at most
`per_recording` from one recording, earlier tokens first where two are equal. The random ones are a uniform sample of
its active tokens.
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
COACTIVE_TOKENS = 200_000
LARGEST_COACTIVE = 8192  # features, whose pairs are counted
EDGES = np.geomspace(1e-4, 1e4, 8 * 8 + 1)  # of the activation histogram


@dataclass(frozen=True)
class Tokens:
    """Some tokens of each feature, best first; `token` is -1 where a feature has no more."""

    sequence: Int[np.ndarray, "d_sae n"]
    token: Int[np.ndarray, "d_sae n"]
    activation: Float[np.ndarray, "d_sae n"]


@dataclass(frozen=True)
class Activity:
    """Of every feature over all tokens."""

    n_tokens: int
    top: Tokens
    random: Tokens
    active: Int[np.ndarray, " d_sae"]  # tokens
    total: Float[np.ndarray, " d_sae"]  # sum of activations
    largest: Float[np.ndarray, " d_sae"]
    histogram: Int[
        np.ndarray, "d_sae bins"
    ]  # of activations between EDGES; what lies beyond is in the outer bins
    by_recording: Int[np.ndarray, "d_sae recordings"]  # active tokens
    by_channel: Float[
        np.ndarray, "d_sae n_vars"
    ]  # sum of activations, without recordings whose columns are shifted
    by_token: Int[
        np.ndarray, "d_sae n_tokens"
    ]  # position in the window; CLS is the first, where there is one
    channel_tokens: Int[np.ndarray, " n_vars"]  # all tokens of each channel, in the same recordings
    together: Float[np.ndarray, "d_sae d_sae"] | None  # tokens of a sample on which both are active

    @property
    def density(self) -> Float[np.ndarray, " d_sae"]:
        return self.active / self.n_tokens

    @property
    def mean(self) -> Float[np.ndarray, " d_sae"]:
        """Of the activation, where there is any."""
        return self.total / np.maximum(self.active, 1)

    def quantiles(self, count: int = 10) -> Tokens:
        """From each of `count` equal parts of a feature's activations, lowest first, a token near its middle: from the
        random sample, where that has so many."""
        n = (self.random.token >= 0).sum(1)
        order = np.argsort(
            np.where(self.random.token >= 0, self.random.activation, np.inf), axis=1, kind="stable"
        )
        places = ((np.arange(count) + 0.5) / count * n[:, None]).astype(int)
        chosen = np.take_along_axis(order, places, axis=1)
        sequence, token, activation = (
            np.take_along_axis(values, chosen, axis=1)
            for values in (self.random.sequence, self.random.token, self.random.activation)
        )
        return Tokens(sequence, np.where((n >= count)[:, None], token, -1), activation)


def collect(
    dataset: Dataset,
    sae: SparseAutoencoder,
    top: int = 16,
    per_recording: int = 3,
    random: int = 64,
    seed: int = 0,
) -> Activity:
    """One pass over all tokens of the dataset. Memory grows with d_sae, not with the store."""
    n_vars, n_tokens, d_sae = dataset.architecture.n_vars, dataset.n_tokens, sae.d_sae
    best, sample = _Kept(d_sae, top), _Kept(d_sae, random)
    active, largest, total = np.zeros(d_sae, np.int64), np.zeros(d_sae, np.float32), np.zeros(d_sae)
    histogram = np.zeros((d_sae, len(EDGES) - 1), np.int64)
    by_recording = np.zeros((d_sae, len(dataset.recordings)), np.int64)
    by_channel, by_token = np.zeros((d_sae, n_vars)), np.zeros((d_sae, n_tokens), np.int64)
    channel_tokens, seen, paired = np.zeros(n_vars, np.int64), 0, 0
    together = np.zeros((d_sae, d_sae), np.float32) if d_sae <= LARGEST_COACTIVE else None
    n_sequences = len(dataset.recording)
    pair_every = max(1, n_sequences * n_tokens // COACTIVE_TOKENS)
    within, current = _Kept(d_sae, per_recording), -1
    with progress("find examples", n_sequences, "sequences", delay=2.0) as bar:
        for number, (first, x) in enumerate(dataset.batches(max(1, BATCH_TOKENS // n_tokens))):
            recording = int(dataset.recording[first])
            if recording != current:
                best.add(*within.take())
                current = recording
            f = np.asarray(sae.encode(x)).reshape(-1, d_sae)
            flat = np.flatnonzero(f)
            row, feature = np.divmod(flat, d_sae)
            value, position = f.ravel()[flat], first * n_tokens + row
            within.add(feature, value, position, above=best.least)
            chance = np.random.default_rng([seed, first]).random(len(f)).astype(np.float32)
            sample.add(feature, chance[row], position, carried=value)

            def count(by: np.ndarray, size: int, weights=None, feature=feature) -> np.ndarray:
                return np.bincount(feature * size + by, weights, d_sae * size).reshape(d_sae, size)

            tokens_here = count(row % n_tokens, n_tokens)
            by_token += tokens_here
            active += tokens_here.sum(1)
            by_recording[:, recording] += tokens_here.sum(1)
            total += np.bincount(feature, value, d_sae)
            largest = np.maximum(largest, f.max(0))
            histogram += count(
                np.clip(np.searchsorted(EDGES, value, "right") - 1, 0, len(EDGES) - 2),
                len(EDGES) - 1,
            )
            if not dataset.shifted[recording]:
                channel = dataset.channel[first : first + len(x)]
                by_channel += count(channel[row // n_tokens], n_vars, value)
                channel_tokens += np.bincount(channel, minlength=n_vars) * n_tokens
            if together is not None and number % pair_every == 0:
                together += np.asarray(_pairs(jnp.asarray(f)))
                paired += len(f)
            seen += len(f)
            bar.advance(len(x))
    best.add(*within.take())
    return Activity(
        seen, best.tokens(n_tokens), sample.tokens(n_tokens), active, total, largest, histogram, by_recording,
        by_channel, by_token, channel_tokens, together,
    )  # fmt: skip


@jax.jit
def _pairs(f: Float[Array, "tokens d_sae"]) -> Float[Array, "d_sae d_sae"]:
    is_active = (f > 0).astype(jnp.float32)
    return is_active.T @ is_active


class _Kept:
    """The largest of what was added, so many of each feature; the earlier position where two are equal."""

    def __init__(self, d_sae: int, size: int):
        self.d_sae, self.size = d_sae, size
        self.least = np.full(d_sae, -np.inf)  # that is kept of a feature with all places taken
        self._clear()

    def _clear(self) -> None:
        self.feature, self.position = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self.value, self.carried = np.zeros(0, np.float32), np.zeros(0, np.float32)
        self.least[:] = -np.inf

    def add(
        self, feature: np.ndarray, value: np.ndarray, position: np.ndarray, carried: np.ndarray | None = None,
        above: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        """`above`: of each feature, what must be exceeded beside what is kept."""
        least = self.least if above is None else np.maximum(self.least, above)
        some = value > least[feature]
        if not some.any():
            return
        carried = value if carried is None else carried
        columns = [
            np.concatenate([kept, new[some]])
            for kept, new in (
                (self.feature, feature), (self.value, value), (self.position, position), (self.carried, carried)
            )
        ]  # fmt: skip
        order = np.lexsort((columns[2], -columns[1], columns[0]))
        feature, value, position, carried = (column[order] for column in columns)
        starts = np.searchsorted(feature, np.arange(self.d_sae))
        rank = np.arange(len(feature)) - starts[feature]
        first = rank < self.size
        self.feature, self.value, self.position, self.carried = (
            column[first] for column in (feature, value, position, carried)
        )
        full = rank == self.size - 1
        self.least[feature[full]] = value[full]

    def take(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What was kept; nothing is kept any more."""
        kept = self.feature, self.value, self.position
        self._clear()
        return kept

    def tokens(self, n_tokens: int) -> Tokens:
        rank = (
            np.arange(len(self.feature))
            - np.searchsorted(self.feature, np.arange(self.d_sae))[self.feature]
        )
        position = np.full((self.d_sae, self.size), -1, np.int64)
        activation = np.zeros((self.d_sae, self.size), np.float32)
        position[self.feature, rank], activation[self.feature, rank] = self.position, self.carried
        return Tokens(
            position // n_tokens, np.where(position < 0, -1, position % n_tokens), activation
        )
