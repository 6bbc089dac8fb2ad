"""Associations of one member's features with groups of tokens and with patient labels.

Activations are pooled once for each store. Labels are tested on the patients of the val and test
splits together; probes are fitted on the val patients and scored on the test patients.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from minsae_jax.evaluation.dataset import Dataset
from minsae_jax.evaluation.inputs import EvaluationInputs
from minsae_jax.evaluation.label_probes import LabelProbe, PooledSplits, probe_label
from minsae_jax.evaluation.label_tests import LabelTest, compare_labels
from minsae_jax.evaluation.labels import PatientLabel, read_labels
from minsae_jax.evaluation.members import Member
from minsae_jax.evaluation.pooling import Pooling, by_patient, pool
from minsae_jax.evaluation.variance import VarianceShares, variance_shares
from minsae_jax.sae.member import SparseAutoencoder

NO_PROBE = "a probe requires a store of val patients with labels"


@dataclass(frozen=True)
class LabelAssociation:
    """A label, its tests on all features, and the probes on few of them."""

    label: PatientLabel
    # None if there are too few patients
    test: LabelTest | None
    # None if there are too few, or no val patients
    probe: LabelProbe | None
    # What was left out, or why there is no test or no probe; may be empty
    test_note: str
    probe_note: str

    @property
    def notes(self) -> list[str]:
        """Both notes, without empty ones."""
        return [note for note in (self.test_note, self.probe_note) if note]


@dataclass(frozen=True)
class LabelledFeature:
    """The association of one feature with one label; patients are the unit."""

    label: str
    feature: int
    effect: float
    p: float
    # After correction for the number of features
    q: float
    # eta² of patients
    patient_share: float


@dataclass(frozen=True)
class Associations:
    """Shares of variance and labels of the features of one member."""

    # On the test patients
    variance: VarianceShares
    # Empty without labels.csv
    labels: tuple[LabelAssociation, ...]
    pooling: Pooling
    # All recordings of the splits in which labels were tested, those without a label among them
    recordings: tuple[str, ...]

    def of_feature(self, test: LabelTest, feature: int) -> LabelledFeature:
        """Return a label's test of one feature."""
        return LabelledFeature(
            label=test.label,
            feature=feature,
            effect=float(test.effect[feature]),
            p=float(test.p[feature]),
            q=float(test.q[feature]),
            patient_share=float(self.variance.patient[feature]),
        )


def measure_associations(
    inputs: EvaluationInputs, member: Member, pooling: Pooling, seed: int
) -> Associations:
    """Return the associations of one member's features.

    pooling: of activations over the tokens of a recording. seed: of the permuted labels. Raises
    UserError if labels.csv is invalid.
    """
    test = inputs.test
    pooled = pool(test, member.sae)
    variance = variance_shares(pooled)
    splits = [test]
    # labels.csv is about the patients in its folder; those of another one may have equal names.
    if inputs.val is not None and inputs.val.folder == test.folder:
        splits.insert(0, inputs.val)
    labels = read_labels(test.folder, [name for split in splits for name in split.recordings])
    if not labels:
        return Associations(variance, (), pooling, ())
    by_split = [_RecordingValues(pooled.recordings, pooled.values(pooling))]
    # The other two poolings of many recordings take gigabytes.
    del pooled
    if len(splits) == 2:
        by_split.insert(0, _pool_values(splits[0], member.sae, pooling))
    recordings = [name for each in by_split for name in each.recordings]
    results = compare_labels(by_patient(recordings, *[each.values for each in by_split]), labels)
    probes: list[LabelProbe | str] = [NO_PROBE] * len(labels)
    if len(splits) == 2:
        dimensions = _raw_dimensions(splits[0]) if pooling == "active" else None
        of_raw = [_pool_values(split, dimensions, pooling) for split in splits]
        features = PooledSplits(*[by_patient(*each) for each in by_split])
        raw = PooledSplits(*[by_patient(*each) for each in of_raw])
        probes = [probe_label(label, features, raw, seed=seed) for label in labels]
    associations = []
    for label, result, probe in zip(labels, results, probes, strict=True):
        if isinstance(probe, str):
            without = LabelAssociation(label, result.test, None, result.note, f"no probe: {probe}")
            associations.append(without)
        else:
            associations.append(LabelAssociation(label, result.test, probe, result.note, ""))
    # A test store of all patients has the val patients' recordings too.
    distinct = tuple(dict.fromkeys(recordings))
    return Associations(variance, tuple(associations), pooling, distinct)


def _raw_dimensions(val: Dataset) -> SparseAutoencoder:
    """Return the raw dimensions as features that are active above their mean on the val tokens.

    Their sign says nothing where their mean is far from 0, as in residual streams.
    """
    pooled = pool(val, None)
    mean = np.average(pooled.mean, axis=0, weights=pooled.n_tokens)
    identity = np.eye(len(mean))
    return SparseAutoencoder({"W_enc": identity, "b_enc": -mean, "W_dec": identity, "b_dec": mean})


class _RecordingValues(NamedTuple):
    """Features of recordings, pooled in one way."""

    # File names
    recordings: tuple[str, ...]
    values: Float[np.ndarray, "recordings features"]


def _pool_values(
    dataset: Dataset, sae: SparseAutoencoder | None, pooling: Pooling
) -> _RecordingValues:
    """Pool the features of an SAE, or without one the raw activations, over every recording."""
    pooled = pool(dataset, sae)
    return _RecordingValues(pooled.recordings, pooled.values(pooling))
