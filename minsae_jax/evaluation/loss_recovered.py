"""How much of the pretraining task survives when a member's x̂ stands in the place of the layer's activations."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from minsae_jax.encoder.converted import Encoder
from minsae_jax.encoder.patchtst.masked_error import masked_errors
from minsae_jax.evaluation.dataset import Dataset
from minsae_jax.monitor import progress
from minsae_jax.parallel.mesh import make_mesh, put_batch, replicated
from minsae_jax.sae.kinds import KINDS
from minsae_jax.sae.member import SparseAutoencoder

BATCH = 16  # windows


def substitution_errors(
    encoder: Encoder, dataset: Dataset, layer: int, saes: Sequence[SparseAutoencoder],
    mean: Float[np.ndarray, " d_model"], n_windows: int, mask_ratio: float, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Masked-patch errors of the untouched encoder, of mean- and zero-ablation, and of each autoencoder (`members`).

    They are means over n_windows windows from all over the recordings, with the same random masks for all: each hides a
    share mask_ratio of the patches, in all channels alike, as gPatchTST's pretraining does. `mean` is the layer's mean
    activation.
    """
    a = encoder.architecture
    mesh, rng = make_mesh(), np.random.default_rng(seed)
    own = {"mean": np.asarray(mean, np.float32), "saes": [sae.params for sae in saes]}
    params, own = jax.device_put((encoder.params, own), replicated(mesh))
    run = masked_errors(mesh, a, layer, dataset.store.require_manifest().data["revin"], _variants)
    places = _some_windows(dataset, n_windows, rng)
    batch = -(-min(BATCH, len(places)) // mesh.size) * mesh.size
    errors = []
    with progress("substitute", len(places), "windows", delay=2.0) as bar:
        for start in range(0, len(places), batch):
            some = places[start : start + batch]
            x = np.stack([np.asarray(dataset.window_of(*place), np.float32) for place in some])
            masks = np.stack([_mask(a.n_patches, mask_ratio, rng) for _ in some])
            rows = tuple(put_batch(mesh, rows, batch // mesh.size) for rows in (x, masks))
            errors.append(np.asarray(run(params, own, rows), np.float64)[: len(some)])
            bar.advance(len(some))
    untouched, by_mean, by_zero, *members = np.concatenate(errors).mean(0)
    return {
        "windows": len(places),
        "untouched": float(untouched),
        "mean_ablation": float(by_mean),
        "zero_ablation": float(by_zero),
        "members": [float(error) for error in members],
    }


def loss_recovered(ablated: float, substituted: float, untouched: float) -> float:
    """1 where nothing is lost, 0 where it is as bad as ablation.

    >>> loss_recovered(ablated=5.0, substituted=2.0, untouched=1.0)
    0.75
    """
    return (ablated - substituted) / (ablated - untouched) if ablated != untouched else float("nan")


def _variants(
    own: dict[str, Any], x: Float[Array, "T d_model"]
) -> Float[Array, "variants T d_model"]:
    reconstructed = [
        KINDS["relu"].decode(params, KINDS["relu"].encode(params, x)) for params in own["saes"]
    ]
    return jnp.stack([x, jnp.broadcast_to(own["mean"], x.shape), jnp.zeros_like(x), *reconstructed])


def _some_windows(dataset: Dataset, count: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """(recording, window), without doubles."""
    places = np.unique(np.stack([dataset.recording, dataset.window], axis=1), axis=0)
    chosen = np.sort(rng.permutation(len(places))[:count])
    return [(int(recording), int(window)) for recording, window in places[chosen]]


def _mask(n_patches: int, ratio: float, rng: np.random.Generator) -> np.ndarray:
    mask = np.zeros(n_patches, bool)
    mask[rng.permutation(n_patches)[: max(1, int(n_patches * ratio))]] = True
    return mask
