"""Features pooled over the tokens of each recording, and their means by token position and channel.

All of it comes from one pass over a store. Memory is three times [recordings, features], whatever
the number of tokens. Recordings of a patient can then be averaged.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from minsae_jax.eeg.splits import patient_of
from minsae_jax.evaluation.dataset import Dataset
from minsae_jax.monitor import progress
from minsae_jax.parallel.mesh import fetch_late, on_cpu
from minsae_jax.sae.kinds import Params, SAEKind
from minsae_jax.sae.member import SparseAutoencoder
from minsae_jax.sae.padding import pad_rows

BATCH_VALUES = 1 << 23  # values of the features of a batch
# On CPU: with temporary arrays they fit the cache, and malloc reuses their memory.
CPU_BATCH_VALUES = 1 << 21
MAX_BATCH_SEQUENCES = 512
PRECISION = 2.0**40  # of the values of patients: below it is the rounding of float64
Pooling = Literal["mean", "maximum", "active"]


@dataclass(frozen=True)
class GroupMeans:
    """Mean features of groups of tokens, with the number of tokens of each group."""

    n_tokens: Int[np.ndarray, " groups"]
    mean: Float[np.ndarray, "groups features"]


@dataclass(frozen=True)
class Pooled:
    """Features of every recording over its tokens; recordings without tokens are left out.

    The features are those of an SAE, or the raw dimensions of the activations.
    """

    # File names
    recordings: tuple[str, ...]
    n_tokens: Int[np.ndarray, " recordings"]
    mean: Float[np.ndarray, "recordings features"]
    maximum: Float[np.ndarray, "recordings features"]
    # Share of tokens with a value above 0
    active: Float[np.ndarray, "recordings features"]
    # By the time at which the token begins in its window, and by channel
    by_position: GroupMeans
    by_channel: GroupMeans
    # Σ over all tokens of (f - mean of f)²
    total_squares: Float[np.ndarray, " features"]

    def values(self, pooling: Pooling) -> Float[np.ndarray, "recordings features"]:
        """Return the features pooled in one of the three ways.

        Shares of active tokens are float64, since ranks depend on whether patients are equal.
        """
        if pooling == "active":
            n_tokens = self.n_tokens[:, None].astype(np.float64)
            return np.rint(self.active * n_tokens) / n_tokens
        return {"mean": self.mean, "maximum": self.maximum}[pooling]


@dataclass(frozen=True)
class PatientValues:
    """A value of every feature for every patient."""

    # In the order of their first recordings
    patients: tuple[str, ...]
    values: Float[np.ndarray, "patients features"]

    def of(self, patients: Sequence[str]) -> Float[np.ndarray, "selected features"]:
        """Return the values of some patients, in the given order."""
        index = {patient: i for i, patient in enumerate(self.patients)}
        return self.values[[index[patient] for patient in patients]]


class BatchSums(NamedTuple):
    """Sums over the tokens of a batch, which is of one recording."""

    total: Float[Array, " features"]
    # Σ (f - mean of the batch)²
    squares: Float[Array, " features"]
    maximum: Float[Array, " features"]
    active: Int[Array, " features"]
    # Over sequences
    of_token: Float[Array, "n_tokens features"]
    # Over the tokens of sequences of each channel; the last entry is of whole windows
    of_channel: Float[Array, "channels features"]


class _Totals:
    """Sums over all tokens so far, in float64."""

    def __init__(self, n_recordings: int, n_tokens: int, n_channels: int, n_features: int):
        self.counts = np.zeros(n_recordings, np.int64)
        # Of the current recording
        self.sums = np.zeros(n_features)
        self.mean = np.zeros((n_recordings, n_features), np.float32)
        self.maximum = np.full((n_recordings, n_features), -np.inf, np.float32)
        self.active = np.zeros((n_recordings, n_features), np.float32)
        self.of_token = np.zeros((n_tokens, n_features))
        self.of_channel = np.zeros((n_channels, n_features))
        # Of all tokens
        self.n = 0
        self.overall_mean = np.zeros(n_features)
        self.squares = np.zeros(n_features)

    def add(self, recording: int, n: int, batch: BatchSums) -> None:
        """Add a batch of n tokens; the batches of a recording follow each other."""
        total = np.asarray(batch.total, np.float64)
        if self.counts[recording] == 0:
            self.sums[:] = 0
        self.sums += total
        self.counts[recording] += n
        self.mean[recording] = self.sums / self.counts[recording]
        self.maximum[recording] = np.maximum(self.maximum[recording], batch.maximum)
        self.active[recording] += batch.active
        self.of_token += batch.of_token
        self.of_channel += batch.of_channel
        # Merge squares (Chan, Golub & LeVeque 1983), since Σ f² - n mean² would lose digits.
        shift = total / n - self.overall_mean
        share = n / (self.n + n)
        self.squares += batch.squares + np.square(shift) * self.n * share
        self.overall_mean += shift * share
        self.n += n


def pool(dataset: Dataset, sae: SparseAutoencoder | None) -> Pooled:
    """Pool the features of an SAE, or without one the raw activations, over every recording.

    Products and the sums within a batch are float32, sums over batches are float64.
    """
    kind = None
    params: Params = {}
    n_features = dataset.store.d_model
    if sae is not None:
        kind = sae.kind
        params = sae.params
        n_features = sae.d_sae
    n_channels = int(dataset.channel.max(initial=-1)) + 1
    with_tokens = np.unique(dataset.recording)
    totals = _Totals(len(with_tokens), dataset.n_tokens, n_channels + 1, n_features)
    batch_values = CPU_BATCH_VALUES if on_cpu() else BATCH_VALUES
    n_sequences = batch_values // (dataset.n_tokens * n_features)
    n_sequences = min(max(n_sequences, 1), MAX_BATCH_SEQUENCES)

    def run_batches() -> Iterator[tuple[int, int, BatchSums]]:
        for first, x in dataset.batches(n_sequences):
            # The channel -1 of whole windows is the last group.
            channel = dataset.channel[first : first + len(x)] % (n_channels + 1)
            rows = (pad_rows(x, n_sequences), pad_rows(channel, n_sequences))
            yield first, len(x), sum_batch(kind, n_channels + 1, params, *rows, np.int32(len(x)))

    with progress("pool features", len(dataset.recording), "sequences", delay=2.0) as bar:
        for first, n_rows, sums in fetch_late(run_batches()):
            row = int(np.searchsorted(with_tokens, dataset.recording[first]))
            totals.add(row, n_rows * dataset.n_tokens, sums)
            bar.advance(n_rows)
    # In place: with many recordings and features each of these arrays takes a gigabyte.
    totals.active /= totals.counts[:, None].astype(np.float32)
    return Pooled(
        recordings=tuple(dataset.recordings[i] for i in with_tokens),
        n_tokens=totals.counts,
        mean=totals.mean,
        maximum=totals.maximum,
        active=totals.active,
        by_position=_position_means(dataset, totals),
        by_channel=_channel_means(dataset, totals),
        total_squares=totals.squares,
    )


def _position_means(dataset: Dataset, totals: _Totals) -> GroupMeans:
    _, group = np.unique(dataset.tokens.first, return_inverse=True)
    n_sequences = np.full(dataset.n_tokens, len(dataset.recording))
    return _group_means(group, n_sequences, totals.of_token)


def _channel_means(dataset: Dataset, totals: _Totals) -> GroupMeans:
    """Return means by channel: of tokens if they have their own, else of sequences.

    Those without a channel (-1) are the last group.
    """
    channel = dataset.tokens.channel
    if (channel >= 0).any():
        n_sequences = np.full(dataset.n_tokens, len(dataset.recording))
        return _group_means(channel % (channel.max() + 2), n_sequences, totals.of_token)
    n_groups = len(totals.of_channel)
    n_sequences = np.bincount(dataset.channel % n_groups, minlength=n_groups)
    return _group_means(np.arange(n_groups), n_sequences * dataset.n_tokens, totals.of_channel)


def _group_means(
    group: Int[np.ndarray, " parts"],
    n_tokens: Int[np.ndarray, " parts"],
    sums: Float[np.ndarray, "parts features"],
) -> GroupMeans:
    """Return the means of groups of parts; groups without tokens are left out."""
    n_groups = int(group.max()) + 1
    total = np.zeros((n_groups, sums.shape[1]))
    np.add.at(total, group, sums)
    n_of_group = np.zeros(n_groups, np.int64)
    np.add.at(n_of_group, group, n_tokens)
    present = np.flatnonzero(n_of_group)
    return GroupMeans(n_of_group[present], total[present] / n_of_group[present, None])


def by_patient(
    recordings: Sequence[str], *values: Float[np.ndarray, "_ features"]
) -> PatientValues:
    """Return the mean over the recordings of each patient, which count equally, in float64.

    Means that differ by rounding only, such as those of 0.1 and 0.2 and of 0.15 and 0.15, are equal
    for tests by ranks. values: of all recordings, in one or several arrays.
    """
    patients, patient = group_by_patient(recordings)
    total = np.zeros((len(patients), values[0].shape[1]))
    for i, row in zip(patient, chain.from_iterable(values), strict=True):
        total[i] += row
    n_recordings = np.bincount(patient, minlength=len(patients))
    total /= n_recordings[:, None]
    mantissa, exponent = np.frexp(total)
    return PatientValues(patients, np.ldexp(np.rint(mantissa * PRECISION) / PRECISION, exponent))


def group_by_patient(
    recordings: Sequence[str],
) -> tuple[tuple[str, ...], Int[np.ndarray, " recordings"]]:
    """Return the patients by their first recordings, and the index of each recording's patient."""
    names = [patient_of(recording) for recording in recordings]
    index = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return tuple(index), np.array([index[name] for name in names], np.int64)


@partial(jax.jit, static_argnums=(0, 1))
@jax.default_matmul_precision("highest")
def sum_batch(
    kind: SAEKind | None,
    n_channels: int,
    params: Params,
    x: Float[Array, "sequences n_tokens d_model"],
    channel: Int[Array, " sequences"],
    n_sequences: Int[Array, ""],
) -> BatchSums:
    """Return the sums of a batch, whose first n_sequences are not padding.

    Without a kind the features are x. channel: of each sequence, below n_channels.
    """
    features = x if kind is None else kind.encode(params, x)
    n_tokens = x.shape[1]
    # Sums over the tokens of each sequence, of which those over sequences are made: padding, on
    # which biases can activate features, is left out of these small arrays.
    is_sequence = jnp.arange(len(x)) < n_sequences
    weight = is_sequence.astype(jnp.float32)
    sums = features.sum(1)
    means = sums / n_tokens
    squares = jnp.square(features - means[:, None]).sum(1)
    active = jnp.where(features > 0, 1.0, 0.0).sum(1)
    maximum = jnp.where(is_sequence[:, None], features.max(1), -jnp.inf)
    # Sums over the first axis are products, which take a tenth of the time on CPU.
    total = weight @ sums
    mean = total / (n_sequences * n_tokens).astype(jnp.float32)
    # About the batch's mean: the squares within sequences, and those of the sequences' means.
    squares = squares + n_tokens * jnp.square(means - mean[None])
    is_of_channel = channel[None] == jnp.arange(n_channels)[:, None]
    return BatchSums(
        total=total,
        squares=weight @ squares,
        maximum=maximum.max(0),
        active=(weight @ active).astype(jnp.int32),
        of_token=jnp.einsum("s,stf->tf", weight, features),
        of_channel=jnp.where(is_of_channel, weight[None], 0) @ sums,
    )
