"""The data that all feature cards share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from minsae_jax.encoder.base import BaseEncoder
from minsae_jax.evaluation.config import Band, ReportConfig, parse_bands
from minsae_jax.evaluation.dataset import Dataset
from minsae_jax.report.examples import Activity, Tokens
from minsae_jax.report.excerpts import (
    ChosenToken,
    EventsByRecording,
    read_events_by_recording,
    shown_samples,
)
from minsae_jax.report.findings import Findings
from minsae_jax.report.naming import Label
from minsae_jax.report.spectra import BaseSpectra, measure_base_spectra
from minsae_jax.sae.member import SparseAutoencoder

DEFAULT_BANDS = parse_bands(ReportConfig.bands)
MONTAGE_EXAMPLES = 8  # top examples with all channels
RANDOM_EXAMPLES = 6  # shown, of those that spectra are measured on
SPECTRA_SEED = 0  # of the segments for the base rates, and of the bootstrap


@dataclass(frozen=True)
class Context:
    """The data that all feature cards share; base rates and events are read on first use."""

    dataset: Dataset
    sae: SparseAutoencoder
    activity: Activity
    # None without an encoder
    encoder: BaseEncoder | None
    # Patches with activations before and after an example's patch
    w: int = 10
    bands: Sequence[Band] = DEFAULT_BANDS
    labels: Mapping[int, Label] = field(default_factory=dict)
    # Of EEG shown with an example; None for that of its patches
    context_seconds: float | None = None
    # Top examples of a feature with all channels
    montage_examples: int = MONTAGE_EXAMPLES
    # Results of the evaluation, if there is one
    findings: Findings = field(default_factory=Findings)

    @cached_property
    def base(self) -> BaseSpectra:
        return measure_base_spectra(self.dataset, self.w, SPECTRA_SEED, self.bands)

    @cached_property
    def quantiles(self) -> Tokens:
        return self.activity.quantiles()

    @cached_property
    def events(self) -> EventsByRecording:
        return read_events_by_recording(self.dataset)

    @cached_property
    def n_samples(self) -> int:
        """Samples of EEG shown with an example."""
        return shown_samples(self.dataset, self.w, self.context_seconds)

    def examples_of(self, feature: int) -> list[ChosenToken]:
        """Return the tokens of a feature to show as examples."""
        top = self.activity.top
        random = self.activity.random
        ranked = [("top", top, rank) for rank in range(top.n)]
        ranked += [(f"q{rank + 1}", self.quantiles, rank) for rank in range(self.quantiles.n)]
        ranked += [("random", random, rank) for rank in range(min(RANDOM_EXAMPLES, random.n))]
        chosen = []
        for group, tokens, rank in ranked:
            token = int(tokens.token[feature, rank])
            if token < 0:
                continue
            one = ChosenToken(
                group=group,
                sequence=int(tokens.sequence[feature, rank]),
                token=token,
                activation=float(tokens.activation[feature, rank]),
                has_montage=group == "top" and rank < self.montage_examples,
            )
            chosen.append(one)
        return chosen
