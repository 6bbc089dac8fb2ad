"""Recordings through the encoder into stores of activations: `python -m minsae_jax extract`."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax import nnx

from minsae_jax import sharding
from minsae_jax.activations.writer import StoreWriter, refuse_other_store
from minsae_jax.config import Extract, Split, UserError
from minsae_jax.eeg.recordings import Survey, Windows, open_windows
from minsae_jax.encoder.converted import Encoder
from minsae_jax.encoder.patchtst import layer_count
from minsae_jax.monitor import progress

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@dataclass(frozen=True)
class Plan:
    """A store to be written."""

    split: Split
    folder: Path
    windows: Windows
    survey: Survey
    identity: dict[str, Any]  # what makes a store this store


def extract(encoder: Encoder, settings: Extract) -> Iterator[str]:
    """Write the store of every split asked for, or what is missing of it; yields what to tell of each.

    Raises UserError, before anything is written, on recordings that do not fit the encoder or hold NaN, and on another
    store in a folder.
    """
    plans = [_plan(encoder, settings, split) for split in settings.split]
    for plan in plans:
        with StoreWriter(plan.folder, plan.identity, settings.overwrite) as writer:
            yield _write(encoder, settings, plan, writer)


def _plan(encoder: Encoder, settings: Extract, split: Split) -> Plan:
    a, folder = encoder.architecture, settings.store(split)
    layer_index = layer_count(settings.cache_layer, a.n_layers) - 1
    windows = open_windows(str(settings.root_path), split, settings.split_seed, a.seq_len, a.patch_len, a.n_vars)
    if settings.max_batches:
        windows = windows.first(min(settings.max_batches * settings.batch_size, len(windows)))
    survey = windows.survey()
    identity = {
        "layer": settings.cache_layer,
        "layer_index": layer_index,
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
            "recordings_sha256": survey.sha256,
        },
    }
    if not settings.overwrite:
        refuse_other_store(folder, identity)
    return Plan(split, folder, windows, survey, identity)


def _write(encoder: Encoder, settings: Extract, plan: Plan, writer: StoreWriter) -> str:
    windows, a = plan.windows, encoder.architecture
    if writer.finished:
        return f"the store {plan.folder} is finished already: {len(windows):,} windows of split {plan.split}"
    _warn_of_shifted(plan)
    todo = [i for i in range(-(-len(windows) // settings.batch_size)) if i not in writer.done]
    with progress(f"extract {plan.split}", len(windows), "windows") as bar:
        bar.start_at(len(windows) - sum(len(range(*_bounds(i, settings, windows))) for i in todo))
        for number, activations in _batches(encoder, settings, windows, todo):
            if not np.isfinite(activations).all():
                raise UserError(
                    f"the encoder gives NaN or infinity in {settings.dtype} for windows from "
                    f"{number * settings.batch_size} on of split {plan.split}: see whether the recordings are in SD"
                )
            writer.write(number, activations)
            bar.advance(len(activations) // a.n_vars)
    writer.finish(_provenance(plan))
    tokens = len(windows) * a.n_vars * a.n_tokens
    return (
        f"{len(windows):,} windows of split {plan.split}, {tokens:,} tokens of d_model {a.d_model}, "
        f"written to {plan.folder}"
    )


def _bounds(number: int, settings: Extract, windows: Windows) -> tuple[int, int]:
    return number * settings.batch_size, min((number + 1) * settings.batch_size, len(windows))


def _batches(
    encoder: Encoder, settings: Extract, windows: Windows, todo: list[int]
) -> Iterator[tuple[int, np.ndarray]]:
    """Activations [sequences, n_tokens, d_model] of each batch; the next one is computed while the caller writes."""
    mesh = sharding.make_mesh()
    params = jax.device_put(encoder.params, sharding.everywhere(mesh))
    n_layers = layer_count(settings.cache_layer, encoder.architecture.n_layers)
    run = sharded_hidden(mesh, encoder.graph, n_layers, settings.force_revin, settings.dtype)
    # All batches are padded to one shape, so that there is one compilation.
    rows_per_device = -(-min(settings.batch_size, len(windows)) // mesh.shape[sharding.DATA])
    pending: tuple[int, int, jax.Array] | None = None
    for number in [*todo, None]:
        started = None
        if number is not None:
            x = windows.read(*_bounds(number, settings, windows))
            started = (number, len(x), run(params, sharding.put_rows(mesh, x, rows_per_device)))
        if pending is not None:
            z = np.asarray(pending[2])[: pending[1]]
            yield pending[0], z.reshape(-1, *z.shape[2:])
        pending = started


def sharded_hidden(
    mesh: jax.sharding.Mesh, graph: nnx.GraphDef, n_layers: int, force_revin: bool, dtype: str
) -> Callable[[Any, jax.Array], jax.Array]:
    """(params, windows) -> output of layer n_layers - 1, every device working on its own windows; full float32."""

    def on_one_device(params, past_values):
        with jax.default_matmul_precision("highest"):
            z = nnx.merge(graph, params).hidden(past_values, n_layers, force_revin)
        return z.astype(DTYPES[dtype])

    return jax.jit(sharding.on_rows(mesh, on_one_device))


def _warn_of_shifted(plan: Plan) -> None:
    shifted = [f for f, s in zip(plan.windows.files, plan.survey.shifted, strict=True) if s]
    if shifted:
        names = ", ".join(shifted[:3]) + (f" and {len(shifted) - 3} more" if len(shifted) > 3 else "")
        warnings.warn(
            f"last channel all zero in {names}: missing electrodes shifted the columns, so that channel names do not "
            "hold there; provenance.npz marks these recordings",
            stacklevel=2,
        )


def _provenance(plan: Plan) -> dict[str, np.ndarray]:
    """recordings [files] names; shifted [files]; of each sequence its recording (index of the name), window (number
    within the recording) and channel."""
    windows = plan.windows
    places = np.repeat(windows.places(0, len(windows)), windows.n_vars, axis=0).astype(np.int32)
    return {
        "recordings": np.array(windows.files),
        "shifted": plan.survey.shifted,
        "recording": places[:, 0],
        "window": places[:, 1],
        "channel": np.tile(np.arange(windows.n_vars, dtype=np.int32), len(windows)),
    }
