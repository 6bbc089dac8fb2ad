"""The pages of labels of recordings or patients: the features related to them, and probes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from minsae_jax.eeg.splits import patient_of
from minsae_jax.evaluation.associations import Associations, LabelAssociation, LabelledFeature
from minsae_jax.evaluation.label_probes import LabelProbe
from minsae_jax.evaluation.label_tests import LabelTest

RANKED = 50  # features in the table of a label
LISTED = 20  # categories of a label


@dataclass(frozen=True, kw_only=True)
class LabelPage:
    """One label of recordings or patients: its row in the overview, and its page."""

    name: str
    # "number" or "categories"
    type: str
    patients: int
    # Such as "21 to 83, median 52" or "female 9, male 7"
    values: str
    # Name such as "rho", and its definition
    effect_name: str = "effect"
    n_tested: int = 0
    n_significant: int = 0
    effect_hint: str = ""
    # Of these patients
    recordings: int
    # How activations are pooled over a recording
    pooling: str
    # By p, the smallest first
    features: Sequence[LabelledFeature] = ()
    probe: LabelProbe | None
    # Parts that were left out or not measured, with the reason
    notes: Sequence[str]


def label_page(association: LabelAssociation, associations: Associations) -> LabelPage:
    """Return the page of one of the labels."""
    label = association.label
    test = association.test
    tested = label if test is None else label.only(test.categories)
    recordings = [name for name in associations.recordings if patient_of(name) in tested.patients]
    page = LabelPage(
        name=label.name,
        type="number" if label.is_number else "categories",
        patients=len(set(map(patient_of, recordings))),
        recordings=len(recordings),
        values=label.describe(LISTED),
        pooling=associations.pooling,
        probe=association.probe,
        notes=association.notes,
    )
    if test is None:
        return page
    order = np.argsort(test.p, kind="stable")[:RANKED]
    return replace(
        page,
        effect_name=test.effect_name,
        effect_hint=_effect_hint(test),
        n_tested=test.n_tested,
        n_significant=len(test.significant()),
        features=[associations.of_feature(test, feature) for feature in order.tolist()],
    )


def _effect_hint(test: LabelTest) -> str:
    if test.test == "Mann-Whitney":
        return (
            f"AUC: probability that a patient with {test.label} = {test.categories[1]} has a "
            f"larger value than one with {test.categories[0]}"
        )
    if test.test == "Kruskal-Wallis":
        return "share of the variance of ranks between categories"
    return f"rank correlation with {test.label}"
