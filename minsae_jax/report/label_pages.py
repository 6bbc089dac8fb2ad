"""The pages of labels of recordings or patients: the features related to them, and probes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from minsae_jax.evaluation.associations import Associations, LabelAssociation, LabelledFeature
from minsae_jax.evaluation.label_probes import LabelProbe
from minsae_jax.evaluation.label_tests import LabelTest
from minsae_jax.evaluation.labels import PatientLabel

RANKED = 50  # features in the table of a label


@dataclass(frozen=True)
class LabelPage:
    """One label of recordings or patients: its row in the overview, and its page."""

    name: str
    # "number" or "categories"
    type: str
    patients: int
    # Such as "21 to 83, median 52" or "female 9, male 7"
    values: str
    # Name such as "rho", and its definition
    effect_name: str
    n_tested: int
    n_significant: int
    effect_hint: str = ""
    recordings: int | None = None
    # How activations are pooled over a recording
    pooling: str = "mean"
    # By p, the smallest first
    features: Sequence[LabelledFeature] = ()
    probe: LabelProbe | None = None
    # Parts that were left out or not measured, with the reason
    notes: Sequence[str] = ()


def label_page(association: LabelAssociation, associations: Associations) -> LabelPage:
    """Return the page of one of the labels."""
    label = association.label
    test = association.tests.test
    notes = [association.tests.note] if association.tests.note else []
    features = []
    if test is not None:
        order = np.argsort(test.p, kind="stable")[:RANKED]
        features = [associations.of_feature(test, feature) for feature in order.tolist()]
    probe = None
    if isinstance(association.probe, str):
        notes.append(f"no probe: {association.probe}")
    else:
        probe = association.probe
    return LabelPage(
        name=label.name,
        type="number" if label.is_number else "categories",
        patients=len(label.patients) if test is None else sum(test.n_patients),
        recordings=associations.n_recordings,
        values=_values(label),
        effect_name="effect" if test is None else test.effect_name,
        effect_hint="" if test is None else _effect_hint(test),
        n_tested=0 if test is None else len(test.q),
        n_significant=0 if test is None else len(test.significant()),
        pooling=associations.pooling,
        features=features,
        probe=probe,
        notes=notes,
    )


def _values(label: PatientLabel) -> str:
    if len(label.values) == 0:
        return "none"
    if label.is_number:
        low, middle, high = np.quantile(label.values, [0, 0.5, 1])
        return f"{low:g} to {high:g}, median {middle:g}"
    counts = np.bincount(label.category, minlength=len(label.categories))
    return ", ".join(f"{name} {n}" for name, n in zip(label.categories, counts, strict=True))


def _effect_hint(test: LabelTest) -> str:
    if test.test == "Mann-Whitney":
        return (
            f"AUC: probability that a patient with {test.label} = {test.categories[1]} has a "
            f"larger value than one with {test.categories[0]}"
        )
    if test.test == "Kruskal-Wallis":
        return "share of the variance of ranks between categories"
    return f"rank correlation with {test.label}"
