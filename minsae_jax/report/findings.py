"""Results of the evaluation for each feature of the reported member, as its card shows them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from minsae_jax.evaluation.associations import Associations, LabelledFeature
from minsae_jax.evaluation.event_results import FeatureEvents, FeatureScore
from minsae_jax.evaluation.label_tests import LEVEL
from minsae_jax.evaluation.results import Evaluation
from minsae_jax.evaluation.stability import MIN_COSINE, Stability


@dataclass(frozen=True)
class SeedMatch:
    """The feature that matches this one in a member trained from another seed."""

    member: str
    feature: int
    encoder_cosine: float
    decoder_cosine: float
    # Whether it counts as the same feature
    is_same: bool


@dataclass(frozen=True)
class SeedStability:
    """The number of seeds in which a feature is found, that of its member included."""

    found: int
    seeds: int
    matches: Sequence[SeedMatch] = ()


@dataclass(frozen=True)
class Explained:
    """eta²: share of a feature's variance over tokens that each grouping explains."""

    position: float
    channel: float
    recording: float
    patient: float
    # The patient with the largest mean activation, and that patient's share of the sum; NaN if it
    # is 0
    top_patient: str = ""
    top_patient_share: float = np.nan


@dataclass(frozen=True)
class Findings:
    """Measures of every feature; a part is None or empty where nothing was measured."""

    events: FeatureEvents | None = None
    stability: Stability | None = None
    associations: Associations | None = None

    def events_of(self, feature: int) -> list[FeatureScore]:
        """Return the feature's scores for each kind of event, the best first."""
        if self.events is None:
            return []
        scores = [self.events.score(kind, feature) for kind in self.events.kinds]
        return sorted(scores, key=lambda score: -score.auc)

    def stability_of(self, feature: int) -> SeedStability | None:
        """Return the number of seeds in which the feature is found, and its matches."""
        stability = self.stability
        if stability is None or not stability.is_live[feature]:
            return None
        matches = []
        for i, member in enumerate(stability.others):
            if stability.match[i, feature] >= 0:
                cosine = float(stability.decoder_cosine[i, feature])
                match = SeedMatch(
                    member=member,
                    feature=int(stability.match[i, feature]),
                    encoder_cosine=float(stability.encoder_cosine[i, feature]),
                    decoder_cosine=cosine,
                    is_same=cosine > MIN_COSINE,
                )
                matches.append(match)
        found = 1 + sum(match.is_same for match in matches)
        return SeedStability(found, stability.n_seeds, matches)

    def explained_of(self, feature: int) -> Explained | None:
        """Return the shares of the feature's variance that position, channel and so on explain."""
        if self.associations is None:
            return None
        variance = self.associations.variance
        return Explained(
            position=float(variance.position[feature]),
            channel=float(variance.channel[feature]),
            recording=float(variance.recording[feature]),
            patient=float(variance.patient[feature]),
            top_patient=variance.top_patient[feature],
            top_patient_share=float(variance.top_patient_share[feature]),
        )

    def labels_of(self, feature: int) -> Sequence[LabelledFeature]:
        """Return the labels that the feature is related to, by q."""
        if self.associations is None:
            return []
        labels = []
        for association in self.associations.labels:
            test = association.test
            if test is not None and test.q[feature] < LEVEL:
                labels.append(self.associations.of_feature(test, feature))
        return sorted(labels, key=lambda label: label.q)


def make_findings(evaluation: Evaluation, associations: Associations) -> Findings:
    """Return the findings about the features of the member that is reported."""
    evaluated = evaluation.find(evaluation.selected)
    events = evaluated.event_evaluation
    return Findings(
        events=None if events is None else events.features,
        stability=evaluated.stability,
        associations=associations,
    )
