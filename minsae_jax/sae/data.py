"""The inputs of a run, opened and checked once, before its folder is created."""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from warnings import warn

import jax
import numpy as np
from jaxtyping import Float

from minsae_jax.activations.store import Store, open_store, sibling_store, warn_of_common_patients
from minsae_jax.activations.stream import (
    ShuffleBuffers,
    Source,
    TokenStream,
    files_in_order,
    shuffled_tokens,
)
from minsae_jax.errors import UserError
from minsae_jax.parallel.mesh import make_mesh, on_cpu
from minsae_jax.parallel.processes import WHOLE, Share, barrier, process_share, sum_over_processes
from minsae_jax.sae.config import TrainConfig, TrainPlan
from minsae_jax.sae.grid import Group, MemberSpec, make_groups
from minsae_jax.sae.kinds import Params
from minsae_jax.sae.member import SparseAutoencoder, load_sae

SAMPLE_BATCH = 4096  # tokens
MEDIAN_TOKENS = 32_768  # for the geometric median, as Gao et al. (2024)
MEDIAN_ITERATIONS = 100  # at most
SAME_NORM = 1e-3  # largest relative difference of decoder norms that counts as rounding


@dataclass(frozen=True)
class TrainData:
    """Checked inputs of a run."""

    store: Source
    held_out: Store | None
    stream: TokenStream  # in a cluster, this process's share of the tokens
    groups: tuple[Group, ...]
    # For the initial state of a new run; None when it resumes.
    start: Params | None  # weights of --init, for raw activations
    scale: float | None = None  # factor of the activations in training
    # Geometric median of the scaled tokens; None if no kind starts there.
    median: Float[np.ndarray, " d_model"] | None = None

    @property
    def members(self) -> list[MemberSpec]:
        """The members of all groups, one group after the other."""
        return list(chain.from_iterable(self.groups))

    @property
    def held_out_fingerprint(self) -> str | None:
        return self.held_out.fingerprint if self.held_out else None


def open_train_data(
    plan: TrainPlan, store: Source, encoder_fingerprint: str | None, is_new: bool
) -> TrainData:
    """Open and check everything that a run reads.

    A new run reads the whole stores once, to compare them with their checksums; the processes of a
    cluster share this. Raises UserError if stores, members, encoder and initial weights do not fit
    one another.
    """
    config = plan.config
    store_encoder = store.origin.encoder
    if encoder_fingerprint and store_encoder and store_encoder != encoder_fingerprint:
        raise UserError(
            f"the store {store.folder} is from another encoder ({store_encoder[:12]}…) than "
            f"{config.checkpoint_path} ({encoder_fingerprint[:12]}…); extract it again or choose "
            "the encoder that it is from"
        )
    groups = make_groups(plan, store.d_model)
    # Before the run's folder is created; the sweep makes the same mesh.
    make_mesh(*map(len, groups), shape=config.mesh)
    _check_memory(groups, store.d_model)
    if is_new and jax.process_index() == 0:
        _warn_of_settings_without_effect(config)
    start = _load_start(config, groups, store.d_model) if is_new else None
    stream = open_stream(plan, store, process_share())
    step_tokens = plan.batch_size or plan.number_of_arrays * max(store.tokens_per_shard)
    interval_tokens = config.eval_window * step_tokens
    # Feature counts of a log interval are int32.
    if interval_tokens >= 2**31:
        raise UserError(
            f"--eval_window {config.eval_window} is {interval_tokens:,} tokens; "
            f"it must be below {2**31:,}"
        )
    held_out = open_held_out(config, store)
    if config.events_path and held_out is None:
        raise UserError("--events_path requires a store of val patients and --eval_every above 0")
    if held_out and jax.process_index() == 0:
        warn_of_common_patients(held_out, store.recordings())
    if is_new:
        store.verify(process_share())
        if held_out:
            held_out.verify(process_share())
    return TrainData(
        store=store,
        held_out=held_out,
        stream=stream,
        groups=groups,
        start=start,
    )


def measure_scale_and_median(plan: TrainPlan, data: TrainData) -> TrainData:
    """Measure the scale and the median that a new run starts with, and add them to its inputs.

    Every process of a cluster must call this. Raises UserError if tokens are not finite, or all 0.
    """
    scale = measure_scale(plan, data.store)
    median = None
    if any(group[0].kind.starts_at_median for group in data.groups) and data.start is None:
        with barrier("read the store"):
            tokens = np.concatenate(list(first_tokens(plan, data.store, MEDIAN_TOKENS)))
        median = scale * geometric_median(sum_over_processes(tokens))
    return replace(data, scale=scale, median=median)


def _check_memory(groups: tuple[Group, ...], d_model: int) -> None:
    """Raise UserError if the sweep cannot fit into the memory of a machine without accelerators.

    There the kernel would kill the process without a message. Batches and features are not counted.
    """
    if not on_cpu() or jax.process_count() > 1:
        return
    numbers = 0
    for member in chain.from_iterable(groups):
        shapes = member.kind.shapes(d_model, member.d_sae)
        numbers += sum(math.prod(shape) for shape in shapes.values())
    n_bytes = 3 * 4 * numbers  # weights and Adam's two moments, float32
    memory = physical_memory()
    if memory is not None and n_bytes > memory:
        raise UserError(
            f"the weights and Adam's state of the sweep need {n_bytes / 1e9:.1f} GB, but this "
            f"machine has {memory / 1e9:.1f} GB of memory; use fewer members or a smaller "
            "--feature_dim_factor"
        )


def physical_memory() -> int | None:
    """Return the machine's memory in bytes; None where the system does not say."""
    names = ("SC_PHYS_PAGES", "SC_PAGE_SIZE")
    if not set(names) <= set(getattr(os, "sysconf_names", {})):
        return None
    return math.prod(os.sysconf(name) for name in names)


def _warn_of_settings_without_effect(config: TrainConfig) -> None:
    if config.target_l0 and config.jumprelu_penalty == "step":
        warn("--jumprelu_penalty step has no effect with --target_l0", stacklevel=2)
    if config.init is not None and len(config.seed) > 1:
        warn("--seed has no effect with --init: members of all seeds will be equal", stacklevel=2)


def _load_start(config: TrainConfig, groups: tuple[Group, ...], d_model: int) -> Params | None:
    """Return the weights of --init. Raises UserError if their shapes are not the sweep's."""
    if config.init is None:
        return None
    start = load_sae(config.init)
    kinds = sorted({group[0].kind.name for group in groups})
    if kinds != [start.kind.name]:
        raise UserError(
            f"--init {config.init} is of kind {start.kind.name}, but --kind is {' '.join(kinds)}"
        )
    sizes = sorted({group[0].d_sae for group in groups})
    if start.d_model != d_model or sizes != [start.d_sae]:
        expected = " and ".join(map(str, sizes))
        raise UserError(
            f"--init {config.init} has d_model {start.d_model} and d_sae {start.d_sae}, expected "
            f"{d_model} and {expected}; see --feature_dim_factor"
        )
    if jax.process_index() == 0:
        _warn_of_decoder_norms(config.init, start)
    return start.params


def _warn_of_decoder_norms(init: str, start: SparseAutoencoder) -> None:
    """Warn if a kind that selects features will select others, since norms become features'."""
    norms = np.linalg.norm(start.decoder_directions, axis=1)
    in_training = start.kind.normalize_decoder(start.params)["W_dec"]
    factors = np.linalg.norm(in_training, axis=1)[norms > 0] / norms[norms > 0]
    if factors.size and np.ptp(factors) > SAME_NORM * factors.max():
        warn(
            f"the decoder rows of --init {init} have different norms; {start.kind.name} trains "
            "with rows of norm 1 and selects features by activation times norm, so that x̂ is not "
            "the same at the start",
            stacklevel=2,
        )


def open_stream(plan: TrainPlan, store: Source, share: Share = WHOLE) -> TokenStream:
    """Return the recipe's endless batches, from the first; tokens not in the share are 0."""
    if plan.number_of_arrays:
        return files_in_order(store, plan.number_of_arrays, share)
    return shuffled_tokens(store, plan.batch_size, plan.shuffle_seed, share)


def open_held_out(config: TrainConfig, store: Source) -> Store | None:
    """Open the store that members are measured on.

    It is --val_store, or else the train store's sibling store_val if that exists and has the same
    encoder and layer. Raises UserError if --val_store does not fit.
    """
    if not config.eval_every:
        return None
    if config.val_store:
        held_out = open_store(config.val_store, config.cache_layer)
        mismatch = mismatch_of(store, held_out)
        if mismatch:
            raise UserError(f"--val_store {config.val_store} {mismatch}")
        return held_out
    sibling = None if config.live else sibling_store(Path(config.store), "val")
    if sibling is None or not sibling.is_dir():
        return None
    try:
        held_out = open_store(sibling, config.cache_layer)
        mismatch = mismatch_of(store, held_out)
    except UserError as e:
        mismatch = f"cannot be used ({e})"
    if mismatch:
        warn(
            f"no held-out metrics: {sibling} {mismatch}; choose another --val_store, or "
            "--eval_every 0",
            stacklevel=2,
        )
        return None
    return held_out


def mismatch_of(store: Source, held_out: Store, name_of_store: str = "train") -> str | None:
    """Return why the held-out tokens do not fit another store, such as the train store, or None."""
    # A single token has no variance, which FVU divides by.
    if held_out.total_tokens < 2:
        return "contains a single token"
    if held_out.d_model != store.d_model:
        return f"has d_model {held_out.d_model}, but the {name_of_store} store has {store.d_model}"
    for name in ("encoder", "layer_index", "revin"):
        expected = getattr(store.origin, name)
        actual = getattr(held_out.origin, name)
        is_known = expected is not None and actual is not None
        if is_known and expected != actual:
            if name == "revin":
                return f"was extracted with another --force_revin than the {name_of_store} store"
            return f"is from another {name.removesuffix('_index')} than the {name_of_store} store"
    return None


def sample_batches(store: Store, n_tokens: int) -> Iterator[Float[np.ndarray, "tokens d_model"]]:
    """Yield n_tokens tokens from all over the store, always the same, or all of them once.

    Raises UserError if one is not finite.
    """
    # A fixed seed: all runs on a store are measured on the same tokens.
    buffers = ShuffleBuffers(store, seed=0)
    n_missing = min(n_tokens, store.total_tokens)
    for i in range(buffers.buffers_per_epoch):
        if n_missing == 0:
            return
        tokens = buffers[i][:n_missing]
        if not np.isfinite(tokens.astype(np.float32, copy=False)).all():
            raise UserError(f"the store {store.folder} contains NaN or infinity; extract again")
        for first in range(0, len(tokens), SAMPLE_BATCH):
            yield tokens[first : first + SAMPLE_BATCH]
        n_missing -= len(tokens)


def measure_scale(plan: TrainPlan, store: Source) -> float:
    """Return √d_model / mean ‖x‖₂, over the stream's first scale_tokens or one epoch if less.

    Returns 1 if the recipe does not scale. Raises UserError if tokens are not finite, or all 0.
    """
    if not plan.scale_tokens:
        return 1.0
    # An error of one process must come before the sums over processes.
    with barrier("read the store"):
        batches = first_tokens(plan, store, plan.scale_tokens)
        norms_of_batches = [np.linalg.norm(tokens, axis=1) for tokens in batches]
    n_tokens = sum(map(len, norms_of_batches))
    total = 0.0
    for norms in map(sum_over_processes, norms_of_batches):
        total += norms.sum(dtype=np.float64)
    if not np.isfinite(total) or total == 0:
        raise bad_activations(plan.config, store, "NaN, infinity or only zeros")
    # Rounded to float32 as on the devices: the exported weights undo exactly this factor.
    return float(np.float32(store.d_model**0.5 * n_tokens / total))


def bad_activations(config: TrainConfig, source: Source, content: str) -> UserError:
    """Return the error for activations that cannot be trained on, since they contain `content`."""
    if config.live:
        return UserError(
            f"activations of the recordings in {source.folder} contain {content}; check that the "
            "recordings are in SD"
        )
    return UserError(f"the store {source.folder} contains {content}; extract it again")


def first_tokens(
    plan: TrainPlan, store: Source, n_tokens: int
) -> Iterator[Float[np.ndarray, "tokens d_model"]]:
    """Yield the first n_tokens of the stream in batches, or one epoch if that is less.

    In a cluster, tokens that other processes read are 0.
    """
    stream = open_stream(plan, store, process_share())
    n_missing = min(n_tokens, sum(store.tokens_per_shard))
    while n_missing:
        tokens = next(stream)[:n_missing].astype(np.float32, copy=False)
        n_missing -= len(tokens)
        yield tokens


def geometric_median(
    x: Float[np.ndarray, "tokens d_model"],
) -> Float[np.ndarray, " d_model"]:
    """Return the point with the least mean distance to the tokens (Weiszfeld's iteration).

    >>> geometric_median(np.array([[0.0], [1.0], [10.0]])).round(3).tolist()
    [1.0]
    """
    x = x.astype(np.float64)
    median = x.mean(0)
    for _ in range(MEDIAN_ITERATIONS):
        distances = np.linalg.norm(x - median, axis=1)
        # A token at the median would have an infinite weight.
        weights = 1 / np.maximum(distances, 1e-12)
        previous = median
        median = weights @ x / weights.sum()
        if np.linalg.norm(median - previous) <= 1e-6 * np.linalg.norm(median):
            break
    return median.astype(np.float32)
