"""Number of feature pages and of montages that keep the report small."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from minsae_jax.evaluation.dataset import Dataset
from minsae_jax.report.context import MONTAGE_EXAMPLES, RANDOM_EXAMPLES
from minsae_jax.report.examples import N_QUANTILES, Activity
from minsae_jax.report.excerpts import montage_step
from minsae_jax.sae.member import SparseAutoencoder

REPORT_BYTES = 250_000_000
# Measured on the demo: of a page without EEG, and per sample, gzipped and as base64
PAGE_BYTES = 3000
SAMPLE_BYTES = 1.1


@dataclass(frozen=True)
class Budget:
    """Number of features with a page, and of their examples with all channels."""

    n_features: int
    montage_examples: int


def plan_pages(
    dataset: Dataset, n_samples: int, top: int, n_active: int, n_features: int | None
) -> Budget:
    """Return the number of features and montages that fit in REPORT_BYTES.

    First the montages are reduced from MONTAGE_EXAMPLES to 1, then the number of features.
    n_samples: of EEG in an example. top: strongest examples. n_active: features that are active.
    n_features: as requested; None for as many as fit.
    """
    trace = SAMPLE_BYTES * n_samples
    page = PAGE_BYTES + (top + N_QUANTILES + RANDOM_EXAMPLES) * trace
    montage = dataset.n_vars * trace / montage_step(dataset.sampling_rate)
    requested = n_active if n_features is None else min(n_features, n_active)
    left = REPORT_BYTES / max(1, requested) - page
    montages = int(np.clip(left // montage, 1, MONTAGE_EXAMPLES))
    if n_features is not None:
        return Budget(requested, montages)
    fitting = int(REPORT_BYTES // (page + montages * montage))
    return Budget(min(requested, fitting), montages)


def choose_features(
    sae: SparseAutoencoder, activity: Activity, first: Iterable[int], n_features: int
) -> list[int]:
    """Return the features that get a page, in order.

    Those in `first` (labelled ones, and the best of each event), then those that add most to x̂: the
    sum of their activations times the norm of their decoder row.
    """
    contribution = activity.total * np.linalg.norm(sae.decoder_directions, axis=1)
    order = np.argsort(-contribution, kind="stable").tolist()
    is_active = activity.active > 0
    ranked = dict.fromkeys([*first, *order])
    return sorted([feature for feature in ranked if is_active[feature]][:n_features])
