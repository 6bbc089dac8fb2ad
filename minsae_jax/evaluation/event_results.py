"""How well the features of one set, alone and together, separate labelled events: the results.

A set of features is that of a member, of principal components, or of raw dimensions.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from minsae_jax.estimates import Estimate


@dataclass(frozen=True)
class EventScore:
    """How well features of one set separate one kind of events; on test patients unless said.

    Intervals are over patients; features, probes and ties are those chosen on val.
    """

    # Events in the val and test spans; each has a span without an event
    val_events: int
    test_events: int
    # The feature with the largest AUC on val
    feature: int
    auc: Estimate
    val_auc: float
    # Features that could be the best one for all patients, `feature` among them; see `ties.py`.
    # None with fewer than three val patients
    n_ties: int | None
    ties: tuple[int, ...]  # the first MAX_TIES of them, by AUC on val
    # Smallest and largest test AUC among all of them
    ties_auc: tuple[float, float] | None
    # Share of the events found by `feature` at a precision of 90 % among the spans
    recall: Estimate
    # The five features with the largest AUC on val
    best_five: tuple[int, ...]
    # AUC of logistic regressions on the best two and the best five
    probe_2_auc: Estimate
    probe_auc: Estimate
    # AUC of a linear probe that was fitted on x, on x and on x̂
    x_probe_auc: float
    x_hat_probe_auc: Estimate
    # Drop of that AUC when the five most relevant features for this kind are ablated, and the mean
    # drop of the other kinds' probes; NaN with a single kind
    ablation_drop: Estimate
    ablation_drop_others: Estimate
    # AUC of `feature` over single tokens; NaN if all of them are covered, or none
    token_auc: float
    # Share of the tokens of test recordings with events that touch one of this kind
    token_base_rate: float
    # Share of the strongest tokens of `feature` that touch an event, and number of these tokens;
    # NaN if it is never active
    precision: Estimate
    examples: int
    # Features of the whole set whose strongest tokens nearly all touch an event of this kind
    pure_features: int


@dataclass(frozen=True)
class FeatureScore:
    """How well one feature separates one kind of events; see `FeatureEvents`."""

    kind: str
    feature: int
    val_auc: float
    auc: float
    recall: float
    precision: float


@dataclass(frozen=True)
class FeatureEvents:
    """How well every feature of a set separates each kind of events; on test unless said."""

    kinds: tuple[str, ...]
    val_auc: Float[np.ndarray, "kinds d_sae"]
    auc: Float[np.ndarray, "kinds d_sae"]
    # Share of the events found at a precision of 90 % among the spans
    recall: Float[np.ndarray, "kinds d_sae"]
    # Share of the strongest tokens that touch an event; NaN for features that are never active
    precision: Float[np.ndarray, "kinds d_sae"]
    # Number of these tokens
    examples: Int[np.ndarray, " d_sae"]
    # The precision of random tokens
    base_rate: Float[np.ndarray, " kinds"]
    # Whether the strongest tokens nearly all touch an event; see `pure_features`
    is_pure: Bool[np.ndarray, "kinds d_sae"]

    def score(self, kind: str, feature: int) -> FeatureScore:
        """Return the measures of one feature for one kind."""
        i = self.kinds.index(kind)
        return FeatureScore(
            kind=kind,
            feature=feature,
            val_auc=float(self.val_auc[i, feature]),
            auc=float(self.auc[i, feature]),
            recall=float(self.recall[i, feature]),
            precision=float(self.precision[i, feature]),
        )


@dataclass(frozen=True)
class EventSummary:
    """Means over the kinds of events, for one set of features; on test."""

    # Of the best feature for each kind
    auc: Estimate
    recall: Estimate
    precision: float
    token_auc: float
    # Logistic regression on the best five
    probe_auc: Estimate
    # Features that are pure for at least one kind
    pure_features: int
    # Drop of the target kind's probe AUC by ablation of its features, less that of other kinds'
    tpp: Estimate
    # (AUC - 0.5) of the probes fitted on x, on x̂ over that on x, each a mean over kinds;
    # NaN if the latter is not above chance
    probe_recovered: Estimate


class ResampledAUCs(NamedTuple):
    """AUC of the best feature for each kind: in the test recordings, then in each resample."""

    aucs: Float[np.ndarray, "kinds resamples"]
    # Test patients, or other units, with events of each kind, and then of any kind
    n_patients: Int[np.ndarray, " kinds+1"]
    # Checksum of recordings, events, layer and seed: only AUCs on the same resamples, of the same
    # layer, can be compared
    source: str
    # Fingerprint; a control is of another encoder
    encoder: str


@dataclass(frozen=True)
class EventEvaluation:
    """One set of features against the labelled events: of a member, of PCA, or raw dimensions."""

    # By kind of event
    scores: Mapping[str, EventScore]
    summary: EventSummary
    features: FeatureEvents
    # To compare with another set of features on the same events
    resampled: ResampledAUCs


class Gain(NamedTuple):
    """AUC of the best feature of one set of features less that of the best of another set.

    Intervals are over patients, who are drawn for both at once.
    """

    # By kind of event
    auc_gain: Mapping[str, Estimate]
    # Mean over the kinds
    mean_auc_gain: Estimate
