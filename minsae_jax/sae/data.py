"""What a run trains on and is measured on, checked before its folder appears."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from warnings import warn

import numpy as np
from jaxtyping import Float

from minsae_jax.activations.store import Store, open_store, sibling_store
from minsae_jax.activations.stream import (
    ShuffleBuffers,
    Source,
    TokenStream,
    files_in_order,
    shuffled_tokens,
)
from minsae_jax.errors import UserError
from minsae_jax.parallel.processes import process_index
from minsae_jax.sae.config import TrainConfig
from minsae_jax.sae.member import Params, load_sae
from minsae_jax.sae.sweep import Group, make_groups

HELD_OUT_BATCH = 4096  # tokens


@dataclass(frozen=True)
class Inputs:
    settings: TrainConfig
    store: Source
    held_out: Store | None
    groups: tuple[Group, ...]
    start: Params | None  # weights of --init, for raw activations
    stream: TokenStream
    scale: (
        float | None
    )  # of the activations before they are trained on; None where the checkpoint has it


def check_inputs(
    settings: TrainConfig, store: Source, encoder_fingerprint: str | None, is_new: bool
) -> Inputs:
    """Stores, members and initial weights, all fitting one another. Raises UserError where they do not.

    A new run reads the whole stores once, to hold them against their checksums.
    """
    made_by = store.origin.encoder
    if encoder_fingerprint and made_by and made_by != encoder_fingerprint:
        raise UserError(
            f"the store {store.folder} is of another encoder ({made_by[:12]}…) than {settings.checkpoint_path} "
            f"({encoder_fingerprint[:12]}…): extract it again, or name the encoder that it is of"
        )
    groups = make_groups(settings, store.d_model)
    start = load_sae(settings.init) if settings.init else None
    wanted = [(store.d_model, group[0].d_sae) for group in groups]
    if start and set(wanted) != {(start.d_model, start.d_sae)}:
        raise UserError(
            f"--init {settings.init} is of d_model {start.d_model} and d_sae {start.d_sae}, but the sweep wants "
            f"{' and '.join(f'{d_model} and {d_sae}' for d_model, d_sae in wanted)}: see --feature_dim_factor"
        )
    stream = open_stream(settings, store)
    window = settings.eval_window * _tokens_a_step(settings, store)
    if window >= 2**31:
        raise UserError(
            f"--eval_window {settings.eval_window} is {window:,} tokens: it must be below {2**31:,}"
        )
    held_out = open_held_out(settings, store)
    if not is_new:
        return Inputs(settings, store, held_out, groups, None, stream, None)
    if process_index() == 0:
        store.verify()
        if held_out:
            held_out.verify()
    scale = measure_scale(settings, store)
    return Inputs(settings, store, held_out, groups, start.params if start else None, stream, scale)


def _tokens_a_step(settings: TrainConfig, store: Source) -> int:
    """At the most."""
    if settings.recipe == "minsae":
        return (settings.number_of_arrays or 1) * max(store.tokens_per_shard)
    return settings.batch_size or 1


def open_stream(settings: TrainConfig, store: Source) -> TokenStream:
    """The recipe's batches, from the first."""
    if settings.recipe == "minsae":
        return files_in_order(store, settings.number_of_arrays or 1)
    return shuffled_tokens(store, settings.batch_size or 1, settings.shuffle_seed or 0)


def open_held_out(settings: TrainConfig, store: Source) -> Store | None:
    """The store that members are measured on: the one that is named, else the sibling of a train store on disk, where
    there is one of the same encoder and layer."""
    if not settings.eval_every:
        return None
    if settings.val_store:
        held_out = open_store(settings.val_store, settings.cache_layer)
        if mismatch := _mismatch(store, held_out):
            raise UserError(f"--val_store {settings.val_store} {mismatch}")
        return held_out
    sibling = None if settings.live else sibling_store(Path(settings.store))
    if sibling is None or not sibling.is_dir():
        return None
    try:
        held_out = open_store(sibling, settings.cache_layer)
        mismatch = _mismatch(store, held_out)
    except UserError as e:
        mismatch = f"cannot be used ({e})"
    if mismatch:
        warn(
            f"nothing is held out: {sibling} {mismatch}; --val_store names another, --eval_every 0 none",
            stacklevel=2,
        )
        return None
    return held_out


def _mismatch(store: Source, held_out: Store) -> str | None:
    """Why the tokens of one are not of the other's kind, as far as that is known."""
    if held_out.total_tokens < 2:
        return "holds a single token"
    if held_out.d_model != store.d_model:
        return f"is of d_model {held_out.d_model}, but the train store of {store.d_model}"
    for name in ("encoder", "layer_index"):
        ours, theirs = getattr(store.origin, name), getattr(held_out.origin, name)
        if ours is not None and theirs is not None and ours != theirs:
            return f"is of another {name.removesuffix('_index')} than the train store"
    return None


def held_out_batches(
    settings: TrainConfig, held_out: Store
) -> Iterator[Float[np.ndarray, "tokens d_model"]]:
    """eval_tokens tokens from all over the store, always the same, or all of them once."""
    buffers = ShuffleBuffers(held_out, seed=0)
    left = min(settings.eval_tokens, held_out.total_tokens)
    for i in range(buffers.buffers_per_epoch):
        rows = buffers[i][:left]
        if not np.isfinite(rows.astype(np.float32, copy=False)).all():
            raise UserError(f"the store {held_out.folder} holds NaN or infinity: extract it again")
        for start in range(0, len(rows), HELD_OUT_BATCH):
            yield rows[start : start + HELD_OUT_BATCH]
        left -= len(rows)


def measure_scale(settings: TrainConfig, store: Source) -> float:
    """√d_model / mean ‖x‖₂ over the stream's first scale_tokens tokens, or over one epoch if that is less."""
    if settings.recipe == "minsae":
        return 1.0
    stream = open_stream(settings, store)
    wanted = min(settings.scale_tokens or 1, sum(store.tokens_per_shard))
    total, left = 0.0, wanted
    while left:
        norms = np.linalg.norm(next(stream)[:left].astype(np.float32, copy=False), axis=1)
        total += norms.sum(dtype=np.float64)
        left -= len(norms)
    if not np.isfinite(total) or total == 0:
        raise UserError(
            f"the store {store.folder} holds NaN, infinity, or nothing but zeros: extract it again"
        )
    return float(np.float32(store.d_model**0.5 * wanted / total))
