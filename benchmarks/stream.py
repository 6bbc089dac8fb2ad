"""Shuffled batches from a store against plain reading, and how well they are shuffled.

    python -m benchmarks.stream [--quick]

The store contains recordings of 77 windows of 19 channels of 101 tokens, the mean of the TUH
corpus, as many as fit into 4 GB (--quick: 0.1 GB). "From the cache" is the rate of reading the same
files in order, 64 MB at a time. Shuffling is measured by the number of other tokens of the same
recording in a token's batch, against the expected number for tokens drawn from the whole store.
Prints Markdown.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.timing import alternate, machine
from minsae_jax.activations.store import Store, open_store
from minsae_jax.activations.stream import TokenStream, shuffled_tokens

D_MODEL = 128
N_TOKENS = 101  # per sequence
BATCH = 4096  # tokens
RECORDING_TOKENS = 77 * 19 * N_TOKENS
SHARD_SEQUENCES = 64 * 19
READ_BYTES = 1 << 26
MAX_TOKENS = 2_000_000  # per timed call


def write_store(folder: Path, recordings: int, dtype: type) -> None:
    """Write shards whose tokens contain the number of their recording."""
    tokens = np.repeat(np.arange(recordings), RECORDING_TOKENS)
    n_shards = len(tokens) // (SHARD_SEQUENCES * N_TOKENS)
    tokens = tokens[: n_shards * SHARD_SEQUENCES * N_TOKENS]
    for i, shard in enumerate(tokens.reshape(n_shards, SHARD_SEQUENCES, N_TOKENS, 1)):
        values = np.broadcast_to(shard, (SHARD_SEQUENCES, N_TOKENS, D_MODEL))
        np.save(folder / f"b{i:04d}.npy", values.astype(dtype))


def same_recording(batches: list[np.ndarray]) -> float:
    """Return the mean number of other tokens of the same recording in a token's batch."""
    means = []
    for batch in batches:
        _, counts = np.unique(batch[:, 0], return_counts=True)
        means.append((counts * (counts - 1)).sum() / len(batch))
    return float(np.mean(means))


def read_in_order(store: Store, n_bytes: int, memory: bytearray) -> None:
    for shard in store.shards:
        with shard.path.open("rb", buffering=0) as file:
            while n_bytes > 0:
                count = file.readinto(memory)
                if not count:
                    break
                n_bytes -= count


def read_batches(stream: TokenStream, count: int) -> None:
    for _ in range(count):
        next(stream)


def measure(folder: Path, gigabytes: float, dtype: type) -> str:
    """Return a row of the table."""
    token_bytes = D_MODEL * np.dtype(dtype).itemsize
    recordings = max(2, round(gigabytes * 1e9 / RECORDING_TOKENS / token_bytes))
    write_store(folder, recordings, dtype)
    store = open_store(folder)
    stream = shuffled_tokens(store, BATCH, 0)
    memory = bytearray(READ_BYTES)
    n_tokens = min(store.total_tokens, MAX_TOKENS)
    seconds = alternate(
        {
            "cache": lambda: read_in_order(store, n_tokens * token_bytes, memory),
            "batches": lambda: read_batches(stream, n_tokens // BATCH),
        }
    )
    cache_rate = n_tokens / seconds["cache"] / 1e6
    batch_rate = n_tokens / seconds["batches"] / 1e6
    neighbours = same_recording([next(stream) for _ in range(200)])
    expected = (BATCH - 1) * (RECORDING_TOKENS - 1) / (store.total_tokens - 1)
    stream.close()
    return (
        f"| {store.total_tokens * token_bytes / 1e9:.1f} GB, {np.dtype(dtype)} | {recordings} "
        f"| {cache_rate:.1f} | {batch_rate:.1f} | {batch_rate / cache_rate:.0%} "
        f"| {neighbours:.1f} | {expected:.1f} |"
    )


def main() -> None:
    gigabytes = 0.1 if "--quick" in sys.argv else 4.0
    print(f"Stream, {machine()}; d_model {D_MODEL}, batches of {BATCH:,}; million tokens/s.\n")
    columns = (
        "store",
        "recordings",
        "from the cache",
        "batches",
        "share",
        "same recording, tokens",
        "expected",
    )
    print(f"| {' | '.join(columns)} |")
    print("| --- " * len(columns) + "|")
    for dtype in (np.float32, np.float16):
        with tempfile.TemporaryDirectory() as name:
            print(measure(Path(name), gigabytes, dtype), flush=True)


if __name__ == "__main__":
    main()
