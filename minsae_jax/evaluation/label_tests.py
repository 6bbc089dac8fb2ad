"""Rank tests of every feature against patient labels.

The unit is the patient: a feature's value is the mean over the patient's recordings of the pooled
activation, so that many tokens or recordings of few patients prove nothing. Two categories are
compared by the Mann-Whitney U test, more by the Kruskal-Wallis test, and numbers by Spearman's
correlation. Where the usual approximation of p fails, p is that of a permutation test of the same
statistic. The false discovery rate over the features of a label is controlled by Benjamini &
Hochberg's method.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import chi2, false_discovery_control, mannwhitneyu, mode, rankdata, skew
from scipy.stats import t as student

from minsae_jax.errors import join_some
from minsae_jax.evaluation.labels import PatientLabel
from minsae_jax.evaluation.permutations import permutation_p, product_size, share_between
from minsae_jax.evaluation.pooling import PatientValues

MAX_EXACT = 8  # patients of a category up to which p of Mann-Whitney without ties is exact
MIN_PATIENTS = 3  # of each category, or of all for a number
# Patients expected in a category below which their number is not treated as normal (Cochran's
# rule).
MIN_EXPECTED = 5
# Patients up to which Spearman's p is by permutation. The t approximation is too small in the tail
# that is left after correction for the number of features (docs/labels.md has figures).
MAX_PERMUTED = 50
# With more patients, p of columns above this skewness of rho is by permutation as well. Without
# ties in label or column it is 0; the t approximation is right to a factor of 1.6 down to 1e-4
# below it, but up to 50 times too small above.
MAX_SKEWNESS = 0.1
LEVEL = 0.05
TestName = Literal["Mann-Whitney", "Kruskal-Wallis", "Spearman"]
FEATURE_BLOCK = 256  # columns that are ranked at a time
# Effect and p of columns, and for which of them p is to be by permutation
Columns = tuple[np.ndarray, np.ndarray, np.ndarray]
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
    # Number of features that vary between patients
    n_tested: int
    effect: Float[np.ndarray, " features"]
    p: Float[np.ndarray, " features"]
    q: Float[np.ndarray, " features"]
    # Of the linear regression on the label, in activation per unit of the label; for numbers only
    slope: Float[np.ndarray, " features"] | None

    @property
    def effect_name(self) -> str:
        """AUC, eta² or rho."""
        return EFFECT_NAMES[self.test]

    def significant(self) -> Int[np.ndarray, " n"]:
        """Return the features with q below LEVEL, smallest p first."""
        by_p = np.argsort(self.p, kind="stable")
        return by_p[self.q[by_p] < LEVEL]


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
        if usable is None:
            note = f"not tested: {note}"
        notes = []
        if label.n_ambiguous:
            n = label.n_ambiguous
            patients = "1 patient" if n == 1 else f"{n} patients"
            notes.append(f"{patients} with recordings of several categories left out")
        if note:
            notes.append(note)
        test = None
        if usable is not None:
            test = _test(usable, pooled.of(usable.patients))
            p = smallest_p(test)
            if p >= LEVEL:
                notes.append(
                    f"too few patients for q < {LEVEL}: without ties no p is below {p:.2g}"
                )
        results.append(LabelResult(label.name, test, "; ".join(notes)))
    return results


def smallest_p(test: LabelTest) -> float:
    """Return the p of a feature that follows the label perfectly, 0 if it is not an exact one.

    No feature without ties has a smaller p.
    """
    if test.test == "Spearman" and test.n_patients[0] <= MAX_PERMUTED:
        return 2 / math.factorial(test.n_patients[0])
    if test.test == "Mann-Whitney" and min(test.n_patients) <= MAX_EXACT:
        return 2 / math.comb(sum(test.n_patients), test.n_patients[0])
    return 0.0


def usable_label(
    label: PatientLabel, patients: Sequence[str], min_patients: int, who: str = "patients"
) -> tuple[PatientLabel | None, str]:
    """Return a label of some of the patients without small categories, and a note on omissions.

    None if fewer than two categories have min_patients patients; a number needs as many patients,
    and two different values. who: the patients in the note.
    """
    among = set(patients)
    is_among = [patient in among for patient in label.patients]
    label = label.select(np.array(is_among, bool))
    if label.is_number:
        n = len(label.patients)
        if n < min_patients:
            return None, f"{who} with a value: {n}, at least {min_patients} needed"
        if len(set(label.values)) == 1:
            return None, f"{who} with a value: {n}, which is the same for all"
        return label, ""
    counts = np.bincount(label.category, minlength=len(label.categories))
    sizes = [f"{name} ({n})" for name, n in zip(label.categories, counts, strict=True)]
    is_large = counts >= min_patients
    if is_large.sum() < 2:
        return None, f"fewer than two categories with {min_patients} {who}: {join_some(sizes)}"
    note = ""
    if not is_large.all():
        small = [sizes[i] for i in np.flatnonzero(~is_large)]
        note = f"categories with fewer than {min_patients} {who} left out: {join_some(small)}"
    large = [label.categories[i] for i in np.flatnonzero(is_large)]
    return label.only(large), note


def _test(label: PatientLabel, values: Float[np.ndarray, "patients features"]) -> LabelTest:
    varies = np.ptp(values, axis=0) > 0
    varying = values[:, varies]
    slope = None
    n_patients: tuple[int, ...] = (len(label.patients),)
    if not label.is_number:
        n_patients = tuple(np.bincount(label.category).tolist())
    name: TestName
    if label.is_number:
        name = "Spearman"
        effects, p_values = spearman(varying, label.values)
        slope = regression_slope(values, label.values)
    elif len(label.categories) == 2:
        name = "Mann-Whitney"
        effects, p_values = mann_whitney(varying, label.category == 1)
    else:
        name = "Kruskal-Wallis"
        effects, p_values = kruskal_wallis(varying, label.category)
    # Features that do not vary have no effect, which is an AUC of 0.5.
    effect = np.full(len(varies), 0.5 if name == "Mann-Whitney" else 0.0)
    effect[varies] = effects
    p = np.ones(len(varies))
    p[varies] = p_values
    q = np.ones(len(varies))
    if varies.any():
        q[varies] = false_discovery_control(p_values)
    return LabelTest(
        label.name, name, label.categories, n_patients, int(varies.sum()), effect, p, q, slope
    )


def mann_whitney(
    values: Float[np.ndarray, "n features"], is_second: Bool[np.ndarray, " n"]
) -> tuple[Float[np.ndarray, " features"], Float[np.ndarray, " features"]]:
    """Return AUC and two-sided p of each column, as scipy.stats.mannwhitneyu with method "auto".

    p is exact for columns without ties if one of the groups has at most eight members, and by
    permutation for columns where `_is_sparse`.
    """
    auc, p, sparse = _in_blocks(partial(_mann_whitney, is_second=is_second), values)
    deviation = _centred_ranks(values[:, sparse])
    p[sparse] = permutation_p(deviation, is_second.astype(np.float64), product_size)
    return auc, p


def _mann_whitney(
    values: Float[np.ndarray, "n features"], is_second: Bool[np.ndarray, " n"]
) -> Columns:
    """Return AUC and p of `mannwhitneyu`, and which columns are sparse."""
    first = values[~is_second]
    second = values[is_second]
    n_smaller = min(len(first), len(second))
    in_order = np.sort(values, axis=0)
    is_exact = (n_smaller <= MAX_EXACT) & (np.diff(in_order, axis=0) > 0).all(axis=0)
    auc = np.empty(values.shape[1])
    p = np.empty(values.shape[1])
    for method, columns in (("exact", is_exact), ("asymptotic", ~is_exact)):
        if columns.any():
            result = mannwhitneyu(second[:, columns], first[:, columns], method=method)
            auc[columns] = result.statistic / (len(first) * len(second))
            p[columns] = result.pvalue
    return auc, p, _is_sparse(values, n_smaller)


def kruskal_wallis(
    values: Float[np.ndarray, "n features"], category: Int[np.ndarray, " n"]
) -> tuple[Float[np.ndarray, " features"], Float[np.ndarray, " features"]]:
    """Return eta² of the ranks and the p of the H test of each column.

    H = (n - 1) eta², where eta² is the share of the ranks' variance between categories: this is the
    usual statistic with its correction for ties, since ties reduce that variance alone. p is by
    permutation for columns where `_is_sparse`, and elsewhere of the chi-squared distribution.
    """
    eta2, p, sparse = _in_blocks(partial(_kruskal_wallis, category=category), values)
    deviation = _centred_ranks(values[:, sparse])
    p[sparse] = permutation_p(deviation, category.astype(np.float64), share_between)
    return eta2, p


def _kruskal_wallis(
    values: Float[np.ndarray, "n features"], category: Int[np.ndarray, " n"]
) -> Columns:
    """Return eta² and p of the chi-squared distribution, and which columns are sparse."""
    label = category.astype(np.float64)
    counts = np.bincount(category)
    eta2 = share_between(_centred_ranks(values).T, label[None])[:, 0]
    p = chi2.sf((len(values) - 1) * eta2, len(counts) - 1)
    return eta2, p, _is_sparse(values, int(counts.min()))


def _is_sparse(
    values: Float[np.ndarray, "n features"], n_smallest: int
) -> Bool[np.ndarray, " features"]:
    """Return the columns where most patients are equal, and few others expected in a category.

    The normal and chi-squared approximations need a few patients with another value than most in
    every category; p of a feature of one or two patients can be a thousandth of the true one.

    n_smallest: patients of the smallest category.
    """
    n = len(values)
    n_others = n - mode(values, axis=0).count
    return (2 * n_others <= n) & (n_smallest * n_others < MIN_EXPECTED * n)


def _centred_ranks(values: Float[np.ndarray, "n ..."]) -> Float[np.ndarray, "n ..."]:
    # In float64, since newer versions of SciPy return the type of the values.
    return rankdata(values, axis=0).astype(np.float64) - (len(values) + 1) / 2


def spearman(
    values: Float[np.ndarray, "n features"], label: Float[np.ndarray, " n"]
) -> tuple[Float[np.ndarray, " features"], Float[np.ndarray, " features"]]:
    """Return Spearman's rho of each column with the label, and its two-sided p.

    p is by permutation for up to 50 patients, and with more where label and column are equal for
    many patients. Elsewhere it is that of t = rho sqrt((n - 2) / (1 - rho²)) with n - 2 degrees of
    freedom.
    """
    of_label = _centred_ranks(label)
    rho, p, permuted = _in_blocks(partial(_spearman, of_label=of_label), values)
    p[permuted] = permutation_p(_centred_ranks(values[:, permuted]), of_label, product_size)
    return rho, p


def _spearman(
    values: Float[np.ndarray, "n features"], of_label: Float[np.ndarray, " n"]
) -> Columns:
    """Return rho and p of the t approximation, and for which columns that is not good enough.

    of_label: centred ranks of the label.
    """
    n = len(of_label)
    deviation = _centred_ranks(values)
    products = of_label @ deviation
    squares = np.square(deviation).sum(axis=0) * np.square(of_label).sum()
    rho = np.clip(products / np.sqrt(squares), -1, 1)
    if n <= MAX_PERMUTED:
        return rho, np.ones(len(rho)), np.ones(len(rho), bool)
    with np.errstate(divide="ignore"):  # infinite at rho = ±1, where p is 0
        t = rho * np.sqrt((n - 2) / (1 - np.square(rho)))
    p = 2 * student.sf(np.abs(t), n - 2)
    # Over random orders the skewness of rho is the product of both skewnesses over sqrt(n), up to
    # terms of 1 / n (Pitman 1937).
    skewed = np.abs(skew(of_label) * skew(deviation)) > MAX_SKEWNESS * np.sqrt(n)
    return rho, p, skewed


def _in_blocks(
    measure: Callable[[np.ndarray], Columns], values: Float[np.ndarray, "n features"]
) -> Columns:
    """Return measures of all columns; in blocks, since ranks take eight times the memory."""
    starts = range(0, max(values.shape[1], 1), FEATURE_BLOCK)
    blocks = [measure(values[:, start : start + FEATURE_BLOCK]) for start in starts]
    effect, p, is_permuted = zip(*blocks, strict=True)
    return np.concatenate(effect), np.concatenate(p), np.concatenate(is_permuted)


def regression_slope(
    values: Float[np.ndarray, "n features"], label: Float[np.ndarray, " n"]
) -> Float[np.ndarray, " features"]:
    """Return the slope of the linear regression of each column on the label."""
    deviation = label - label.mean()
    covariance = deviation @ (values - values.mean(axis=0))
    return covariance / np.square(deviation).sum()
