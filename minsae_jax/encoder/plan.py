"""The plan of an extraction: recordings, layers and stores, checked before anything is written."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minsae_jax.activations.manifest import StoreIdentity
from minsae_jax.activations.writer import StoreWriter
from minsae_jax.eeg.description import read_description
from minsae_jax.eeg.recordings import Windows, recordings_folder
from minsae_jax.eeg.scan import Recordings, open_recordings
from minsae_jax.eeg.splits import Split
from minsae_jax.encoder.base import BaseEncoder, ComputeOptions, EncoderSpec, check_recordings
from minsae_jax.encoder.compute import DTYPES
from minsae_jax.encoder.config import ExtractConfig
from minsae_jax.errors import UserError
from minsae_jax.monitor import size_text


@dataclass(frozen=True)
class SplitPlan:
    """The stores to write for one split, one per layer."""

    split: Split
    recordings: Recordings
    layers: tuple[int, ...]  # numbers in the encoder's spec
    writers: tuple[StoreWriter, ...]  # one per layer

    @property
    def windows(self) -> Windows:
        return self.recordings.windows


def plan_extraction(
    encoder: BaseEncoder, config: ExtractConfig, options: ComputeOptions
) -> list[SplitPlan]:
    """Read all recordings once and check that every store can be written."""
    layers = requested_layers(config, encoder.spec)
    all_recordings = open_fitting_recordings(config, encoder.spec)
    plans = []
    for split, recordings in zip(config.split, all_recordings, strict=True):
        writers = []
        for index, layer in layers.items():
            identity = _store_identity(encoder, config, options, split, recordings, layer, index)
            from_end = encoder.spec.layers.index(index) - len(encoder.spec.layers)
            folder = config.store(split, layer)
            writer = StoreWriter(folder, identity, config.overwrite, layer_from_end=from_end)
            writers.append(writer)
        plans.append(SplitPlan(split, recordings, tuple(layers), tuple(writers)))
    return plans


def open_fitting_recordings(config: ExtractConfig, spec: EncoderSpec) -> list[Recordings]:
    """Read the recordings of each split once.

    Raises UserError if they do not fit the encoder, or are unusable.
    """
    description = read_description(recordings_folder(Path(config.root_path)))
    check_recordings(spec, description, config.allow_mismatch)
    max_windows = None
    if config.max_batches is not None:
        max_windows = config.max_batches * config.batch_size
    return open_recordings(
        config.root_path,
        config.split,
        config.split_seed,
        spec.window_shape,
        max_windows,
        config.on_bad_recording,
    )


def requested_layers(config: ExtractConfig, spec: EncoderSpec) -> dict[int, int]:
    """Return index from 0 -> layer as requested. Raises UserError on duplicates."""
    if config.cache_layer == ("all",):
        return {i: i for i in spec.layers}
    requested = [int(layer) for layer in config.cache_layer]
    layers = {spec.layer_index(layer): layer for layer in requested}
    if len(layers) < len(requested):
        listed = " ".join(map(str, requested))
        raise UserError(f"--cache_layer contains duplicate layers: {listed}")
    return layers


def _store_identity(
    encoder: BaseEncoder,
    config: ExtractConfig,
    options: ComputeOptions,
    split: Split,
    recordings: Recordings,
    layer: int,
    index: int,
) -> StoreIdentity:
    """Return the settings and sources of a store, by which `StoreWriter` recognises it."""
    # Part of the store's format: stores with other names or values are refused.
    spec = encoder.spec
    return StoreIdentity(
        layer=layer,
        layer_index=index,
        dtype=config.dtype,
        n_tokens=spec.tokens.n_tokens,
        d_model=spec.d_model,
        encoder=encoder.fingerprint,
        data={
            "split": split,
            "split_seed": config.split_seed,
            "batch_size": config.batch_size,
            "max_batches": config.max_batches,
            "seq_len": spec.seq_len,
            "patch_len": spec.reserved_samples,
            "n_vars": spec.n_vars,
            "revin": encoder.applies_revin(options),
            "n_windows": len(recordings.windows),
            "recordings_sha256": recordings.sha256,
            "skipped": recordings.skipped,
            "precision": config.precision,
            **recordings.described(),
        },
    )


def check_free_space(spec: EncoderSpec, config: ExtractConfig, plans: list[SplitPlan]) -> None:
    """Raise UserError if a file system has less space than its stores still need."""
    window_numbers = spec.n_sequences * spec.tokens.n_tokens * spec.d_model
    window_bytes = window_numbers * np.dtype(DTYPES[config.dtype]).itemsize
    # Stores on one file system share its free space, so they are added up by device number.
    needed: dict[Path, int] = {}
    folder_of_device: dict[int, Path] = {}
    for plan in plans:
        store_bytes = len(plan.windows) * window_bytes
        for writer in plan.writers:
            ancestors = (writer.folder, *writer.folder.absolute().parents)
            existing = next(path for path in ancestors if path.is_dir())
            place = folder_of_device.setdefault(existing.stat().st_dev, existing)
            written = sum(path.stat().st_size for path in writer.folder.glob("b*.npy"))
            needed[place] = needed.get(place, 0) + store_bytes - written
    for place, n_bytes in needed.items():
        free = shutil.disk_usage(place).free
        if n_bytes > free:
            raise UserError(
                f"the activations need {size_text(n_bytes)}, but {place} has {size_text(free)} "
                "free; free some space, choose another --out, or use --dtype bfloat16"
            )
