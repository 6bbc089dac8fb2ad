"""Resumable batches of tokens, or of their numbers, from any `Source`, prefetched by grain.

Both streams are endless iterators of [tokens, d_model] in the source's dtype. Their position is
plain JSON. The next batch depends on the source, the seed and the position alone.

The processes of a cluster share the reading: each gets the same batches with zeros for the tokens
that others read, and the sum over processes is the batch of a single process. Shares are whole
chunks, so that reads are as long as without a cluster. The tokens of a batch are scattered
over a whole shuffle buffer: reading just those of some devices would take 20 times the time, and
nearly all pages of the files.
"""

import threading
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Protocol, runtime_checkable

import grain
import numpy as np
from jaxtyping import Shaped

from minsae_jax.activations.store import Origin
from minsae_jax.errors import UserError
from minsae_jax.parallel.processes import WHOLE, Share
from minsae_jax.settings import JsonObject

SHUFFLE_BUFFER_TOKENS = 65_536  # tokens shuffled together, from chunks all over the source


@runtime_checkable
class TokenStream(Protocol):
    """Endless batches; the state is the position, in plain JSON."""

    def __next__(self) -> Shaped[np.ndarray, "tokens d_model"]: ...
    def get_state(self) -> JsonObject: ...
    def set_state(self, state: JsonObject) -> None: ...


@runtime_checkable
class Source(Protocol):
    """Activations to train on: a store, or recordings that are encoded while training."""

    @property
    def folder(self) -> Path: ...  # for messages
    @property
    def origin(self) -> Origin: ...
    @property
    def fingerprint(self) -> str: ...  # equal for equal tokens
    @property
    def d_model(self) -> int: ...
    @property
    def dtype(self) -> np.dtype: ...  # after reading
    def recordings(self) -> set[str]: ...  # file names; none if they are unknown
    def verify(self, share: Share = WHOLE) -> None: ...  # raises UserError if checksums differ

    # Shards: the parts of the source in order, as minSAE reads them.
    @property
    def tokens_per_shard(self) -> Sequence[int]: ...
    def read(
        self, shard: int, start: int = 0, stop: int | None = None
    ) -> Shaped[np.ndarray, "tokens d_model"]: ...

    # Chunks: short runs of consecutive tokens, in any order, for shuffling.
    @property
    def n_chunks(self) -> int: ...
    @property
    def tokens_per_chunk(self) -> int: ...  # maximum
    def tokens_in_chunk(self, chunk: int) -> int: ...
    def read_chunks(
        self, chunks: Sequence[int], out: Shaped[np.ndarray, "capacity d_model"]
    ) -> int: ...  # fills the start of `out` and returns the number of tokens


def read_share(
    source: Source,
    share: Share,
    chunks: Sequence[int],
    out: Shaped[np.ndarray, "capacity d_model"],
) -> int:
    """Fill the start of `out` with the tokens of some chunks and return their number.

    Chunks that are not in the share are not read; their tokens are 0.
    """
    first, end = share.bounds(len(chunks))
    start = sum(map(source.tokens_in_chunk, chunks[:first]))
    stop = start
    if first < end:
        # Of the same size for every shuffle buffer: live activations are compiled for it.
        max_chunks = -(-(len(out) // source.tokens_per_chunk) // share.count)
        target = out[start : start + max_chunks * source.tokens_per_chunk]
        stop += source.read_chunks(chunks[first:end], target)
    n_tokens = stop + sum(map(source.tokens_in_chunk, chunks[end:]))
    out[:start] = 0
    out[stop:n_tokens] = 0
    return n_tokens


class ShardGroups:
    """Groups of `size` whole shards in order; shards that do not fill a last group are not used."""

    def __init__(self, source: Source, size: int, share: Share):
        n_shards = len(source.tokens_per_shard)
        if size > n_shards:
            raise UserError(
                f"--number_of_arrays {size} is more than the {n_shards} files in {source.folder}"
            )
        self.source = source
        self.size = size
        self.share = share
        self.n_shards = n_shards

    def __len__(self) -> int:
        return self.n_shards // self.size

    def __getitem__(self, index: int) -> Shaped[np.ndarray, "tokens d_model"]:
        first = index * self.size
        return np.concatenate([self._read(i) for i in range(first, first + self.size)])

    def _read(self, shard: int) -> Shaped[np.ndarray, "tokens d_model"]:
        if self.share == WHOLE:
            return self.source.read(shard)
        n_tokens = self.source.tokens_per_shard[shard]
        tokens = np.zeros((n_tokens, self.source.d_model), self.source.dtype)
        start, stop = self.share.bounds(n_tokens)
        if start < stop:
            tokens[start:stop] = self.source.read(shard, start, stop)
        return tokens


class ShuffleBuffers:
    """The tokens of a source in random order, epoch after epoch, one shuffle buffer per element.

    Each epoch draws a new order of all chunks. Buffer i of the epoch contains the next
    `chunks_per_buffer` chunks, and its tokens are shuffled. Every token appears once per epoch.
    (Grain's own shuffle needs milliseconds per element if there are few elements.)
    """

    def __init__(self, source: Source, seed: int, share: Share = WHOLE):
        self.source = source
        self.seed = seed
        self.share = share
        chunks_per_buffer = max(1, SHUFFLE_BUFFER_TOKENS // source.tokens_per_chunk)
        self.chunks_per_buffer = min(source.n_chunks, chunks_per_buffer)
        # -(-a // b) is a / b rounded up, here and elsewhere.
        self.buffers_per_epoch = -(-source.n_chunks // self.chunks_per_buffer)
        # Two epochs: at the end of one, a second thread reads the start of the next.
        self._chunk_order = lru_cache(2)(self._draw_chunk_order)
        # Memory of each reading thread: allocating it for every buffer takes a third of the time.
        self._memory = threading.local()

    def _draw_chunk_order(self, epoch: int) -> np.ndarray:
        # Seeded by the epoch instead of drawn from one generator: any buffer can be made without
        # those before it, so that a resumed run starts at once.
        return np.random.default_rng([self.seed, epoch]).permutation(self.source.n_chunks)

    def __len__(self) -> int:
        return 2**40  # effectively infinite

    def __getitem__(self, index: int) -> Shaped[np.ndarray, "tokens d_model"]:
        epoch, buffer = divmod(int(index), self.buffers_per_epoch)
        first = buffer * self.chunks_per_buffer
        chunk_order = self._chunk_order(epoch)
        chunks = chunk_order[first : first + self.chunks_per_buffer].tolist()
        if not hasattr(self._memory, "tokens"):
            capacity = self.chunks_per_buffer * self.source.tokens_per_chunk
            self._memory.tokens = np.empty((capacity, self.source.d_model), self.source.dtype)
        tokens = self._memory.tokens
        n_tokens = read_share(self.source, self.share, chunks, tokens)
        order = np.random.default_rng([self.seed, epoch, buffer]).permutation(n_tokens)
        # All indices are valid; without "clip", take checks them in a slower loop.
        return tokens.take(order, axis=0, mode="clip")


def shuffled_tokens(
    source: Source, batch_size: int, shuffle_seed: int, share: Share = WHOLE
) -> TokenStream:
    """Return batches of `batch_size` shuffled tokens, across the ends of buffers and epochs.

    Tokens that are not in the share are 0.
    """
    buffers = grain.MapDataset.source(ShuffleBuffers(source, shuffle_seed, share))
    # An element is a whole shuffle buffer, so two in advance are enough.
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2)
    prefetched = buffers.to_iter_dataset(options)
    # Rebatching carries the rest of a buffer over into the next batch. The stream is endless, so
    # drop_remainder loses no tokens.
    return iter(grain.experimental.RebatchIterDataset(prefetched, batch_size, drop_remainder=True))


def files_in_order(source: Source, number_of_arrays: int, share: Share = WHOLE) -> TokenStream:
    """Return minSAE's batches: `number_of_arrays` whole shards in order, repeated forever.

    Tokens that are not in the share are 0. Raises UserError if the source has fewer shards.
    """
    shards = ShardGroups(source, number_of_arrays, share)
    groups = grain.MapDataset.source(shards).repeat()
    return iter(groups.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)))
