"""Batches of tokens from a store, or from whatever is read like one, read ahead by grain, at positions that fit into a
checkpoint.

Both streams are endless iterators of [tokens, d_model], of the source's dtype, with `get_state()` and `set_state()`,
the state being plain JSON; what comes next depends on the source, the seed and the position alone.
"""

import threading
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import grain
import numpy as np
from jaxtyping import Float

from minsae_jax.errors import UserError

MIXED_ROWS = 65_536  # tokens that are mixed with one another, from chunks all over the source


@runtime_checkable
class TokenStream(Protocol):
    """Endless batches; the state is the position, in plain JSON."""

    def __next__(self) -> Float[np.ndarray, "tokens d_model"]: ...
    def get_state(self) -> dict[str, Any]: ...
    def set_state(self, state: dict[str, Any]) -> None: ...


@runtime_checkable
class Source(Protocol):
    """Where tokens come from: shards in order, or chunks of some consecutive rows in any order.

    manifest: layer and encoder, as far as they are known. fingerprint: tells sources apart.
    """

    @property
    def folder(self) -> Path: ...
    @property
    def d_model(self) -> int: ...
    @property
    def manifest(self) -> Mapping[str, Any]: ...
    @property
    def rows(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def rows_of_shards(self) -> Sequence[int]: ...
    @property
    def n_chunks(self) -> int: ...
    @property
    def chunk_rows(self) -> int: ...  # at the most
    @property
    def dtype(self) -> np.dtype: ...  # of what is read
    def read(self, shard: int) -> Float[np.ndarray, "rows d_model"]: ...
    def read_chunks(
        self, chunks: Sequence[int], out: Float[np.ndarray, "most d_model"]
    ) -> int: ...  # rows of out
    def verify(self) -> None: ...


def rows_of_chunks(source: Source, chunks: Sequence[int]) -> Float[np.ndarray, "rows d_model"]:
    """The rows of some chunks, one after the other, in memory of their own."""
    rows = np.empty((len(chunks) * source.chunk_rows, source.d_model), source.dtype)
    return rows[: source.read_chunks(chunks, rows)]


class FileGroups:
    """Whole shard files, `size` at a time, in order; what does not fill a group at the end is never used."""

    def __init__(self, source: Source, size: int):
        n_shards = len(source.rows_of_shards)
        if size > n_shards:
            raise UserError(
                f"--number_of_arrays {size} is more than the {n_shards} files in {source.folder}"
            )
        self.source, self.size, self.n_shards = source, size, n_shards

    def __len__(self) -> int:
        return self.n_shards // self.size

    def __getitem__(self, index: int) -> Float[np.ndarray, "rows d_model"]:
        first = index * self.size
        return np.concatenate([self.source.read(i) for i in range(first, first + self.size)])


class ShuffledWindows:
    """The source in random order, epoch after epoch: element i is a window of some chunks, its rows mixed.

    Chunks are drawn over the whole source, anew each epoch; no window reaches into the next one, so that every token
    comes once an epoch. (Grain's own shuffle takes milliseconds an element where there are few.)
    """

    def __init__(self, source: Source, seed: int):
        self.source, self.seed = source, seed
        self.chunks_mixed = max(1, MIXED_ROWS // source.chunk_rows)
        self.windows_per_epoch = -(-source.n_chunks // self.chunks_mixed)
        self._order = lru_cache(2)(
            lambda epoch: np.random.default_rng([seed, epoch]).permutation(source.n_chunks)
        )
        self._own = (
            threading.local()
        )  # of each reading thread: fresh memory for each window costs a third of the time

    def __len__(self) -> int:
        return 2**40  # without end, as far as anybody trains

    def __getitem__(self, index: int) -> Float[np.ndarray, "rows d_model"]:
        epoch, window = divmod(int(index), self.windows_per_epoch)
        first = window * self.chunks_mixed
        if not hasattr(self._own, "rows"):
            most = min(self.chunks_mixed, self.source.n_chunks) * self.source.chunk_rows
            self._own.rows = np.empty((most, self.source.d_model), self.source.dtype)
        n_rows = self.source.read_chunks(
            self._order(epoch)[first : first + self.chunks_mixed].tolist(), self._own.rows
        )
        order = np.random.default_rng([self.seed, epoch, window]).permutation(n_rows)
        return self._own.rows.take(
            order, axis=0, mode="clip"
        )  # without "clip" numpy goes a slower way


def shuffled_tokens(source: Source, batch_size: int, shuffle_seed: int) -> TokenStream:
    """batch_size tokens at a time, from ShuffledWindows; batches run on from one window and epoch to the next."""
    windows = grain.MapDataset.source(ShuffledWindows(source, shuffle_seed))
    ahead = windows.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=2))
    return iter(grain.experimental.RebatchIterDataset(ahead, batch_size, drop_remainder=True))


def files_in_order(source: Source, number_of_arrays: int) -> TokenStream:
    """`number_of_arrays` whole files at a time, in order and over again: minSAE's batches."""
    groups = grain.MapDataset.source(FileGroups(source, number_of_arrays)).repeat()
    return iter(groups.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)))
