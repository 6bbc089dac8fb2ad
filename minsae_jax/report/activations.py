"""The activations around examples, read in one pass over the store for all features.

Examples are sorted by their place in the store, so that each shard is read once and in order. Where
a feature depends on the others (TopK), each token that any example shows is encoded once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from minsae_jax.activations.tokens import TokenGrid
from minsae_jax.evaluation.dataset import Dataset
from minsae_jax.monitor import progress
from minsae_jax.report.entries import encode_padded
from minsae_jax.report.examples import BATCH_TOKENS, batch_tokens
from minsae_jax.sae.member import SparseAutoencoder
from minsae_jax.sae.padding import pad_rows, power_of_two

CHUNK = 256  # examples at a time, at most, where only their features are encoded
MAX_EXAMPLES = 65_536  # at a time where all features are encoded, so that memory is bounded
OTHER_FEATURES = 5  # listed with an example


@dataclass(frozen=True)
class Stretch:
    """Context shown around a token."""

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
    """Return the activations around the examples of each feature; `feature` is sorted.

    w: tokens shown to either side. All activations shown are in memory: 4 bytes each.
    """
    stretches = [stretch_of(dataset.tokens, one, w) for one in token.tolist()]
    lengths = np.array([len(stretch.tokens) for stretch in stretches], np.int64)
    starts = np.cumsum(lengths) - lengths
    values = np.zeros(int(lengths.sum()), np.float32)
    n_others = min(OTHER_FEATURES, sae.d_sae - 1)
    others = np.zeros((len(feature), n_others), np.int32)
    activations = np.zeros((len(feature), n_others), np.float32)
    by_sequence = np.argsort(sequence, kind="stable")
    measure = _measure_some if sae.kind.independent else _measure_all
    with progress("read examples", len(feature), "examples", delay=2.0) as bar:
        for examples in _chunks(dataset, sae, by_sequence, sequence, lengths):
            shown = [stretches[i].tokens for i in examples.tolist()]
            chunk = _read_chunk(dataset, shown, sequence[examples], token[examples])
            chunk_values, *strongest = measure(sae, chunk, feature[examples])
            n_shown = lengths[examples]
            place = np.repeat(starts[examples], n_shown) + count_up(n_shown)
            values[place] = np.asarray(chunk_values)[: len(place)]
            largest, index = (np.asarray(array)[chunk.place] for array in strongest)
            # The example's feature comes last, which leaves the others.
            is_same = index == feature[examples, None]
            order = np.argsort(is_same, axis=1, kind="stable")[:, :n_others]
            others[examples] = np.take_along_axis(index, order, axis=1)
            of_others = np.where(is_same, 0, largest)
            activations[examples] = np.take_along_axis(of_others, order, axis=1)
            bar.advance(len(examples))
    return _by_feature(feature, np.split(values, starts[1:]), others, activations)


def _by_feature(
    feature: Int[np.ndarray, " examples"],
    around: list[np.ndarray],
    others: Int[np.ndarray, "examples others"],
    activations: Float[np.ndarray, "examples others"],
) -> Iterator[ExampleActivations]:
    first = 0
    for count in np.unique(feature, return_counts=True)[1].tolist():
        of_feature = slice(first, first + count)
        listed = []
        for example in range(first, first + count):
            pairs = zip(others[example].tolist(), activations[example].tolist(), strict=True)
            listed.append([(other, activation) for other, activation in pairs if activation > 0])
        yield ExampleActivations(around[of_feature], listed)
        first += count


def _chunks(
    dataset: Dataset,
    sae: SparseAutoencoder,
    order: Int[np.ndarray, " examples"],
    sequence: Int[np.ndarray, " examples"],
    lengths: Int[np.ndarray, " examples"],
) -> Iterator[Int[np.ndarray, " chunk"]]:
    """Yield examples in order, with up to as many distinct tokens as are encoded at once.

    A single example may have more.
    """
    max_examples = CHUNK if sae.kind.independent else MAX_EXAMPLES
    max_tokens = BATCH_TOKENS if sae.kind.independent else batch_tokens(sae)
    chunk: list[int] = []
    n_before = 0  # distinct tokens of the sequences before the last one
    n_shown = 0  # tokens of the last sequence, with repetitions
    for example in order.tolist():
        is_same = bool(chunk) and sequence[chunk[-1]] == sequence[example]
        if not is_same:
            n_before += min(n_shown, dataset.n_tokens)
            n_shown = 0
        # With its token, which is not shown if it is a CLS token.
        n_shown += int(lengths[example]) + 1
        n_distinct = n_before + min(n_shown, dataset.n_tokens)
        if chunk and (len(chunk) == max_examples or n_distinct > max_tokens):
            yield np.array(chunk)
            chunk = []
            n_before = 0
            n_shown = int(lengths[example]) + 1
        chunk.append(example)
    if chunk:
        yield np.array(chunk)


@dataclass(frozen=True)
class _Chunk:
    """The distinct tokens that examples of successive sequences show."""

    rows: Float[np.ndarray, "rows d_model"]
    # Row of each token shown, and the index of its example in the chunk
    row: Int[np.ndarray, " shown"]
    of_example: Int[np.ndarray, " shown"]
    # Rows of the distinct tokens in the middle, and which of these an example has
    middle: Int[np.ndarray, " distinct"]
    place: Int[np.ndarray, " chunk"]


def _read_chunk(
    dataset: Dataset,
    shown: Sequence[np.ndarray],
    sequence: Int[np.ndarray, " chunk"],
    token: Int[np.ndarray, " chunk"],
) -> _Chunk:
    """Read the tokens of examples, whose sequences are sorted; successive ones are read at once."""
    of_example = np.repeat(np.arange(len(shown)), [len(tokens) for tokens in shown])
    around = sequence[of_example] * dataset.n_tokens + np.concatenate(shown)
    middle, place = np.unique(sequence * dataset.n_tokens + token, return_inverse=True)
    distinct = np.unique(np.concatenate([around, middle]))
    of_row, token_of_row = np.divmod(distinct, dataset.n_tokens)
    read = np.unique(of_row)
    runs = np.split(read, np.flatnonzero(np.diff(read) > 1) + 1)
    parts = [dataset.read(int(run[0]), int(run[-1]) + 1) for run in runs]
    x = np.concatenate(parts)
    return _Chunk(
        rows=x[np.searchsorted(read, of_row), token_of_row],
        row=np.searchsorted(distinct, around),
        of_example=of_example,
        middle=np.searchsorted(distinct, middle),
        place=place,
    )


# Of each example's feature on the tokens that it shows; then the largest activations of each
# distinct token in the middle, and their features. There may be padding at the end.
_Measured = tuple[Array | np.ndarray, Array, Array]


def _measure_all(
    sae: SparseAutoencoder, chunk: _Chunk, feature: Int[np.ndarray, " chunk"]
) -> _Measured:
    """Encode each distinct token with all features."""
    n_tokens = len(chunk.rows)
    n_rows = power_of_two(n_tokens)
    # A single example may have more tokens.
    if n_tokens <= batch_tokens(sae):
        n_rows = min(n_rows, batch_tokens(sae))
    features = encode_padded(sae, chunk.rows, n_rows)
    values = _take(features, _pad(chunk.row), _pad(feature[chunk.of_example]))
    return values, *_strongest(features, _pad(chunk.middle))


def _measure_some(
    sae: SparseAutoencoder, chunk: _Chunk, feature: Int[np.ndarray, " chunk"]
) -> _Measured:
    """Encode all features for the tokens in the middle, and the examples' features for others."""
    # One shape for all chunks.
    indices = np.zeros(CHUNK, np.int64)
    indices[: len(feature)] = feature
    encoded = sae.encode_features(chunk.rows, indices.tolist())
    middle = chunk.rows[chunk.middle]
    features = encode_padded(sae, middle, power_of_two(len(middle)))
    values = encoded[chunk.row, chunk.of_example]
    return values, *_strongest(features, np.arange(len(features), dtype=np.int32))


def _pad(indices: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n_padded"]:
    return pad_rows(indices.astype(np.int32), power_of_two(len(indices)))


@jax.jit
def _take(
    features: Float[Array, "rows d_sae"], row: Int[Array, " n"], feature: Int[Array, " n"]
) -> Float[Array, " n"]:
    return features[row, feature]


@jax.jit
def _strongest(
    features: Float[Array, "rows d_sae"], row: Int[Array, " n"]
) -> tuple[Float[Array, "n largest"], Int[Array, "n largest"]]:
    # With one more, which may be the example's feature.
    count = min(OTHER_FEATURES + 1, features.shape[1])
    largest, index = jax.lax.top_k(features[row], count)
    return largest, index


def count_up(lengths: Int[np.ndarray, " n"]) -> Int[np.ndarray, " total"]:
    """Return 0, 1, … up to each length, one after the other."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
