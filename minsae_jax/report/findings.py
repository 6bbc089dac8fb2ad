"""Results of the evaluation for each feature of the reported member, as its card shows them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from minsae_jax.evaluation.associations import Associations
from minsae_jax.evaluation.event_results import FeatureEvents
from minsae_jax.evaluation.label_tests import LEVEL
from minsae_jax.evaluation.results import Evaluation
from minsae_jax.evaluation.stability import MIN_COSINE, Stability
from minsae_jax.report.pages import (
    DetectedEvent,
    DetectedLabel,
    Explained,
    SeedMatch,
    SeedStability,
)


@dataclass(frozen=True)
class Findings:
    """Measures of every feature; a part is None or empty where nothing was measured."""

    events: FeatureEvents | None
    stability: Stability | None
    associations: Associations

    def events_of(self, feature: int) -> list[DetectedEvent]:
        """Return the feature's scores for each kind of event, the best first."""
        if self.events is None:
            return []
        detected = []
        for i, kind in enumerate(self.events.kinds):
            event = DetectedEvent(
                kind=kind,
                auc=float(self.events.auc[i, feature]),
                recall=float(self.events.recall[i, feature]),
                precision=float(self.events.precision[i, feature]),
                val_auc=float(self.events.val_auc[i, feature]),
            )
            detected.append(event)
        return sorted(detected, key=lambda event: -event.auc)

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
        n_found = int(stability.seeds_with()[feature])
        return SeedStability(n_found, stability.n_seeds, matches)

    def explained_of(self, feature: int) -> Explained:
        """Return the shares of the feature's variance that position, channel and so on explain."""
        variance = self.associations.variance
        share = float(variance.top_patient_share[feature])
        return Explained(
            position=float(variance.position[feature]),
            channel=float(variance.channel[feature]),
            recording=float(variance.recording[feature]),
            patient=float(variance.patient[feature]),
            top_patient=variance.top_patient[feature],
            top_patient_share=None if np.isnan(share) else share,
        )

    def labels_of(self, feature: int) -> Sequence[DetectedLabel]:
        """Return the labels that the feature is related to, by q."""
        labels = []
        for association in self.associations.labels:
            test = association.tests.test
            if test is not None and test.q[feature] < LEVEL:
                label = DetectedLabel(
                    label=test.label,
                    effect=float(test.effect[feature]),
                    p=float(test.p[feature]),
                    q=float(test.q[feature]),
                )
                labels.append(label)
        return sorted(labels, key=lambda label: label.q)


def make_findings(evaluation: Evaluation, associations: Associations) -> Findings:
    """Return the findings about the features of the member that is reported."""
    evaluated = evaluation.find(evaluation.selected)
    events = evaluated.event_evaluation
    stability = evaluated.stability
    return Findings(
        events=None if events is None else events.features,
        stability=None if stability is None else stability.features,
        associations=associations,
    )
