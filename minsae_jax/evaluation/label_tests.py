"""Which features differ with a label of patients: a rank test of every feature.

The unit is the patient: a feature's value is the mean over the patient's recordings of the pooled
activation, so that many tokens or recordings of few patients prove nothing. Two categories are
compared by the Mann-Whitney U test, more by the Kruskal-Wallis test, and numbers by Spearman's
correlation. The false discovery rate over the features of a label is controlled by Benjamini &
Hochberg's method.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import chi2, false_discovery_control, mannwhitneyu, rankdata
from scipy.stats import t as student

from minsae_jax.eeg.splits import join_some
from minsae_jax.evaluation.labels import PatientLabel
from minsae_jax.evaluation.pooling import PatientValues

MIN_PATIENTS = 3  # of each category, or of all for a number
LEVEL = 0.05
TestName = Literal["Mann-Whitney", "Kruskal-Wallis", "Spearman"]
EFFECT_NAMES: dict[TestName, str] = {
    "Mann-Whitney": "AUC",
    "Kruskal-Wallis": "eta²",
    "Spearman": "rho",
}


@dataclass(frozen=True)
class LabelTest:
    """One label tested on every feature; features that are equal for all patients have p = q = 1.

    effect: for two categories the AUC, the probability that a patient of the second has a larger
    value than one of the first; for more, eta², the share of the variance of ranks between
    categories; for numbers Spearman's rho.
    """

    label: str
    test: TestName
    # Empty for a number
    categories: tuple[str, ...]
    # Of each category, or of all for a number
    n_patients: tuple[int, ...]
    effect: Float[np.ndarray, " features"]
    p: Float[np.ndarray, " features"]
    q: Float[np.ndarray, " features"]
    # Of the linear regression on the label, in activation per unit of the label; for numbers only
    slope: Float[np.ndarray, " features"] | None

    @property
    def effect_name(self) -> str:
        """AUC, eta² or rho."""
        return EFFECT_NAMES[self.test]

    def significant(self, level: float = LEVEL) -> Int[np.ndarray, " n"]:
        """Return the features with q below the level, smallest p first."""
        by_p = np.argsort(self.p, kind="stable")
        return by_p[self.q[by_p] < level]


@dataclass(frozen=True)
class LabelResult:
    """The test of one label, or the reason why there is none."""

    label: str
    test: LabelTest | None
    # Patients or categories left out, and why; empty if all are tested
    note: str


def compare_labels(pooled: PatientValues, labels: Sequence[PatientLabel]) -> list[LabelResult]:
    """Test every label on every feature; patients without a value are left out."""
    results = []
    for label in labels:
        usable, note = usable_label(label, pooled.patients, MIN_PATIENTS)
        test = None
        if usable is not None:
            test = _test(usable, pooled.of(usable.patients))
        results.append(LabelResult(label.name, test, note))
    return results


def usable_label(
    label: PatientLabel, patients: Sequence[str], min_patients: int
) -> tuple[PatientLabel | None, str]:
    """Return a label of some of the patients, without small categories, and what was left out.

    None if fewer than two categories have min_patients patients; a number needs as many patients,
    and two different values.
    """
    among = set(patients)
    label = label.select(np.array([patient in among for patient in label.patients], bool))
    notes = []
    if label.n_ambiguous:
        notes.append(f"{label.n_ambiguous} patients with recordings of several categories left out")
    if label.is_number:
        is_usable = len(label.patients) >= min_patients and len(set(label.values)) > 1
        if not is_usable:
            notes.append(f"not tested: {len(label.patients)} patients with a value")
        return label if is_usable else None, "; ".join(notes)
    counts = np.bincount(label.category, minlength=len(label.categories))
    is_large = counts >= min_patients
    small = [
        f"{c} ({n})" for c, n in zip(label.categories, counts, strict=True) if n < min_patients
    ]
    if is_large.sum() < 2:
        notes.append(
            f"not tested: fewer than two categories with {min_patients} patients; too few of "
            f"{join_some(small)}"
        )
        return None, "; ".join(notes)
    if small:
        notes.append(
            f"categories with fewer than {min_patients} patients left out: {join_some(small)}"
        )
    large = [label.categories[i] for i in np.flatnonzero(is_large)]
    return label.only(large), "; ".join(notes)


def _test(label: PatientLabel, values: Float[np.ndarray, "patients features"]) -> LabelTest:
    varies = values.max(axis=0) > values.min(axis=0)
    n_features = values.shape[1]
    p = np.ones(n_features)
    q = np.ones(n_features)
    slope = None
    name: TestName
    if label.is_number:
        name = "Spearman"
        effect = np.zeros(n_features)
        effect[varies], p[varies] = spearman(values[:, varies], label.values)
        slope = regression_slope(values, label.values)
        counts = [len(label.patients)]
    elif len(label.categories) == 2:
        name = "Mann-Whitney"
        effect = np.full(n_features, 0.5)
        effect[varies], p[varies] = mann_whitney(values[:, varies], label.category == 1)
        counts = np.bincount(label.category).tolist()
    else:
        name = "Kruskal-Wallis"
        effect = np.zeros(n_features)
        effect[varies], p[varies] = kruskal_wallis(values[:, varies], label.category)
        counts = np.bincount(label.category).tolist()
    if varies.any():
        q[varies] = false_discovery_control(p[varies])
    return LabelTest(label.name, name, label.categories, tuple(counts), effect, p, q, slope)


def mann_whitney(
    values: Float[np.ndarray, "n features"], is_second: Bool[np.ndarray, " n"]
) -> tuple[Float[np.ndarray, " features"], Float[np.ndarray, " features"]]:
    """Return AUC and two-sided p of each column, as scipy.stats.mannwhitneyu with method "auto".

    p is exact for columns without ties if one of the groups has at most eight members.
    """
    first = values[~is_second]
    second = values[is_second]
    is_small = min(len(first), len(second)) <= 8
    in_order = np.sort(values, axis=0)
    is_exact = is_small & (np.diff(in_order, axis=0) > 0).all(axis=0)
    auc = np.empty(values.shape[1])
    p = np.empty(values.shape[1])
    for method, columns in (("exact", is_exact), ("asymptotic", ~is_exact)):
        if columns.any():
            result = mannwhitneyu(second[:, columns], first[:, columns], method=method)
            auc[columns] = result.statistic / (len(first) * len(second))
            p[columns] = result.pvalue
    return auc, p


def kruskal_wallis(
    values: Float[np.ndarray, "n features"], category: Int[np.ndarray, " n"]
) -> tuple[Float[np.ndarray, " features"], Float[np.ndarray, " features"]]:
    """Return eta² of the ranks and the p of the H test of each column.

    H = (n - 1) eta², where eta² is the share of the ranks' variance between categories: this is the
    usual statistic with its correction for ties, since ties reduce that variance alone.
    """
    n = len(values)
    deviation = rankdata(values, axis=0) - (n + 1) / 2
    membership = np.eye(category.max() + 1)[category]  # [n, categories]
    counts = membership.sum(axis=0)
    between = np.square(membership.T @ deviation).T @ (1 / counts)
    eta2 = between / np.square(deviation).sum(axis=0)
    return eta2, chi2.sf((n - 1) * eta2, len(counts) - 1)


def spearman(
    values: Float[np.ndarray, "n features"], label: Float[np.ndarray, " n"]
) -> tuple[Float[np.ndarray, " features"], Float[np.ndarray, " features"]]:
    """Return Spearman's rho of each column with the label, and its two-sided p.

    p is that of t = rho sqrt((n - 2) / (1 - rho²)) with n - 2 degrees of freedom.
    """
    degrees = len(label) - 2
    deviation = rankdata(values, axis=0) - (len(label) + 1) / 2
    of_label = rankdata(label) - (len(label) + 1) / 2
    norms = np.sqrt(np.square(deviation).sum(axis=0) * np.square(of_label).sum())
    rho = np.clip(of_label @ deviation / norms, -1, 1)
    with np.errstate(divide="ignore"):  # infinite at rho = ±1, where p is 0
        t = rho * np.sqrt(degrees / (1 - np.square(rho)))
    return rho, 2 * student.sf(np.abs(t), degrees)


def regression_slope(
    values: Float[np.ndarray, "n features"], label: Float[np.ndarray, " n"]
) -> Float[np.ndarray, " features"]:
    """Return the slope of the linear regression of each column on the label."""
    deviation = label - label.mean()
    return deviation @ (values - values.mean(axis=0)) / np.square(deviation).sum()
