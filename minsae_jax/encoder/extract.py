"""Recordings through the encoder into a store of activations: `python -m minsae_jax extract`."""

import hashlib
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax import nnx

from minsae_jax import sharding
from minsae_jax.activations.shards import StoreWriter
from minsae_jax.config import Extract, Split
from minsae_jax.eeg.recordings import Windows, open_windows
from minsae_jax.encoder.converted import Encoder
from minsae_jax.encoder.patchtst import layer_count
from minsae_jax.monitor import progress

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def extract(encoder: Encoder, settings: Extract, split: Split) -> str:
    """Write the store of one split, or what is missing of it; returns what to tell.

    Raises UserError on recordings that do not fit the encoder, or another store in the folder.
    """
    a = encoder.architecture
    n_layers = layer_count(settings.cache_layer, a.n_layers)
    assert settings.root_path is not None
    windows = open_windows(settings.root_path, split, settings.split_seed, a.seq_len, a.patch_len, a.n_vars)
    n_batches = min(-(-len(windows) // settings.batch_size), settings.max_batches or len(windows))
    n_windows = min(len(windows), n_batches * settings.batch_size)
    folder = settings.store(split)
    writer = StoreWriter(folder, _identity(encoder, settings, split, windows), settings.overwrite)
    if writer.finished:
        return f"the store {folder} is finished already: {n_windows:,} windows of split {split}"
    _warn_of_shifted(windows)
    todo = [i for i in range(n_batches) if i not in writer.done]
    with progress(f"extract {split}", n_windows, "windows") as bar:
        bar.start_at(n_windows - sum(len(range(*_bounds(i, settings, n_windows))) for i in todo))
        for number, activations in _batches(encoder, settings, windows, n_layers, todo):
            writer.write(number, activations)
            bar.advance(len(activations) // a.n_vars)
    writer.finish(_provenance(windows, n_windows))
    tokens = n_windows * a.n_vars * a.n_tokens
    return f"{n_windows:,} windows of split {split}, {tokens:,} tokens of d_model {a.d_model}, written to {folder}"


def _bounds(number: int, settings: Extract, n_windows: int) -> tuple[int, int]:
    return number * settings.batch_size, min((number + 1) * settings.batch_size, n_windows)


def _batches(
    encoder: Encoder, settings: Extract, windows: Windows, n_layers: int, todo: list[int]
) -> Iterator[tuple[int, np.ndarray]]:
    """Activations [sequences, n_tokens, d_model] of each batch; the next one is computed while the caller writes."""
    mesh = sharding.make_mesh()
    params = jax.device_put(encoder.params, sharding.everywhere(mesh))
    run = sharded_hidden(mesh, encoder.graph, n_layers, settings.force_revin, settings.dtype)
    # All batches have one shape, so that there is one compilation; the last may be shorter, and is padded.
    padded = min(settings.batch_size, len(windows))
    padded += -padded % mesh.shape[sharding.DATA]
    pending: tuple[int, int, jax.Array] | None = None
    for number in [*todo, None]:
        started = None
        if number is not None:
            x = windows.read(*_bounds(number, settings, len(windows)))
            started = (number, len(x), run(params, sharding.put_rows(mesh, x, padded // mesh.shape[sharding.DATA])))
        if pending is not None:
            z = np.asarray(pending[2])[: pending[1]]
            yield pending[0], z.reshape(-1, *z.shape[2:])
        pending = started


def sharded_hidden(mesh: jax.sharding.Mesh, graph: nnx.GraphDef, n_layers: int, force_revin: bool, dtype: str):
    def on_one_device(params, past_values):
        with jax.default_matmul_precision("highest"):
            z = nnx.merge(graph, params).hidden(past_values, n_layers, force_revin)
        return z.astype(DTYPES[dtype])

    return jax.jit(sharding.on_rows(mesh, on_one_device))


def _identity(encoder: Encoder, settings: Extract, split: Split, windows: Windows) -> dict[str, Any]:
    """What makes a store this store."""
    a = encoder.architecture
    return {
        "layer": settings.cache_layer,
        "layer_index": layer_count(settings.cache_layer, a.n_layers) - 1,
        "dtype": settings.dtype,
        "n_tokens": a.n_tokens,
        "d_model": a.d_model,
        "encoder": encoder.fingerprint,
        "data": {
            "split": split,
            "split_seed": settings.split_seed,
            "batch_size": settings.batch_size,
            "max_batches": settings.max_batches,
            "seq_len": a.seq_len,
            "patch_len": a.patch_len,
            "n_vars": a.n_vars,
            "revin": a.revin or settings.force_revin,
            "n_windows": len(windows),
            "recordings_sha256": _recordings_digest(windows),
        },
    }


def _recordings_digest(windows: Windows, sample: int = 4096) -> str:
    """sha256 over every recording's name, length, size, and first and last bytes."""
    digest = hashlib.sha256()
    for name, length in zip(windows.files, windows.lengths, strict=True):
        with (windows.folder / name).open("rb") as f:
            size = f.seek(0, 2)
            digest.update(f"{name} {length} {size}".encode())
            for start in (0, max(0, size - sample)):
                f.seek(start)
                digest.update(f.read(sample))
    return digest.hexdigest()


def _warn_of_shifted(windows: Windows) -> None:
    shifted = [f for f, s in zip(windows.files, windows.shifted, strict=True) if s]
    if shifted:
        names = ", ".join(shifted[:3]) + (f" and {len(shifted) - 3} more" if len(shifted) > 3 else "")
        warnings.warn(
            f"last channel all zero in {names}: missing electrodes shifted the columns, so that channel names do not "
            "hold there; provenance.npz marks these recordings",
            stacklevel=2,
        )


def _provenance(windows: Windows, n_windows: int) -> dict[str, np.ndarray]:
    """recordings [files] names; shifted [files]; of each sequence its recording (index of the name), window (number
    within the recording) and channel."""
    places = np.repeat(windows.places(0, n_windows), windows.n_vars, axis=0).astype(np.int32)
    return {
        "recordings": np.array(windows.files),
        "shifted": windows.shifted,
        "recording": places[:, 0],
        "window": places[:, 1],
        "channel": np.tile(np.arange(windows.n_vars, dtype=np.int32), n_windows),
    }
