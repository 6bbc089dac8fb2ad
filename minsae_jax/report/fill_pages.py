"""Fills the pages of recommendation, members, events and labels from an evaluation."""

from collections.abc import Mapping, Sequence

import numpy as np

from minsae_jax.evaluation.associations import Associations, LabelAssociation
from minsae_jax.evaluation.event_results import EventEvaluation, EventScore, EventSummary
from minsae_jax.evaluation.label_probes import LabelProbe as MeasuredProbe
from minsae_jax.evaluation.label_probes import ProbeScore
from minsae_jax.evaluation.label_tests import LEVEL, LabelTest
from minsae_jax.evaluation.labels import PatientLabel
from minsae_jax.evaluation.results import (
    Evaluation,
    MemberEvaluation,
    PCAEvaluation,
)
from minsae_jax.evaluation.steering.results import Steering
from minsae_jax.evaluation.variance import VarianceShares
from minsae_jax.report.pages import (
    Detection,
    DetectionBySet,
    EventPage,
    LabelledFeature,
    LabelPage,
    LabelProbe,
    MemberMeasures,
    Pages,
    ProbeResult,
    RankedFeature,
    RecommendedMember,
    SteeringEffect,
    SteeringResult,
)
from minsae_jax.sae.figures import PCA
from minsae_jax.sae.hyper import SPARSITY, SYMBOLS, sparsity, value_text, varied_names

RANKED = 50  # features in the table of an event or a label
SCORE_NAMES = {"AUC": ("AUC", 0.5), "rho": ("Spearman's rho", 0.0)}


def fill_pages(
    evaluation: Evaluation, associations: Associations, steering: Mapping[str, Steering]
) -> Pages:
    """Return the report's data other than the features of the selected member.

    steering: with the best feature of each kind of event, by kind; may be empty.
    """
    selected = evaluation.find(evaluation.selected)
    events = selected.event_evaluation
    stability = selected.stability
    n_seeds = None
    if stability is not None and stability.features is not None:
        n_seeds = stability.features.n_seeds
    recommendation = evaluation.recommendation
    return Pages(
        recommended=RecommendedMember(
            member=recommendation.member,
            reason=recommendation.reason,
            rule=evaluation.rule,
            runners_up=recommendation.runners_up,
            warnings=recommendation.warnings.get(recommendation.member, ()),
        ),
        members=_members(evaluation),
        events=() if events is None else _events(evaluation, events, steering),
        event_means=None if events is None else _event_means(evaluation, events),
        labels=[_label(each, associations) for each in associations.labels],
        n_seeds=n_seeds,
    )


# ---- members


def _members(evaluation: Evaluation) -> list[MemberMeasures]:
    has_seeds = "seed" in varied_names(member.hyper for member in evaluation.members)
    rows = [_member(evaluation, member, has_seeds) for member in evaluation.members]
    return rows + [_principal_components(pca) for pca in evaluation.pca]


def _member(evaluation: Evaluation, member: MemberEvaluation, has_seeds: bool) -> MemberMeasures:
    setting = sparsity(member.hyper)
    texts = [] if setting is None else [f"{SYMBOLS[setting[0]]} = {value_text(setting[1])}"]
    if has_seeds:
        texts.append(f"seed {member.hyper['seed']}")
    events = member.event_summary
    return MemberMeasures(
        name=member.member,
        kind=str(member.hyper.get("kind", "relu")),
        setting=", ".join(texts),
        line=",".join(value_text(v) for name, v in member.hyper.items() if name not in SPARSITY),
        l0=member.tokens.l0,
        fvu=member.tokens.fvu,
        loss_recovered=None if member.loss is None else member.loss.loss_recovered,
        loss_recovered_interval=None if member.loss is None else member.loss.interval,
        never_active=member.tokens.never_active_fraction,
        stability=None if member.stability is None else member.stability.share,
        pure_features=None if events is None else events.pure_features,
        event_auc=None if events is None else events.auc,
        event_auc_interval=None if events is None else events.auc_interval,
        tpp=None if events is None else events.tpp,
        tpp_interval=None if events is None else events.tpp_interval,
        twins=member.decoder.over_0_9,
        description_bits=member.description_bits,
        warnings=evaluation.recommendation.warnings.get(member.member, ()),
        is_recommended=member.member == evaluation.recommended,
    )


def _principal_components(pca: PCAEvaluation) -> MemberMeasures:
    events = None if pca.event_evaluation is None else pca.event_evaluation.summary
    return MemberMeasures(
        name=pca.name,
        kind=PCA,
        setting=f"k = {pca.k}",
        line="",
        l0=float(pca.k),
        fvu=pca.fvu,
        loss_recovered=None if pca.loss is None else pca.loss.loss_recovered,
        loss_recovered_interval=None if pca.loss is None else pca.loss.interval,
        pure_features=None if events is None else events.pure_features,
        event_auc=None if events is None else events.auc,
        event_auc_interval=None if events is None else events.auc_interval,
        tpp=None if events is None else events.tpp,
        tpp_interval=None if events is None else events.tpp_interval,
        description_bits=pca.description_bits,
    )


# ---- events


def _events(
    evaluation: Evaluation, events: EventEvaluation, steering: Mapping[str, Steering]
) -> list[EventPage]:
    pages = []
    for i, (kind, score) in enumerate(events.scores.items()):
        baseline = evaluation.baselines[kind]
        page = EventPage(
            kind=kind,
            test_events=score.test_events,
            val_events=score.val_events,
            feature=score.feature,
            scores=DetectionBySet(
                sae=_detection(score), raw=_detection(baseline.raw), pca=_detection(baseline.pca)
            ),
            base_rate=score.token_base_rate,
            n_ties=score.n_ties,
            ties_auc=score.ties_auc,
            pure_features=score.pure_features,
            features=_ranked(events, i, score),
            steering=_steering(steering[kind]) if kind in steering else None,
        )
        pages.append(page)
    return pages


def _detection(score: EventScore) -> Detection:
    return Detection(
        auc=score.auc,
        auc_interval=score.auc_interval,
        recall=score.recall,
        recall_interval=score.recall_interval,
        token_auc=score.token_auc,
        precision=score.precision,
        probe_2_auc=score.probe_2_auc,
        probe_2_auc_interval=score.probe_2_auc_interval,
        probe_5_auc=score.probe_auc,
        probe_5_auc_interval=score.probe_auc_interval,
    )


def _event_means(evaluation: Evaluation, events: EventEvaluation) -> DetectionBySet:
    raw = evaluation.raw_events
    pca = evaluation.pca_events
    return DetectionBySet(
        sae=_mean_detection(events.summary),
        raw=None if raw is None else _mean_detection(raw.summary),
        pca=None if pca is None else _mean_detection(pca.summary),
    )


def _mean_detection(summary: EventSummary) -> Detection:
    return Detection(
        auc=summary.auc,
        auc_interval=summary.auc_interval,
        recall=summary.recall,
        recall_interval=summary.recall_interval,
        token_auc=summary.token_auc,
        precision=summary.precision,
        probe_5_auc=summary.probe_auc,
        probe_5_auc_interval=summary.probe_auc_interval,
    )


def _ranked(events: EventEvaluation, kind: int, score: EventScore) -> list[RankedFeature]:
    """Return the features with the largest AUC on val, and which of them are ties."""
    features = events.features
    order = np.argsort(-features.val_auc[kind], kind="stable")[:RANKED]
    ties = set(score.ties)
    ranked = []
    for feature in order.tolist():
        row = RankedFeature(
            feature=feature,
            val_auc=float(features.val_auc[kind, feature]),
            auc=float(features.auc[kind, feature]),
            recall=float(features.recall[kind, feature]),
            precision=float(features.precision[kind, feature]),
            is_tied=feature in ties,
        )
        ranked.append(row)
    return ranked


def _steering(steering: Steering) -> SteeringResult:
    effects = []
    for effect in steering.effects:
        output = effect.reconstruction
        selectivity = None if steering.target is None else effect.selectivity(steering.target)
        of_scale = SteeringEffect(
            scale=effect.scale,
            changes={reading.kind: reading.change for reading in effect.probes},
            selectivity=selectivity,
            waveform=None if output is None else output.waveform,
            band_ratio={} if output is None else output.band_ratio,
        )
        effects.append(of_scale)
    return SteeringResult(
        feature=steering.features[0],
        unit=steering.unit,
        n_tokens=steering.n_tokens,
        n_affected=steering.n_affected,
        effects=effects,
    )


# ---- labels


def _label(association: LabelAssociation, associations: Associations) -> LabelPage:
    label = association.label
    test = association.tests.test
    notes = [association.tests.note] if association.tests.note else []
    if label.n_ambiguous:
        notes.append(f"{label.n_ambiguous} patients with several categories are left out")
    probe = None
    if isinstance(association.probe, str):
        notes.append(f"no probe: {association.probe}")
    else:
        probe = _probe(association.probe)
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
        features=() if test is None else _associated(test, associations.variance),
        probe=probe,
        notes=notes,
    )


def _values(label: PatientLabel) -> str:
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


def _associated(test: LabelTest, variance: VarianceShares) -> list[LabelledFeature]:
    """Return the features with the smallest p."""
    order = np.argsort(test.p, kind="stable")[:RANKED]
    return [
        LabelledFeature(
            feature=int(feature),
            effect=float(test.effect[feature]),
            p=float(test.p[feature]),
            q=float(test.q[feature]),
            patient_share=float(variance.patient[feature]),
        )
        for feature in order
    ]


def _probe(probe: MeasuredProbe) -> LabelProbe:
    score_name, chance = SCORE_NAMES[probe.score_name]
    return LabelProbe(
        score_name=score_name,
        chance=chance,
        n_val=probe.n_val,
        n_test=probe.n_test,
        features=_probe_result(probe.features),
        raw=_probe_result(probe.raw),
    )


def _probe_result(score: ProbeScore) -> ProbeResult:
    low, high = np.quantile(score.permuted, [0.025, 0.975]).tolist()
    return ProbeResult(score.score, score.p, score.chance, (low, high))


def best_features(events: EventEvaluation | None) -> dict[str, int]:
    """Return the best feature for each kind of event."""
    if events is None:
        return {}
    return {kind: score.feature for kind, score in events.scores.items()}


def shown_features(pages: Pages) -> Sequence[int]:
    """Return the distinct features on the pages of events and labels, which need pages too."""
    features: dict[int, None] = {}
    for event in pages.events:
        features |= dict.fromkeys([event.feature, *(row.feature for row in event.features)])
    for label in pages.labels:
        related = [row.feature for row in label.features if row.q < LEVEL]
        features |= dict.fromkeys(related)
    return list(features)
