"""How well the features of one set, alone and together, separate labelled events: the results.

A set of features is that of a member, of principal components, or of raw dimensions.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import binom

from minsae_jax.evaluation.bootstrap import Interval

PURE = 0.9  # precision above chance of a pure feature
PURE_EXAMPLES = 16  # and its least number of strongest tokens
PURE_BY_CHANCE = 0.001  # largest probability that random tokens are as precise


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
    auc: float
    auc_interval: Interval | None
    val_auc: float
    # Features that could be the best one for all patients, `feature` among them; see `ties.py`.
    # None with fewer than three val patients
    n_ties: int | None
    ties: tuple[int, ...]  # the first MAX_TIES of them, by AUC on val
    # Smallest and largest test AUC among all of them
    ties_auc: tuple[float, float] | None
    # Share of the events found by `feature` at a precision of 90 % among the spans
    recall: float
    recall_interval: Interval | None
    # The five features with the largest AUC on val
    best_five: tuple[int, ...]
    # AUC of logistic regressions on the best two and the best five
    probe_2_auc: float
    probe_2_auc_interval: Interval | None
    probe_auc: float
    probe_auc_interval: Interval | None
    # AUC of a linear probe that was fitted on x, on x and on x̂
    x_probe_auc: float
    x_hat_probe_auc: float
    x_hat_probe_auc_interval: Interval | None
    # Drop of that AUC when the five most relevant features for this kind are ablated, and the mean
    # drop of the other kinds' probes; None with a single kind
    ablation_drop: float
    ablation_drop_interval: Interval | None
    ablation_drop_others: float | None
    ablation_drop_others_interval: Interval | None
    # AUC of `feature` over single tokens; None if all of them are covered, or none
    token_auc: float | None = None
    # Share of the test tokens that touch an event
    token_base_rate: float | None = None
    # Share of the strongest tokens of `feature` that touch an event, and number of these tokens
    precision: float | None = None
    precision_interval: Interval | None = None
    examples: int = 0
    # Features of the whole set whose strongest tokens nearly all touch an event of this kind
    pure_features: int = 0


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

    @property
    def is_pure(self) -> Bool[np.ndarray, "kinds d_sae"]:
        """Whether the strongest tokens nearly all touch an event of a kind.

        That is a precision of 90 % above chance, (precision - base rate) / (1 - base rate), among
        at least 16 tokens, which random tokens have with a probability below 0.1 % (16 tokens are
        enough below a base rate of 64 %).
        """
        base = self.base_rate[:, None]
        above_chance = (self.precision - base) / np.maximum(1 - base, 1e-12)
        n_inside = np.rint(self.precision * self.examples)
        by_chance = binom.sf(n_inside - 1, self.examples, base)
        is_precise = (above_chance >= PURE) & (self.examples >= PURE_EXAMPLES)
        return is_precise & (by_chance < PURE_BY_CHANCE)


@dataclass(frozen=True)
class EventSummary:
    """Means over the kinds of events, for one set of features; on test."""

    # Of the best feature for each kind
    auc: float
    auc_interval: Interval | None
    recall: float
    recall_interval: Interval | None
    precision: float
    token_auc: float
    # Logistic regression on the best five
    probe_auc: float
    probe_auc_interval: Interval | None
    # Features that are pure for at least one kind
    pure_features: int
    # Drop of the target kind's probe AUC by ablation of its features, less that of other kinds'
    tpp: float
    tpp_interval: Interval | None
    # (AUC - 0.5) of the probes fitted on x, on x̂ over that on x, each a mean over kinds
    probe_recovered: float
    probe_recovered_interval: Interval | None


@dataclass(frozen=True)
class EventEvaluation:
    """One set of features against the labelled events: of a member, of PCA, or raw dimensions."""

    # By kind of event
    scores: Mapping[str, EventScore]
    summary: EventSummary
    features: FeatureEvents


class MeanIntervals(NamedTuple):
    """Intervals of means over kinds, all from the same resamples; see `EventSummary`."""

    auc: Interval | None
    recall: Interval | None
    probe_auc: Interval | None
    tpp: Interval | None
    probe_recovered: Interval | None


def summarise_events(
    scores: Mapping[str, EventScore], features: FeatureEvents, intervals: MeanIntervals
) -> EventSummary:
    """Return the means over kinds."""
    x_hat = mean_over_kinds(scores, "x_hat_probe_auc") - 0.5
    x = mean_over_kinds(scores, "x_probe_auc") - 0.5
    tpp = mean_over_kinds(scores, "ablation_drop") - mean_over_kinds(scores, "ablation_drop_others")
    return EventSummary(
        auc=mean_over_kinds(scores, "auc"),
        auc_interval=intervals.auc,
        recall=mean_over_kinds(scores, "recall"),
        recall_interval=intervals.recall,
        precision=mean_over_kinds(scores, "precision"),
        token_auc=mean_over_kinds(scores, "token_auc"),
        probe_auc=mean_over_kinds(scores, "probe_auc"),
        probe_auc_interval=intervals.probe_auc,
        pure_features=int(features.is_pure.any(axis=0).sum()),
        tpp=tpp,
        tpp_interval=intervals.tpp,
        probe_recovered=x_hat / x if x > 0 else float("nan"),
        probe_recovered_interval=intervals.probe_recovered,
    )


def mean_over_kinds(scores: Mapping[str, EventScore], name: str) -> float:
    """Return the mean of a measure over all kinds that have it; NaN if none has."""
    values = [getattr(score, name) for score in scores.values()]
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if defined else float("nan")
