"""How an autoencoder's features, alone and together, separate labelled events.

Features, probes and ties are chosen on the val patients and measured on the test patients;
docs/evaluate.md has the definitions and their sources. Raw dimensions and principal components are
scored by the same functions: they are autoencoders whose features are the positive and the negative
parts.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from minsae_jax.estimates import Estimate
from minsae_jax.evaluation.bootstrap import DIFFERENCE, SHARE, Resamples, estimate, interval
from minsae_jax.evaluation.dataset import Dataset
from minsae_jax.evaluation.event_results import (
    EventEvaluation,
    EventScore,
    EventSummary,
    FeatureEvents,
    Gain,
    ResampledAUCs,
)
from minsae_jax.evaluation.events import LabelledEvent, SpanActivations, max_over_spans
from minsae_jax.evaluation.linear_probe import LinearProbe, fit_probe
from minsae_jax.evaluation.purity import pure_features
from minsae_jax.evaluation.ranking import (
    Influence,
    auc,
    auc_influence,
    recall_at_precision,
    weighted_auc,
    weighted_recall,
)
from minsae_jax.evaluation.span_features import encode_spans
from minsae_jax.evaluation.ties import tied_features
from minsae_jax.evaluation.token_pass import FeatureTokens, token_auc
from minsae_jax.sae.member import SparseAutoencoder

BEST = 5  # features of the larger sparse probe, and of an ablation
MAX_TIES = 50  # listed, as many as the report ranks
MAX_PROBE_TOKENS = 5_000
SORTED_AT_ONCE = 1 << 22  # scores of all spans by some of the features
# A measure on the recordings as they are, then on each resample
Resampled = Float[np.ndarray, " resamples"]


@dataclass(frozen=True)
class EventKind:
    """Everything about one kind of events that does not depend on an autoencoder."""

    name: str
    # Of the test recordings
    events: Sequence[LabelledEvent]
    val: SpanActivations
    test: SpanActivations
    val_resamples: Resamples
    # The first of them is the recordings as they are
    test_resamples: Resamples
    # Which test tokens touch an event on their channel
    touched: Bool[np.ndarray, "sequences n_located"]
    # Which tokens of labelled recordings are in one for half of it
    covered: Bool[np.ndarray, "labelled n_located"]
    # Share of the tokens of labelled recordings that touch an event: the precision of random tokens
    base_rate: float

    @cached_property
    def probe(self) -> LinearProbe:
        """The linear probe on the activations x of the tokens of val spans."""
        x = np.concatenate(self.val.activations)
        is_event = np.repeat(self.val.is_event, self.val.lengths)
        if len(x) > MAX_PROBE_TOKENS:
            drawn = np.random.default_rng(0).choice(len(x), MAX_PROBE_TOKENS, replace=False)
            x = x[drawn]
            is_event = is_event[drawn]
        return fit_probe(x.astype(np.float64), is_event)

    @cached_property
    def n_patients(self) -> int:
        """Number of patients, or other units, with test spans."""
        return self.test_resamples.n_units(self.test.recording)

    def auc(self, scores: Float[np.ndarray, " test_spans"]) -> Resampled:
        """Return the AUC of a score of the test spans."""
        unit = self.test_resamples.unit[self.test.recording]
        return weighted_auc(scores, self.test.is_event, unit, self.test_resamples.weights)

    def recall(self, scores: Float[np.ndarray, " test_spans"]) -> Resampled:
        """Return the recall at a precision of 90 % of a score of the test spans."""
        unit = self.test_resamples.unit[self.test.recording]
        return weighted_recall(scores, self.test.is_event, unit, self.test_resamples.weights)

    def auc_of_largest(self, logits: Float[np.ndarray, " test_tokens"]) -> Resampled:
        """Return the AUC of the largest logit over the tokens of each test span."""
        return self.auc(max_over_spans(logits[:, None], self.test.lengths)[:, 0])

    @cached_property
    def x_probe_auc(self) -> Resampled:
        """The AUC of the probe on x."""
        return self.auc_of_largest(self.probe(np.concatenate(self.test.activations)))


class ChosenFeatures(NamedTuple):
    """The features that are chosen for one kind on its val spans."""

    # Of every feature
    val_auc: Float[np.ndarray, " d_sae"]
    # With the largest of these AUCs
    best: Int[np.ndarray, " best"]
    # Their largest activations in the val spans
    maxima: Float[np.ndarray, "val_spans best"]
    ties: Int[np.ndarray, " ties"] | None
    # Whose ablation lowers the probe's logit most on events
    ablated: Int[np.ndarray, " best"]


class _SpanMeasures(NamedTuple):
    """Measures of one autoencoder on the test spans of one kind; see `EventScore`."""

    # Of every feature
    all_aucs: Float[np.ndarray, " d_sae"]
    all_recalls: Float[np.ndarray, " d_sae"]
    auc: Resampled
    recall: Resampled
    probe_2_auc: Resampled
    probe_auc: Resampled
    x_hat_probe_auc: Resampled
    # Of `x_hat_probe_auc`, by the ablation for each kind
    drops: Float[np.ndarray, "kinds resamples"]


def choose_features(sae: SparseAutoencoder, kind: EventKind) -> ChosenFeatures:
    """Choose an autoencoder's features for a kind on its val spans."""
    no_probes = np.zeros((sae.d_model, 0), np.float32)
    spans = encode_spans(sae, kind.val, no_probes, np.zeros(0, np.int32))
    val_auc, influence = _val_influence(spans.maxima, kind)
    best = np.argsort(-val_auc, kind="stable")[:BEST]
    # How much the ablation of each feature lowers the mean logit on events more than on others
    effect = (spans.means[0] - spans.means[1]) * (sae.decoder_directions @ kind.probe.weights)
    return ChosenFeatures(
        val_auc=val_auc,
        best=best,
        maxima=spans.maxima[:, best],
        ties=tied_features(val_auc, influence, kind.val.recording, kind.val_resamples),
        ablated=np.argsort(-effect, kind="stable")[:BEST],
    )


def score_events(
    sae: SparseAutoencoder,
    kinds: Sequence[EventKind],
    chosen: Sequence[ChosenFeatures],
    tokens: FeatureTokens,
    test: Dataset,
    source: str,
) -> EventEvaluation:
    """Score an autoencoder's features on the test spans and test tokens of all kinds.

    chosen: for each kind. tokens: with the activations of the best feature for each kind. source:
    see `ResampledAUCs`. The activations of all features are in memory for the spans of one kind at
    a time.
    """
    any_kind = np.concatenate([kind.test.recording for kind in kinds])
    n_patients = kinds[0].test_resamples.n_units(any_kind)
    spans = [_measure_spans(sae, kinds, chosen, i) for i in range(len(kinds))]
    # Drops of the probes of all kinds (columns) by the ablation for each (rows)
    drops = np.stack([of_kind.drops for of_kind in spans], axis=1)
    features = _feature_events(kinds, chosen, spans, tokens, test)
    scores = {}
    for i, (kind, of_kind, measures) in enumerate(zip(kinds, chosen, spans, strict=True)):
        best = int(of_kind.best[0])
        ties = of_kind.ties
        ties_auc = None
        if ties is not None:
            aucs = measures.all_aucs[ties]
            ties_auc = (float(aucs.min()), float(aucs.max()))
        scores[kind.name] = EventScore(
            val_events=int(kind.val.is_event.sum()),
            test_events=int(kind.test.is_event.sum()),
            feature=best,
            auc=estimate(measures.auc, kind.n_patients, SHARE),
            val_auc=float(of_kind.val_auc[best]),
            n_ties=None if ties is None else len(ties),
            ties=() if ties is None else tuple(ties[:MAX_TIES].tolist()),
            ties_auc=ties_auc,
            recall=estimate(measures.recall, kind.n_patients, SHARE),
            best_five=tuple(of_kind.best.tolist()),
            probe_2_auc=estimate(measures.probe_2_auc, kind.n_patients, SHARE),
            probe_auc=estimate(measures.probe_auc, kind.n_patients, SHARE),
            x_probe_auc=float(kind.x_probe_auc[0]),
            x_hat_probe_auc=estimate(measures.x_hat_probe_auc, kind.n_patients, SHARE),
            ablation_drop=estimate(drops[i, i], kind.n_patients, DIFFERENCE),
            ablation_drop_others=estimate(_mean_without(drops[i], i), n_patients, DIFFERENCE),
            token_auc=token_auc(tokens.chosen[i], kind.covered),
            token_base_rate=kind.base_rate,
            precision=tokens.precision_of(best, kind.touched, test.recording, kind.test_resamples),
            examples=int(tokens.examples[best]),
            pure_features=int(features.is_pure[i].sum()),
        )
    summary = _summarise(kinds, spans, drops, scores, features, n_patients)
    resampled = ResampledAUCs(
        np.stack([of_kind.auc for of_kind in spans]),
        np.array([*(kind.n_patients for kind in kinds), n_patients]),
        source,
        test.store.require_manifest().encoder,
    )
    return EventEvaluation(scores, summary, features, resampled)


def gain_over(others: EventEvaluation, events: EventEvaluation) -> Gain:
    """Return the gain of features over others that were measured on the same resamples."""
    own = events.resampled
    gains = own.aucs - others.resampled.aucs
    *n_of_kinds, n_patients = own.n_patients.tolist()
    auc_gain = {
        kind: estimate(gain, n, DIFFERENCE)
        for kind, gain, n in zip(events.scores, gains, n_of_kinds, strict=True)
    }
    return Gain(auc_gain, estimate(gains.mean(axis=0), n_patients, DIFFERENCE))


def _measure_spans(
    sae: SparseAutoencoder, kinds: Sequence[EventKind], chosen: Sequence[ChosenFeatures], i: int
) -> _SpanMeasures:
    """Measure features and probes on the test spans of kind i."""
    kind = kinds[i]
    best = chosen[i].best
    probes = np.stack([kind.probe.weights for kind in kinds], axis=1).astype(np.float32)
    ablated = np.stack([of_kind.ablated for of_kind in chosen]).astype(np.int32)
    spans = encode_spans(sae, kind.test, probes, ablated.reshape(-1))
    maxima = spans.maxima[:, best]
    logits = spans.logits[:, i]
    x_hat_probe_auc = kind.auc_of_largest(logits)
    # The probe is linear: without feature i its logit is lower by f_i (W_dec,i · w).
    effects = (sae.decoder_directions[ablated] @ probes)[..., i]
    features = spans.chosen.reshape(-1, *ablated.shape)
    # Without any feature x̂ is b_dec. All such tokens get this logit, since the rounding of the
    # difference would rank them, which are many if few features are active.
    logit_of_bias = float(np.asarray(sae.params["b_dec"]) @ probes[:, i])
    drops = []
    for j in range(len(kinds)):
        n_others = spans.n_active - (features[:, j] > 0).sum(axis=1)
        without = logits - features[:, j] @ effects[j]
        without = kind.auc_of_largest(np.where(n_others > 0, without, logit_of_bias))
        drops.append(x_hat_probe_auc - without)
    return _SpanMeasures(
        all_aucs=_by_columns(auc, spans.maxima, kind.test.is_event),
        all_recalls=_by_columns(recall_at_precision, spans.maxima, kind.test.is_event),
        auc=kind.auc(maxima[:, 0]),
        recall=kind.recall(maxima[:, 0]),
        probe_2_auc=_sparse_probe(kind, chosen[i].maxima[:, :2], maxima[:, :2]),
        probe_auc=_sparse_probe(kind, chosen[i].maxima, maxima),
        x_hat_probe_auc=x_hat_probe_auc,
        drops=np.stack(drops),
    )


def _feature_events(
    kinds: Sequence[EventKind],
    chosen: Sequence[ChosenFeatures],
    spans: Sequence[_SpanMeasures],
    tokens: FeatureTokens,
    test: Dataset,
) -> FeatureEvents:
    """Return the measures of every feature."""
    precision = []
    is_pure = []
    for kind in kinds:
        of_kind = tokens.precision(kind.touched)
        precision.append(of_kind)
        is_pure.append(pure_features(test, kind.events, tokens, of_kind, kind.base_rate))
    return FeatureEvents(
        kinds=tuple(kind.name for kind in kinds),
        val_auc=np.stack([of_kind.val_auc for of_kind in chosen]),
        auc=np.stack([of_kind.all_aucs for of_kind in spans]),
        recall=np.stack([of_kind.all_recalls for of_kind in spans]),
        precision=np.stack(precision),
        examples=tokens.examples,
        base_rate=np.array([kind.base_rate for kind in kinds]),
        is_pure=np.stack(is_pure),
    )


def _summarise(
    kinds: Sequence[EventKind],
    spans: Sequence[_SpanMeasures],
    drops: Float[np.ndarray, "kinds kinds resamples"],
    scores: Mapping[str, EventScore],
    features: FeatureEvents,
    n_patients: int,
) -> EventSummary:
    """Return the means over kinds; those of single tokens over the kinds that define them.

    n_patients: with test spans of any kind.
    """
    target_drop = np.mean([drops[i, i] for i in range(len(kinds))], axis=0)
    other_drop = np.mean([_mean_without(drops[i], i) for i in range(len(kinds))], axis=0)
    x_aucs = np.mean([kind.x_probe_auc for kind in kinds], axis=0)
    x_hat_aucs = np.mean([of_kind.x_hat_probe_auc for of_kind in spans], axis=0)
    aucs = np.mean([of_kind.auc for of_kind in spans], axis=0)
    recalls = np.mean([of_kind.recall for of_kind in spans], axis=0)
    probe_aucs = np.mean([of_kind.probe_auc for of_kind in spans], axis=0)
    return EventSummary(
        auc=estimate(aucs, n_patients, SHARE),
        recall=estimate(recalls, n_patients, SHARE),
        precision=_mean_of_defined([score.precision.value for score in scores.values()]),
        token_auc=_mean_of_defined([score.token_auc for score in scores.values()]),
        probe_auc=estimate(probe_aucs, n_patients, SHARE),
        pure_features=int(features.is_pure.any(axis=0).sum()),
        tpp=estimate(target_drop - other_drop, n_patients),
        probe_recovered=probe_recovered(x_aucs, x_hat_aucs, n_patients),
    )


def probe_recovered(
    x_aucs: Float[np.ndarray, " n"], x_hat_aucs: Float[np.ndarray, " n"], n_patients: int
) -> Estimate:
    """Return (AUC on x̂ - 0.5) / (AUC on x - 0.5), from AUCs in the test set and its resamples.

    It is NaN if the AUC on x is not above chance: its interval contains 0.5, or less.
    """
    x = x_aucs - 0.5
    of_x = interval(x[1:], n_patients)
    if x[0] <= 0 or (of_x is not None and of_x.low <= 0):
        return Estimate(math.nan)
    return estimate((x_hat_aucs - 0.5) / np.where(x > 0, x, np.nan), n_patients)


def _mean_of_defined(values: Sequence[float]) -> float:
    """Return the mean of the values that are not NaN; NaN if there are none."""
    defined = [value for value in values if not math.isnan(value)]
    return float(np.mean(defined)) if defined else math.nan


def _mean_without(values: Float[np.ndarray, "kinds n"], i: int) -> Float[np.ndarray, " n"]:
    """Return the mean of the other rows than i; NaN if there are none."""
    if len(values) == 1:
        return np.full(values.shape[1], np.nan)
    return np.delete(values, i, axis=0).mean(axis=0)


def _sparse_probe(
    kind: EventKind,
    val: Float[np.ndarray, "val_spans k"],
    test: Float[np.ndarray, "test_spans k"],
) -> Resampled:
    """Return the test AUC of a probe on some features, fitted on val."""
    probe = fit_probe(val.astype(np.float64), kind.val.is_event)
    return kind.auc(probe(test))


def _by_columns(
    measure: Callable[[np.ndarray, np.ndarray], np.ndarray],
    scores: Float[np.ndarray, "spans d_sae"],
    is_event: Bool[np.ndarray, " spans"],
) -> Float[np.ndarray, " d_sae"]:
    """Return a measure of every column; in blocks, since it sorts them, which takes memory."""
    return np.concatenate([measure(block, is_event) for block in _column_blocks(scores)])


def _val_influence(scores: Float[np.ndarray, "spans d_sae"], kind: EventKind) -> Influence:
    """Return every column's AUC on val with the influence of units, in blocks of columns."""
    resamples = kind.val_resamples
    unit = resamples.unit[kind.val.recording]
    n_units = resamples.weights.shape[1]
    blocks = [
        auc_influence(block, kind.val.is_event, unit, n_units) for block in _column_blocks(scores)
    ]
    aucs = np.concatenate([block.auc for block in blocks])
    return Influence(aucs, np.concatenate([block.influence for block in blocks], axis=1))


def _column_blocks(
    scores: Float[np.ndarray, "spans d_sae"],
) -> Iterator[Float[np.ndarray, "spans columns"]]:
    n_columns = max(1, SORTED_AT_ONCE // len(scores))
    for start in range(0, scores.shape[1], n_columns):
        yield scores[:, start : start + n_columns]
