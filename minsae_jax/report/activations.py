"""The activations around examples, read in one pass over the store for all features.

Examples are sorted by their place in the store, so that each shard is read once and in order.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from minsae_jax.activations.tokens import TokenGrid
from minsae_jax.evaluation.dataset import Dataset
from minsae_jax.monitor import progress
from minsae_jax.report.examples import batch_tokens
from minsae_jax.sae.kinds import Params, SAEKind
from minsae_jax.sae.member import SparseAutoencoder

CHUNK = 256  # examples at a time, at most
OTHER_FEATURES = 5  # listed with an example


@dataclass(frozen=True)
class Stretch:
    """What is shown around a token."""

    # First and last start of tokens, as indices into `TokenGrid.starts`
    first: int
    last: int
    # The tokens between, on the channel of the token in the middle
    tokens: Int[np.ndarray, " n_shown"]


@dataclass(frozen=True)
class ExampleActivations:
    """Activations of one feature around its examples, in the order of the examples."""

    # On the tokens of each example's stretch, whose number differs
    around: list[np.ndarray]
    # The other features with the largest activations at each example's token
    others: list[list[tuple[int, float]]]


@cache
def stretch_of(grid: TokenGrid, token: int, w: int) -> Stretch:
    """Return the tokens that are shown around one: `w` to either side, or all around a CLS token.

    All are in the token's window.
    """
    slot = int(grid.slot[token])
    first = 0
    last = len(grid.starts) - 1
    if slot >= 0:
        first = max(first, slot - w)
        last = min(last, slot + w)
    is_shown = (grid.slot >= first) & (grid.slot <= last)
    channel = grid.channel[token]
    if channel >= 0:
        is_shown &= grid.channel == channel
    return Stretch(first, last, np.flatnonzero(is_shown))


def measure_examples(
    dataset: Dataset,
    sae: SparseAutoencoder,
    w: int,
    feature: Int[np.ndarray, " examples"],
    sequence: Int[np.ndarray, " examples"],
    token: Int[np.ndarray, " examples"],
) -> Iterator[ExampleActivations]:
    """Yield the activations around the examples of each feature; `feature` is sorted.

    w: tokens shown to either side. All activations shown are in memory: 4 bytes each.
    """
    stretches = [stretch_of(dataset.tokens, one, w) for one in token.tolist()]
    lengths = np.array([len(stretch.tokens) for stretch in stretches], np.int64)
    ends = np.cumsum(lengths)
    values = np.zeros(int(lengths.sum()), np.float32)
    others = np.zeros((len(feature), OTHER_FEATURES), np.int32)
    activations = np.zeros((len(feature), OTHER_FEATURES), np.float32)
    order = np.argsort(sequence, kind="stable")
    with progress("read examples", len(feature), "examples", delay=2.0) as bar:
        for chunk in _chunks(order, lengths, batch_tokens(sae)):
            x = _read(dataset, sequence[chunk])
            rows = np.concatenate([x[i][stretches[j].tokens] for i, j in enumerate(chunk.tolist())])
            # One shape for all chunks.
            indices = np.zeros(CHUNK, np.int64)
            indices[: len(chunk)] = feature[chunk]
            encoded = sae.encode_features(rows, indices.tolist())
            begin = 0
            for i, j in enumerate(chunk.tolist()):
                stop = begin + int(lengths[j])
                values[ends[j] - lengths[j] : ends[j]] = encoded[begin:stop, i]
                begin = stop
            at_token = np.zeros((CHUNK, sae.d_model), np.float32)
            at_token[: len(chunk)] = [x[i][token[j]] for i, j in enumerate(chunk.tolist())]
            top = _strongest_others(sae, at_token, indices)
            n_others = top[0].shape[1]
            activations[chunk, :n_others] = top[0][: len(chunk)]
            others[chunk, :n_others] = top[1][: len(chunk)]
            bar.advance(len(chunk))
    first = 0
    for count in np.unique(feature, return_counts=True)[1].tolist():
        examples = range(first, first + count)
        yield ExampleActivations(
            around=[values[ends[j] - lengths[j] : ends[j]] for j in examples],
            others=[_pairs(others[j], activations[j]) for j in examples],
        )
        first += count


def _pairs(
    others: Int[np.ndarray, " n"], activations: Float[np.ndarray, " n"]
) -> list[tuple[int, float]]:
    pairs = zip(others.tolist(), activations.tolist(), strict=True)
    return [(other, activation) for other, activation in pairs if activation > 0]


def _chunks(
    order: Int[np.ndarray, " examples"], lengths: Int[np.ndarray, " examples"], max_tokens: int
) -> Iterator[Int[np.ndarray, " chunk"]]:
    """Yield up to CHUNK examples with up to `max_tokens` tokens, or a single longer one."""
    chunk: list[int] = []
    n_tokens = 0
    for example in order.tolist():
        length = int(lengths[example])
        if chunk and (len(chunk) == CHUNK or n_tokens + length > max_tokens):
            yield np.array(chunk)
            chunk = []
            n_tokens = 0
        chunk.append(example)
        n_tokens += length
    if chunk:
        yield np.array(chunk)


def _read(
    dataset: Dataset, sequence: Int[np.ndarray, " n"]
) -> Sequence[Float[np.ndarray, "n_tokens d_model"]]:
    """Return the activations of sorted sequences; successive ones are read at once."""
    distinct, place = np.unique(sequence, return_inverse=True)
    runs = np.split(distinct, np.flatnonzero(np.diff(distinct) > 1) + 1)
    x = np.concatenate([dataset.read(int(run[0]), int(run[-1]) + 1) for run in runs])
    return [x[i] for i in place.tolist()]


def _strongest_others(
    sae: SparseAutoencoder, x: Float[np.ndarray, "n d_model"], feature: Int[np.ndarray, " n"]
) -> tuple[np.ndarray, np.ndarray]:
    """Return activations and indices of the strongest features of each token but one."""
    with jax.default_matmul_precision("highest"):
        largest, index = _top_others(sae.kind, sae.params, x, feature.astype(np.int32))
    return np.asarray(largest), np.asarray(index)


@partial(jax.jit, static_argnums=0)
def _top_others(
    kind: SAEKind, params: Params, x: Float[Array, "n d_model"], feature: Int[Array, " n"]
) -> tuple[Float[Array, "n others"], Int[Array, "n others"]]:
    features = kind.encode(params, x)
    features = features.at[jnp.arange(len(x)), feature].set(0)
    largest, other = jax.lax.top_k(features, min(OTHER_FEATURES, features.shape[1]))
    return largest, other
