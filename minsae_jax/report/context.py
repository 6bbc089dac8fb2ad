"""The data that all feature cards share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from minsae_jax.eeg.montage import BANDS
from minsae_jax.encoder.base import BaseEncoder
from minsae_jax.evaluation.config import Band
from minsae_jax.evaluation.dataset import Dataset
from minsae_jax.report.examples import Activity, Tokens
from minsae_jax.report.excerpts import EventsByRecording, events_by_recording, shown_samples
from minsae_jax.report.findings import Findings
from minsae_jax.report.naming import Label
from minsae_jax.report.spectra import BaseSpectra, measure_base_spectra
from minsae_jax.sae.member import SparseAutoencoder

DEFAULT_BANDS = tuple(Band(*band) for band in BANDS)
MONTAGE_EXAMPLES = 8  # top examples with all channels
SPECTRA_SEED = 0  # of the segments for the base rates, and of the bootstrap


@dataclass(frozen=True)
class Context:
    """Data that all feature cards share."""

    dataset: Dataset
    sae: SparseAutoencoder
    activity: Activity
    # None if only the store is at hand
    encoder: BaseEncoder | None
    # Patches shown before and after an example's patch
    w: int
    bands: Sequence[Band]
    base: BaseSpectra
    # Decoder rows
    directions: Float[np.ndarray, "d_sae d_model"]
    labels: Mapping[int, Label]
    quantiles: Tokens
    events: EventsByRecording
    # Samples of EEG shown with an example
    n_samples: int
    # Top examples of a feature with all channels
    montage_examples: int
    # Results of the evaluation, None if there is none
    findings: Findings | None


def make_context(
    dataset: Dataset,
    sae: SparseAutoencoder,
    activity: Activity,
    encoder: BaseEncoder | None,
    w: int = 10,
    bands: Sequence[Band] = DEFAULT_BANDS,
    labels: Mapping[int, Label] | None = None,
    context_seconds: float | None = None,
    montage_examples: int = MONTAGE_EXAMPLES,
    findings: Findings | None = None,
) -> Context:
    """Compute the data that all cards share.

    w: patches before and after an example's patch with activations. context_seconds: of EEG shown
    with it, by default that of these patches.
    """
    return Context(
        dataset=dataset,
        sae=sae,
        activity=activity,
        encoder=encoder,
        w=w,
        bands=bands,
        base=measure_base_spectra(dataset, w, SPECTRA_SEED, bands),
        directions=sae.decoder_directions,
        labels=labels or {},
        quantiles=activity.quantiles(),
        events=events_by_recording(dataset),
        n_samples=shown_samples(dataset, w, context_seconds),
        montage_examples=montage_examples,
        findings=findings,
    )
