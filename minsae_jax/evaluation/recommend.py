"""The recommended member: a stated rule, its result with the reason, and warnings."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from minsae_jax.evaluation.results import MemberEvaluation, PCAEvaluation, Recommendation
from minsae_jax.monitor import percent

MIN_RECOVERED = 0.95
MIN_EXPLAINED = 0.85
SAME_LENGTH = 1.05  # description lengths up to 5 % longer than the shortest count as equal
MAX_RUNNERS_UP = 3
# Limits of the warnings
MANY_TWINS = 0.1
MANY_INACTIVE = 0.2
DENSE = 0.5  # L0 as a share of d_model
RULE = (
    f"of the members that recover {percent(MIN_RECOVERED)} of the loss (where that is undefined: "
    f"explain {percent(MIN_EXPLAINED)} of the variance) and that PCA does not dominate, the one "
    "with the shortest description; of those up to 5 % longer, the one whose features are most "
    "stable over seeds, then the one with most pure features"
)


def recommend(
    members: Sequence[MemberEvaluation], pca: Sequence[PCAEvaluation], d_model: int
) -> Recommendation:
    """Return the member that RULE chooses; a diverged one only if all diverged."""
    warnings = {}
    for member in members:
        of_member = member_warnings(member, pca, d_model)
        if of_member:
            warnings[member.member] = of_member
    if all(m.loss is None or math.isnan(m.loss.loss_recovered.value) for m in members):
        # Undefined, since mean-ablation loses nothing.
        members = [replace(m, loss=None) for m in members]
    candidates = [m for m in members if m.status != "diverged"] or list(members)
    sufficient = [m for m in candidates if _is_sufficient(m)]
    if not sufficient:
        ordered = sorted(candidates, key=_quality, reverse=True)
        reason = f"no member reaches {_threshold(ordered[0])}; {_describe(ordered[0])} is closest"
        return _recommendation(ordered, reason, warnings)
    better = [m for m in sufficient if dominating(m, pca) is None]
    eligible = better or sufficient
    by_length = sorted(eligible, key=lambda m: m.description_bits)
    shortest = by_length[0].description_bits
    equal = [m for m in by_length if m.description_bits <= SAME_LENGTH * shortest]
    # Sorting keeps the order of equal keys: the shorter description.
    equal.sort(key=lambda m: (-_stability(m), -_n_pure(m)))
    ordered = [*equal, *by_length[len(equal) :]]
    reason = _reason(equal, len(eligible), bool(better))
    return _recommendation(ordered, reason, warnings)


def _recommendation(
    ordered: Sequence[MemberEvaluation], reason: str, warnings: Mapping[str, tuple[str, ...]]
) -> Recommendation:
    best = ordered[0]
    runners_up = tuple(m.member for m in ordered[1 : 1 + MAX_RUNNERS_UP])
    within = None if best.loss is None else best.loss.loss_recovered.interval
    return Recommendation(best.member, within, runners_up, reason, warnings)


def _quality(member: MemberEvaluation) -> float:
    """Return loss recovered, or else explained variance; the lowest if it is NaN."""
    quality = member.tokens.explained_variance
    if member.loss is not None:
        quality = member.loss.loss_recovered.value
    return -math.inf if math.isnan(quality) else quality


def _threshold(member: MemberEvaluation) -> str:
    if member.loss is None:
        return f"{percent(MIN_EXPLAINED)} of explained variance"
    return f"{percent(MIN_RECOVERED)} of loss recovered"


def _is_sufficient(member: MemberEvaluation) -> bool:
    # Not the upper end of the interval, which rises with uncertainty.
    return _quality(member) >= (MIN_EXPLAINED if member.loss is None else MIN_RECOVERED)


def _stability(member: MemberEvaluation) -> float:
    return -1.0 if member.stability is None else member.stability.share()


def _n_pure(member: MemberEvaluation) -> int:
    if member.event_summary is None:
        return 0
    return member.event_summary.pure_features


def _describe(member: MemberEvaluation) -> str:
    if member.loss is None:
        return f"{member.member} ({percent(member.tokens.explained_variance, 1)} explained)"
    recovered, within = member.loss.loss_recovered
    text = f"{member.member} ({percent(recovered, 1)} recovered"
    if within is not None:
        low, high = within
        text += f", interval {percent(low, 1)} to {percent(high, 1)}"
    return f"{text})"


def _reason(equal: Sequence[MemberEvaluation], n_eligible: int, is_better: bool) -> str:
    """Return why the first of `equal` is recommended; these are the shortest, best first."""
    best = equal[0]
    n_equal = len(equal)
    verb = "explain" if best.loss is None else "recover"
    what = "variance" if best.loss is None else "loss"
    share = MIN_EXPLAINED if best.loss is None else MIN_RECOVERED
    if n_eligible == 1:
        by_pca = " and that PCA does not dominate" if is_better else ", yet PCA dominates it"
        return (
            f"{_describe(best)} is the only member that {verb}s {percent(share)} of the {what}"
            f"{by_pca}"
        )
    dominated = " and that PCA does not dominate" if is_better else ", all of them dominated by PCA"
    choice = ""
    if n_equal > 1 and _stability(best) > _stability(equal[1]):
        choice = "the most stable features"
    elif n_equal > 1 and _n_pure(best) > _n_pure(equal[1]):
        choice = "the most pure features"
    place = "one of the shortest descriptions" if choice else "the shortest description"
    reason = (
        f"{_describe(best)} has {place}, {best.description_bits:.0f} bits per token (L0 "
        f"{best.tokens.l0:.1f}), of the {n_eligible} that {verb} {percent(share)} of the "
        f"{what}{dominated}"
    )
    if n_equal == 1:
        return reason
    if not choice:
        return f"{reason}; no other within 5 % of it has more stable or more pure features"
    return f"{reason}; of the {n_equal} within 5 % of the shortest, it has {choice}"


def dominating(member: MemberEvaluation, pca: Sequence[PCAEvaluation]) -> PCAEvaluation | None:
    """Return the first PCA that has no more components than active features and no larger FVU."""
    for components in pca:
        if components.k <= round(member.tokens.l0) and components.fvu <= member.tokens.fvu:
            return components
    return None


def member_warnings(
    member: MemberEvaluation, pca: Sequence[PCAEvaluation], d_model: int
) -> tuple[str, ...]:
    """Return the warnings about a member."""
    warnings = []
    tokens = member.tokens
    better = dominating(member, pca)
    if member.status == "diverged":
        warnings.append("training diverged")
    if better is not None:
        warnings.append(f"{better.k} principal components explain more variance")
    if member.decoder.over_0_9 > MANY_TWINS:
        share = percent(member.decoder.over_0_9)
        warnings.append(f"{share} of the features have a twin (decoder cosine above 0.9)")
    if tokens.l0 > DENSE * d_model:
        warnings.append(f"L0 {tokens.l0:.0f} is more than half of the {d_model} dimensions")
    if tokens.never_active_fraction > MANY_INACTIVE:
        warnings.append(f"{percent(tokens.never_active_fraction)} of the features are never active")
    return tuple(warnings)
