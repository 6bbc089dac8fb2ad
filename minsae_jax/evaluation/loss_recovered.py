"""Loss recovered: how well the encoder's pretraining task works on a member's x̂."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from minsae_jax.encoder.base import BaseEncoder, ComputeOptions, Substitutes
from minsae_jax.estimates import Estimate
from minsae_jax.evaluation.bootstrap import draw_patients, interval
from minsae_jax.evaluation.dataset import Dataset
from minsae_jax.monitor import progress
from minsae_jax.parallel.mesh import make_mesh, put_batch, replicated
from minsae_jax.sae.kinds import Params, SAEKind
from minsae_jax.sae.member import SparseAutoencoder

BATCH_WINDOWS = 16


@dataclass(frozen=True)
class SubstitutionErrors:
    """Mean squared errors on the masked patches of each window, for each substitute of a layer."""

    # On the activations themselves, their mean, zero, and an SAE's x̂
    by_window: Float[np.ndarray, "4 windows"]
    # Of each window, as an index into the dataset's
    recording: Int[np.ndarray, " windows"]

    @property
    def windows(self) -> int:
        return self.by_window.shape[1]

    @property
    def untouched(self) -> float:
        """Error on the layer's activations themselves, mean over windows."""
        return float(self.by_window[0].mean())

    @property
    def mean_ablation(self) -> float:
        return float(self.by_window[1].mean())

    @property
    def zero_ablation(self) -> float:
        return float(self.by_window[2].mean())


@dataclass(frozen=True)
class LossRecovered:
    """The pretraining task on one SAE's x̂: errors are means over windows and masked patches."""

    masked_error: float
    # 1: nothing is lost; 0: as bad as mean-ablation; NaN: ablation loses nothing
    loss_recovered: Estimate
    loss_recovered_of_zero_ablation: float
    # Errors of the untouched encoder, mean-ablation and zero-ablation on the same windows
    untouched_error: float
    mean_ablation_error: float
    zero_ablation_error: float


def summarise(errors: SubstitutionErrors, recordings: Sequence[str], seed: int) -> LossRecovered:
    """Return the result of an SAE, with an interval by resampling patients.

    recordings: file names of the dataset's recordings.
    """
    untouched, by_mean, by_zero, member = errors.by_window.mean(axis=1).tolist()
    present, index = np.unique(errors.recording, return_inverse=True)
    resamples = draw_patients([recordings[i] for i in present], seed)
    sums = np.zeros((len(present), len(errors.by_window)))
    np.add.at(sums, index, errors.by_window.T)
    # Sums, not means, over windows: their number cancels in the ratio.
    resampled = resamples.weights[:, resamples.unit] @ sums
    # NaN in resamples where ablation loses nothing, as in `loss_recovered`
    ablation = resampled[:, 1] - resampled[:, 0]
    gain = resampled[:, 1] - resampled[:, 3]
    recovered = gain / np.where(ablation > 0, ablation, np.nan)
    value = loss_recovered(by_mean, member, untouched)
    within = None
    if not np.isnan(value):
        within = interval(recovered, resamples.n_units(index))
    return LossRecovered(
        masked_error=member,
        loss_recovered=Estimate(value, within),
        loss_recovered_of_zero_ablation=loss_recovered(by_zero, member, untouched),
        untouched_error=untouched,
        mean_ablation_error=by_mean,
        zero_ablation_error=by_zero,
    )


class _Substitutes(NamedTuple):
    # The layer's mean activation [d_model]
    mean: Any
    saes: list[Params]


def substitution_errors(
    encoder: BaseEncoder,
    dataset: Dataset,
    layer: int,
    saes: Sequence[SparseAutoencoder],
    mean: Float[np.ndarray, " d_model"],
    n_windows: int,
    mask_ratio: float,
    seed: int = 0,
) -> list[SubstitutionErrors]:
    """Return the pretraining errors with the output of a layer replaced, for each SAE.

    Windows are drawn from all recordings. In each a share mask_ratio of the patches is masked as in
    the encoder's pretraining; all substitutes get the same masks.
    mean: the layer's mean activation, for mean-ablation.
    """
    reconstruction = encoder.reconstruction
    assert reconstruction is not None, encoder.reconstruction_note
    mesh = make_mesh()
    rng = np.random.default_rng(seed)
    substitutes = _Substitutes(np.asarray(mean, np.float32), [sae.params for sae in saes])
    params, substitutes = jax.device_put((encoder.params, substitutes), replicated(mesh))
    kinds = [sae.kind for sae in saes]
    revin = dataset.store.require_manifest().data["revin"]
    options = ComputeOptions(force_revin=revin)
    run = reconstruction.masked_errors(mesh, layer, options, _variants(kinds))
    places = _draw_windows(dataset, n_windows, rng)
    # Every batch has the same number of windows, a multiple of the number of devices.
    batch = -(-min(BATCH_WINDOWS, len(places)) // mesh.size) * mesh.size
    errors = []
    with progress("substitute", len(places), "windows", delay=2.0) as bar:
        for start in range(0, len(places), batch):
            batch_places = places[start : start + batch]
            windows = [dataset.window_of(*place) for place in batch_places]
            x = np.stack(windows).astype(np.float32)
            masks = np.stack([reconstruction.draw_mask(mask_ratio, rng) for _ in batch_places])
            per_device = batch // mesh.size
            rows = (put_batch(mesh, x, per_device), put_batch(mesh, masks, per_device))
            batch_errors = np.asarray(run(params, substitutes, rows), np.float64)
            errors.append(batch_errors[: len(batch_places)])
            bar.advance(len(batch_places))
    recording = np.array([recording for recording, _ in places])
    by_window = np.concatenate(errors).T
    return [SubstitutionErrors(by_window[[0, 1, 2, 3 + i]], recording) for i in range(len(saes))]


def loss_recovered(ablated: float, substituted: float, untouched: float) -> float:
    """Return 1 if nothing is lost, 0 for the error of ablation, NaN if ablation loses nothing.

    Where ablation lowers the error, the ratio would be the largest for the largest error.

    >>> loss_recovered(ablated=5.0, substituted=2.0, untouched=1.0)
    0.75
    """
    if ablated <= untouched:
        return float("nan")
    return (ablated - substituted) / (ablated - untouched)


def _variants(kinds: Sequence[SAEKind]) -> Substitutes:
    """Return a function from activations to all their replacements.

    They are in the order of SubstitutionErrors, with the x̂ of all SAEs. kinds: of each SAE.
    """

    def variants(
        substitutes: _Substitutes,
        x: Float[Array, "T d_model"],
    ) -> Float[Array, "variants T d_model"]:
        by_mean = jnp.broadcast_to(substitutes.mean, x.shape)
        by_members = []
        for kind, params in zip(kinds, substitutes.saes, strict=True):
            by_members.append(kind.decode(params, kind.encode(params, x)))
        return jnp.stack([x, by_mean, jnp.zeros_like(x), *by_members])

    return variants


def _draw_windows(dataset: Dataset, count: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Return up to `count` distinct (recording, window), sorted."""
    windows = dataset.windows
    # Sorted, so that recordings are read one after the other.
    chosen = np.sort(rng.permutation(len(windows))[:count])
    return [(recording, window) for recording, window in windows[chosen].tolist()]
