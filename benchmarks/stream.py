"""Batches from a store, against the disk's cache, and how well they are mixed: `python -m benchmarks.stream`.

The store has recordings of 77 windows of 19 channels of 101 tokens, as the TUH corpus has in the mean, as many as fit
into 4 GB (--quick: 0.2). The cache's rate is of the same files read from first to last, 64 MB at a time. Mixing
is told by the tokens of one recording: how many others of its own recording a token meets in its batch, against the
number where tokens are drawn from the whole store. Prints Markdown.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.timing import alternate, machine
from minsae_jax.activations.store import open_store
from minsae_jax.activations.stream import shuffled_tokens

D_MODEL, BATCH, RECORDING, SHARD = 128, 4096, 77 * 19 * 101, 64 * 19  # tokens, tokens, sequences


def write_store(folder: Path, recordings: int, dtype: type) -> None:
    """Every token holds the number of its recording."""
    tokens = np.repeat(np.arange(recordings), RECORDING)
    tokens = tokens[: len(tokens) // (SHARD * 101) * SHARD * 101].reshape(-1, SHARD, 101)
    for i, shard in enumerate(tokens):
        np.save(
            folder / f"b{i:04d}.npy",
            np.broadcast_to(shard[..., None], (*shard.shape, D_MODEL)).astype(dtype),
        )


def own_recording(batches: list[np.ndarray]) -> float:
    """Mean number of other tokens of its own recording that a token has in its batch."""
    met = []
    for batch in batches:
        _, counts = np.unique(batch[:, 0], return_counts=True)
        met.append((counts * (counts - 1)).sum() / len(batch))
    return float(np.mean(met))


def main() -> None:
    gigabytes = 0.2 if "--quick" in sys.argv else 4.0
    print(
        f"Stream, {machine()}; d_model {D_MODEL}, batches of {BATCH:,}; million tokens a second.\n"
    )
    print(
        "| store | recordings | from the cache | batches | share | own recording, tokens | expected |"
    )
    print("| --- " * 7 + "|")
    for dtype in (np.float32, np.float16):
        with tempfile.TemporaryDirectory() as name:
            folder, row_bytes = Path(name), D_MODEL * np.dtype(dtype).itemsize
            recordings = max(2, round(gigabytes * 1e9 / RECORDING / row_bytes))
            write_store(folder, recordings, dtype)
            store = open_store(folder)
            stream, memory = shuffled_tokens(store, BATCH, 0), bytearray(1 << 26)
            rows = min(store.rows, 2_000_000)

            def from_cache(store=store, memory=memory, rows=rows, row_bytes=row_bytes) -> None:
                left = rows * row_bytes
                for shard in store.shards:
                    with shard.path.open("rb", buffering=0) as f:
                        while left > 0 and (count := f.readinto(memory)):
                            left -= count

            def batches(stream=stream, rows=rows) -> None:
                for _ in range(rows // BATCH):
                    next(stream)

            seconds = alternate({"cache": from_cache, "batches": batches})
            rates = [rows / seconds[name] / 1e6 for name in ("cache", "batches")]
            met = own_recording([next(stream) for _ in range(200)])
            expected = (BATCH - 1) * (RECORDING - 1) / (store.rows - 1)
            print(
                f"| {store.rows * row_bytes / 1e9:.1f} GB, {np.dtype(dtype)} | {recordings} | {rates[0]:.1f} "
                f"| {rates[1]:.1f} | {rates[1] / rates[0]:.0%} | {met:.1f} | {expected:.1f} |",
                flush=True,
            )
            stream.close()


if __name__ == "__main__":
    main()
