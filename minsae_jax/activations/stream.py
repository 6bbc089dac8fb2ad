"""Batches of tokens from a store, read ahead by grain, at positions that fit into a checkpoint.

Both streams are endless iterators of float32 [tokens, d_model] with `get_state()` and `set_state()`, the state being
plain JSON; what comes next depends on the store, the seed and the position alone.
"""

import bisect
from functools import lru_cache
from itertools import accumulate
from typing import Any, Protocol, runtime_checkable

import grain
import numpy as np
from jaxtyping import Float

from minsae_jax.activations.shards import Store
from minsae_jax.config import UserError

CHUNK = 256  # consecutive rows a read: single rows are a hundred times slower
WINDOW = 256  # chunks whose rows are mixed with one another


@runtime_checkable
class TokenStream(Protocol):
    """Endless batches; the state is the position, in plain JSON."""

    def __next__(self) -> Float[np.ndarray, "tokens d_model"]: ...
    def get_state(self) -> dict[str, Any]: ...
    def set_state(self, state: dict[str, Any]) -> None: ...


class Chunks:
    """Random access to a store in runs of at most CHUNK rows; a shard's shorter tail is a run too."""

    def __init__(self, store: Store):
        self.store = store
        self.ends = list(accumulate(-(-shard.rows // CHUNK) for shard in store.shards))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Float[np.ndarray, "rows d_model"]:
        shard = bisect.bisect_right(self.ends, index)
        start = (index - (self.ends[shard - 1] if shard else 0)) * CHUNK
        return self.store.read(shard, start, start + CHUNK)


class FileGroups:
    """Whole shard files, `size` at a time, in order; what does not fill a group at the end is never used."""

    def __init__(self, store: Store, size: int):
        if size > len(store.shards):
            raise UserError(f"--number_of_arrays {size} is more than the {len(store.shards)} files in {store.folder}")
        self.store, self.size = store, size

    def __len__(self) -> int:
        return len(self.store.shards) // self.size

    def __getitem__(self, index: int) -> Float[np.ndarray, "rows d_model"]:
        first = index * self.size
        return np.concatenate([self.store.read(i) for i in range(first, first + self.size)])


class ShuffledWindows:
    """The store in random order, epoch after epoch: element i is a window of at most WINDOW chunks, its rows mixed.

    Chunks are drawn over the whole store, anew each epoch; no window reaches into the next one, so that every token
    comes once an epoch. (Grain's own shuffle takes milliseconds an element where there are few.)
    """

    def __init__(self, store: Store, seed: int):
        self.chunks, self.seed = Chunks(store), seed
        self.windows_per_epoch = -(-len(self.chunks) // WINDOW)
        self._order = lru_cache(2)(lambda epoch: np.random.default_rng([seed, epoch]).permutation(len(self.chunks)))

    def __len__(self) -> int:
        return 2**40  # without end, as far as anybody trains

    def __getitem__(self, index: int) -> Float[np.ndarray, "rows d_model"]:
        epoch, window = divmod(int(index), self.windows_per_epoch)
        chunks = self._order(epoch)[window * WINDOW : (window + 1) * WINDOW].tolist()
        rows = np.concatenate([self.chunks[i] for i in chunks])
        return rows[np.random.default_rng([self.seed, epoch, window]).permutation(len(rows))]


def shuffled_tokens(store: Store, batch_size: int, shuffle_seed: int) -> TokenStream:
    """batch_size tokens at a time, from ShuffledWindows; batches run on from one window and epoch to the next."""
    windows = grain.MapDataset.source(ShuffledWindows(store, shuffle_seed))
    ahead = windows.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=2))
    return iter(grain.experimental.RebatchIterDataset(ahead, batch_size, drop_remainder=True))


def files_in_order(store: Store, number_of_arrays: int) -> TokenStream:
    """`number_of_arrays` whole files at a time, in order and over again: minSAE's batches."""
    groups = grain.MapDataset.source(FileGroups(store, number_of_arrays)).repeat()
    return iter(groups.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)))
