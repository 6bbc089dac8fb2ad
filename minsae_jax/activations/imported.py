"""Stores of activations that another program computed: `write_store`."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, get_args

import numpy as np
from jaxtyping import Int

from minsae_jax.activations.manifest import ON_DISK, StoreIdentity, read_manifest
from minsae_jax.activations.store import Store, open_store, store_folder
from minsae_jax.activations.tokens import TokenGrid
from minsae_jax.activations.writer import StoreWriter
from minsae_jax.eeg.splits import Split
from minsae_jax.errors import UserError
from minsae_jax.settings import JsonObject

SHARD_TOKENS = 1 << 18  # a shard ends with the part of the activations that reaches this size


def _check_places(
    places: Int[np.ndarray, "3 sequences"], n_recordings: int, n_vars: int | None
) -> None:
    """Raise UserError if places are not sorted or out of range; see `write_store`."""
    recording, window, channel = np.sign(np.diff(places, axis=1))
    # With these weights the sum has the sign of the first of the three that changes.
    is_sorted = 4 * recording + 2 * window + channel > 0
    if not is_sorted.all():
        i = int(np.argmin(is_sorted)) + 1
        raise UserError(
            f"sequence {i} comes before the one in front of it, or is the same; sort sequences "
            "by recording, then window, then channel"
        )
    _check_range("recording", places[0], 0, n_recordings)
    _check_range("window", places[1], 0, np.inf)
    _check_range("channel", places[2], -1, np.inf if n_vars is None else n_vars)


def _int32(name: str, values: Sequence[int] | np.ndarray) -> Int[np.ndarray, " n"]:
    """Return integers as int32. Raises UserError if they are others, such as times in seconds."""
    array = np.asarray(values)
    # An empty list has the dtype float64.
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise UserError(f"{name} must be a list of integers, got {array.dtype}{list(array.shape)}")
    _check_range(name, array, -1, 2**31)
    return array.astype(np.int32)


def _check_range(name: str, values: Int[np.ndarray, " n"], lowest: int, limit: int | float) -> None:
    """Raise UserError unless all values are at least `lowest` and below `limit`."""
    if values.size and not lowest <= values.min() <= values.max() < limit:
        raise UserError(
            f"{name} is {values.min()} to {values.max()}; expected {lowest} to {limit - 1}"
        )


def write_store(
    out: str | Path,
    activations: Any,
    *,
    encoder: str,
    tokens: TokenGrid,
    seq_len: int,
    recordings: Sequence[str],
    recording: Sequence[int] | np.ndarray,
    window: Sequence[int] | np.ndarray,
    channel: Sequence[int] | np.ndarray | None = None,
    sampling_rate: int | float | None = None,
    channels: Sequence[str] | None = None,
    layer: int = -1,
    split: str = "train",
    overwrite: bool = False,
) -> Store:
    """Write activations as the store out/l{layer}, and return it.

    out: "_val" and "_test" are added for these splits, so that training and evaluation find them.
    activations: floats [sequences, n_tokens, d_model], or an iterable of parts of them in order, so
    that memory does not grow with the store. float16 and bfloat16 stay, others become float32, and
    so do tensors of PyTorch.
    encoder: names the model and its weights; stores, runs and evaluations are matched by it.
    tokens: places of the tokens of a sequence. seq_len: samples per window.
    recordings: file names. Each sequence is a window, or a single channel of one: `recording` is
    an index into `recordings`, `window` a number (its samples begin at window * seq_len), `channel`
    a column, or -1 or None for whole windows. Sequences are sorted by these three.
    sampling_rate (in Hz), channels (names): of the recordings; needed if they have a dataset.json.

    Raises UserError if arrays do not fit each other or contain NaN or infinity, or if the folder
    contains other files or, unless `overwrite`, a store. One that an interrupted call of the same
    settings left is written anew.
    """
    # Integers of NumPy cannot be written to JSON.
    layer = int(layer)
    seq_len = int(seq_len)
    folder = store_folder(out, split, layer)
    existing = None if overwrite else read_manifest(folder)
    if existing is not None and existing.complete:
        raise UserError(f"{folder} contains a store; choose another folder, or use overwrite=True")
    if channel is None:
        channel = np.full(len(recording), -1)
    if len({len(recording), len(window), len(channel)}) > 1:
        raise UserError("recording, window and channel must have one entry for each sequence")
    places = np.stack(
        [_int32("recording", recording), _int32("window", window), _int32("channel", channel)]
    )
    n_vars = None if channels is None else len(channels)
    _check_places(places, len(recordings), n_vars)
    if len(set(recordings)) < len(recordings):
        raise UserError("recordings contains duplicate names")
    if split not in get_args(Split):
        raise UserError(f"split must be one of {', '.join(get_args(Split))}, got {split!r}")
    # A padded patch can end after the window, but not begin there.
    _check_range("first of tokens", tokens.first, -1, seq_len)
    _check_range("channel of tokens", tokens.channel, -1, np.inf if n_vars is None else n_vars)
    parts = _checked_parts(activations, tokens.n_tokens)
    first = next(parts, None)
    if first is None:
        raise UserError("there are no activations")
    data: JsonObject = {"split": split, "seq_len": seq_len, "revin": False}
    if sampling_rate is not None:
        if not 0 < sampling_rate < np.inf:
            raise UserError(f"sampling_rate must be positive and finite, got {sampling_rate}")
        data["sampling_rate"] = float(sampling_rate)
    if channels is not None:
        data["channels"] = list(channels)
    identity = StoreIdentity(
        layer=layer,
        layer_index=layer,
        dtype=str(first.dtype),
        n_tokens=tokens.n_tokens,
        d_model=first.shape[2],
        encoder=hashlib.sha256(encoder.encode()).hexdigest(),
        data=data,
    )
    # One that was interrupted is written from its start, since its activations may be others now.
    is_interrupted = existing is not None and StoreIdentity.to_json(existing) == identity.to_json()
    with StoreWriter(folder, identity, overwrite or is_interrupted) as writer:
        writer.begin()
        n_sequences = 0
        for number, pieces in enumerate(_shards(chain([first], parts))):
            writer.write(number, pieces)
            n_sequences += sum(map(len, pieces))
        if n_sequences != places.shape[1]:
            raise UserError(
                f"there are {n_sequences} sequences, but {places.shape[1]} entries of "
                "recording, window and channel"
            )
        provenance = {
            "recordings": np.array(recordings),
            "shifted": np.zeros(len(recordings), bool),
            **dict(zip(("recording", "window", "channel"), places, strict=True)),
        }
        writer.finish(provenance, tokens)
    return open_store(folder)


def _checked_parts(activations: Any, n_tokens: int) -> Iterator[np.ndarray]:
    """Yield the activations in parts of one dtype and d_model."""
    parts: Iterable[Any] = activations
    if hasattr(activations, "shape"):
        parts = [activations]
    expected = None
    for part in parts:
        if hasattr(part, "detach"):
            # NumPy reads no tensors of PyTorch in bfloat16, with a gradient, or on a GPU.
            part = part.detach().cpu().float()
        x = np.asarray(part)
        if str(x.dtype) not in ON_DISK:
            # Numbers beyond float32 become infinite, which is refused below.
            with np.errstate(over="ignore"):
                x = x.astype(np.float32)
        if x.ndim != 3 or x.shape[1] != n_tokens or 0 in x.shape:
            raise UserError(
                f"activations must be [sequences, {n_tokens} tokens, d_model], got {list(x.shape)}"
            )
        expected = expected or (x.shape[2], x.dtype)
        if (x.shape[2], x.dtype) != expected:
            raise UserError(
                f"all activations must have one d_model and dtype, got {x.shape[2]}, {x.dtype} "
                f"after {expected[0]}, {expected[1]}"
            )
        if not np.isfinite(x.astype(np.float32, copy=False)).all():
            raise UserError("the activations contain NaN or infinity")
        yield x


def _shards(parts: Iterable[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """Group parts into shards, each a list of parts."""
    shard: list[np.ndarray] = []
    n_tokens = 0
    for part in parts:
        shard.append(part)
        n_tokens += part.shape[0] * part.shape[1]
        if n_tokens >= SHARD_TOKENS:
            yield shard
            shard = []
            n_tokens = 0
    if shard:
        yield shard
