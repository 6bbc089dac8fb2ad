"""How an autoencoder's features, alone and together, separate labelled events.

Features, probes and ties are chosen on the val patients and measured on the test patients;
docs/evaluate.md has the definitions and their sources. Raw dimensions and principal components are
scored by the same functions: they are autoencoders whose features are the positive and the negative
parts.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from minsae_jax.evaluation.bootstrap import (
    DIFFERENCE,
    SHARE,
    Resamples,
    estimate,
)
from minsae_jax.evaluation.event_results import EventScore, MeanIntervals
from minsae_jax.evaluation.events import LabelledEvent, SpanActivations, max_over_spans
from minsae_jax.evaluation.linear_probe import LinearProbe, fit_probe
from minsae_jax.evaluation.ranking import (
    Influence,
    auc,
    auc_influence,
    recall_at_precision,
    weighted_auc,
    weighted_recall,
)
from minsae_jax.evaluation.span_features import EncodedSpans, encode_spans
from minsae_jax.evaluation.ties import tied_features
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
    # Fitted on the tokens of the val spans
    probe: LinearProbe
    # Its largest logit on x in each test span
    x_logits: Float[np.ndarray, " test_spans"]
    # Which test tokens touch an event on their channel
    touched: Bool[np.ndarray, "sequences n_located"]
    # Which tokens of labelled recordings are in one for half of it
    covered: Bool[np.ndarray, "labelled n_located"]
    # Share of the tokens of labelled recordings that touch an event: the precision of random tokens
    base_rate: float

    def test_auc(
        self,
        scores: Float[np.ndarray, " test_spans"],
        resamples: Resamples,
    ) -> Float[np.ndarray, " resamples"]:
        """Return the AUC of a score of the test spans in each resample of their patients."""
        unit = resamples.unit[self.test.recording]
        return weighted_auc(scores, self.test.is_event, unit, resamples.weights)


@dataclass(frozen=True)
class SpanMeasures:
    """Measures of one autoencoder on the spans of all kinds, in the order of the kinds."""

    scores: list[EventScore]
    # Of every feature
    val_auc: Float[np.ndarray, "kinds d_sae"]
    auc: Float[np.ndarray, "kinds d_sae"]
    recall: Float[np.ndarray, "kinds d_sae"]
    intervals: MeanIntervals


class _ResampledKind(NamedTuple):
    """The measures of one kind that are resampled; see `EventScore`."""

    auc: Resampled
    recall: Resampled
    probe_2_auc: Resampled
    probe_auc: Resampled
    x_probe_auc: Resampled
    x_hat_probe_auc: Resampled
    ablation_drop: Resampled
    # NaN with a single kind
    ablation_drop_others: Resampled


class _Chosen(NamedTuple):
    """The features that are chosen for one kind on its val spans."""

    val_auc: Float[np.ndarray, " d_sae"]
    # With the largest of these AUCs
    best: Int[np.ndarray, " best"]
    # Their largest activations in the val spans
    maxima: Float[np.ndarray, "val_spans best"]
    ties: Int[np.ndarray, " ties"] | None
    # Ablated for this kind
    relevant: Int[np.ndarray, " best"]


class _TestSpans(NamedTuple):
    """The features on the test spans of one kind."""

    auc: Float[np.ndarray, " d_sae"]
    recall: Float[np.ndarray, " d_sae"]
    # Its maxima are those of the best features for this kind
    encoded: EncodedSpans


def make_kind(
    name: str,
    events: Sequence[LabelledEvent],
    val: SpanActivations,
    test: SpanActivations,
    share: Float[np.ndarray, "sequences n_located"],
    is_labelled: Bool[np.ndarray, " sequences"],
) -> EventKind:
    """Return a kind of events with its probe.

    events: of test recordings. share: see `event_share` of the test tokens. is_labelled: test
    sequences of recordings with labelled events of any kind.
    """
    x = np.concatenate(val.activations)
    is_event = np.repeat(val.is_event, val.lengths)
    if len(x) > MAX_PROBE_TOKENS:
        drawn = np.random.default_rng(0).choice(len(x), MAX_PROBE_TOKENS, replace=False)
        x = x[drawn]
        is_event = is_event[drawn]
    probe = fit_probe(x.astype(np.float64), is_event)
    logits = probe(np.concatenate(test.activations))
    x_logits = max_over_spans(logits[:, None], test.lengths)[:, 0]
    touched = share > 0
    of_labelled = share[is_labelled]
    base_rate = float((of_labelled > 0).mean())
    return EventKind(
        name=name,
        events=events,
        val=val,
        test=test,
        probe=probe,
        x_logits=x_logits,
        touched=touched,
        covered=of_labelled >= 0.5,
        base_rate=base_rate,
    )


def measure_spans(
    sae: SparseAutoencoder,
    kinds: Sequence[EventKind],
    val_resamples: Resamples,
    test_resamples: Resamples,
) -> SpanMeasures:
    """Score an autoencoder's features on all kinds of events.

    The activations of all features are in memory for the spans of one kind at a time.
    """
    weights = np.insert(test_resamples.weights, 0, 1, axis=0)
    with_original = replace(test_resamples, weights=weights)
    n_of_kinds = [test_resamples.n_units(kind.test.recording) for kind in kinds]
    n_of_any = test_resamples.n_units(np.concatenate([kind.test.recording for kind in kinds]))
    probes = np.stack([kind.probe.weights for kind in kinds], axis=1).astype(np.float32)
    chosen = [_choose(sae, kind, probes, val_resamples) for kind in kinds]
    ablated = np.stack([one.relevant for one in chosen]).astype(np.int32)
    tests = []
    for kind, of_kind in zip(kinds, chosen, strict=True):
        tests.append(_encode_test(sae, kind, probes, of_kind.best, ablated))
    encoded = [test.encoded for test in tests]
    drops = _ablation_drops(sae, kinds, encoded, ablated, probes, with_original)
    scores = []
    resampled = []
    for i, kind in enumerate(kinds):
        drops_of_kind = (drops[i, i], _mean_without(drops[i], i))
        logits = encoded[i].logits[:, i]
        one = _resample(kind, chosen[i], encoded[i], logits, drops_of_kind, with_original)
        resampled.append(one)
        scores.append(_score(kind, one, (n_of_kinds[i], n_of_any), chosen[i], tests[i].auc))
    return SpanMeasures(
        scores=scores,
        val_auc=np.stack([one.val_auc for one in chosen]),
        auc=np.stack([test.auc for test in tests]),
        recall=np.stack([test.recall for test in tests]),
        intervals=_mean_intervals(resampled, n_of_any),
    )


def _choose(
    sae: SparseAutoencoder,
    kind: EventKind,
    probes: Float[np.ndarray, "d_model kinds"],
    resamples: Resamples,
) -> _Chosen:
    """Choose features on the val spans of a kind."""
    val = encode_spans(sae, kind.val, probes, np.zeros(0, np.int32))
    val_auc, influence = _val_influence(val.maxima, kind.val, resamples)
    best = np.argsort(-val_auc, kind="stable")[:BEST]
    return _Chosen(
        val_auc=val_auc,
        best=best,
        maxima=val.maxima[:, best],
        ties=tied_features(val_auc, influence, kind.val.recording, resamples),
        relevant=_most_relevant(sae, kind.probe, val),
    )


def _encode_test(
    sae: SparseAutoencoder,
    kind: EventKind,
    probes: Float[np.ndarray, "d_model kinds"],
    best: Int[np.ndarray, " best"],
    ablated: Int[np.ndarray, "kinds ablated"],
) -> _TestSpans:
    """Measure all features on the test spans of a kind, and encode these for further measures."""
    encoded = encode_spans(sae, kind.test, probes, ablated.reshape(-1))
    return _TestSpans(
        auc=_by_columns(auc, encoded.maxima, kind.test.is_event),
        recall=_by_columns(recall_at_precision, encoded.maxima, kind.test.is_event),
        encoded=encoded._replace(maxima=encoded.maxima[:, best]),
    )


def _resample(
    kind: EventKind,
    chosen: _Chosen,
    test: EncodedSpans,
    x_hat_logits: Float[np.ndarray, " tokens"],
    drops: tuple[Float[np.ndarray, " resamples"], Float[np.ndarray, " resamples"]],
    resamples: Resamples,
) -> _ResampledKind:
    """Measure one kind in each resample.

    x_hat_logits: of its probe. drops: of its probe and of the others'.
    """
    of_best = test.maxima[:, 0]
    unit = resamples.unit[kind.test.recording]
    return _ResampledKind(
        auc=kind.test_auc(of_best, resamples),
        recall=weighted_recall(of_best, kind.test.is_event, unit, resamples.weights),
        probe_2_auc=_sparse_probe(chosen.maxima[:, :2], test.maxima[:, :2], kind, resamples),
        probe_auc=_sparse_probe(chosen.maxima, test.maxima, kind, resamples),
        x_probe_auc=kind.test_auc(kind.x_logits, resamples),
        x_hat_probe_auc=_probe_auc(test, x_hat_logits, kind, resamples),
        ablation_drop=drops[0],
        ablation_drop_others=drops[1],
    )


def _score(
    kind: EventKind,
    resampled: _ResampledKind,
    n_patients: tuple[int, int],
    chosen: _Chosen,
    test_auc: Float[np.ndarray, " d_sae"],
) -> EventScore:
    """Return the scores of a kind; those on single tokens are filled in later.

    n_patients: with test spans of this kind, and of any kind.
    """
    n_of_kind, n_of_any = n_patients
    best = chosen.best
    ties = chosen.ties
    ties_auc = None
    if ties is not None:
        ties_auc = (float(test_auc[ties].min()), float(test_auc[ties].max()))
    return EventScore(
        val_events=int(kind.val.is_event.sum()),
        test_events=int(kind.test.is_event.sum()),
        feature=int(best[0]),
        auc=estimate(resampled.auc, n_of_kind, SHARE),
        val_auc=float(chosen.val_auc[best[0]]),
        n_ties=None if ties is None else len(ties),
        ties=() if ties is None else tuple(ties[:MAX_TIES].tolist()),
        ties_auc=ties_auc,
        recall=estimate(resampled.recall, n_of_kind, SHARE),
        best_five=tuple(best.tolist()),
        probe_2_auc=estimate(resampled.probe_2_auc, n_of_kind, SHARE),
        probe_auc=estimate(resampled.probe_auc, n_of_kind, SHARE),
        x_probe_auc=float(resampled.x_probe_auc[0]),
        x_hat_probe_auc=estimate(resampled.x_hat_probe_auc, n_of_kind, SHARE),
        ablation_drop=estimate(resampled.ablation_drop, n_of_kind, DIFFERENCE),
        ablation_drop_others=estimate(resampled.ablation_drop_others, n_of_any, DIFFERENCE),
    )


def _mean_intervals(resampled: Sequence[_ResampledKind], n_patients: int) -> MeanIntervals:
    """Return the intervals of the means over kinds and of what is computed from them.

    n_patients: with test spans of any kind.
    """
    by_measure = zip(*resampled, strict=True)
    means = _ResampledKind(*(np.mean(kinds, axis=0) for kinds in by_measure))
    x = means.x_probe_auc - 0.5
    x_hat = means.x_hat_probe_auc - 0.5
    return MeanIntervals(
        auc=estimate(means.auc, n_patients, SHARE).interval,
        recall=estimate(means.recall, n_patients, SHARE).interval,
        probe_auc=estimate(means.probe_auc, n_patients, SHARE).interval,
        tpp=estimate(means.ablation_drop - means.ablation_drop_others, n_patients).interval,
        probe_recovered=estimate(x_hat / np.where(x > 0, x, np.nan), n_patients).interval,
    )


def _mean_without(values: Float[np.ndarray, "kinds n"], i: int) -> Float[np.ndarray, " n"]:
    """Return the mean of the other rows than i; NaN if there are none."""
    if len(values) == 1:
        return np.full(values.shape[1], np.nan)
    return np.delete(values, i, axis=0).mean(axis=0)


def _by_columns(
    measure: Callable[[np.ndarray, np.ndarray], np.ndarray],
    scores: Float[np.ndarray, "spans d_sae"],
    is_event: Bool[np.ndarray, " spans"],
) -> Float[np.ndarray, " d_sae"]:
    """Return a measure of every column; in blocks, since it sorts them, which takes memory."""
    return np.concatenate([measure(block, is_event) for block in _column_blocks(scores)])


def _column_blocks(
    scores: Float[np.ndarray, "spans d_sae"],
) -> Iterator[Float[np.ndarray, "spans columns"]]:
    n_columns = max(1, SORTED_AT_ONCE // len(scores))
    for start in range(0, scores.shape[1], n_columns):
        yield scores[:, start : start + n_columns]


def _val_influence(
    scores: Float[np.ndarray, "spans d_sae"], spans: SpanActivations, resamples: Resamples
) -> Influence:
    """Return every column's AUC with the influence of units, in blocks of columns."""
    unit = resamples.unit[spans.recording]
    n_units = resamples.weights.shape[1]
    blocks = [
        auc_influence(block, spans.is_event, unit, n_units) for block in _column_blocks(scores)
    ]
    aucs = np.concatenate([block.auc for block in blocks])
    return Influence(aucs, np.concatenate([block.influence for block in blocks], axis=1))


def _sparse_probe(
    val: Float[np.ndarray, "val_spans k"],
    test: Float[np.ndarray, "test_spans k"],
    kind: EventKind,
    resamples: Resamples,
) -> Float[np.ndarray, " resamples"]:
    """Return the test AUC of a probe on some features, fitted on val."""
    probe = fit_probe(val.astype(np.float64), kind.val.is_event)
    return kind.test_auc(probe(test), resamples)


def _probe_auc(
    spans: EncodedSpans,
    logits: Float[np.ndarray, " tokens"],
    kind: EventKind,
    resamples: Resamples,
) -> Float[np.ndarray, " resamples"]:
    """Return the AUC of a span's largest logit."""
    largest = max_over_spans(logits[:, None], spans.lengths)[:, 0]
    return kind.test_auc(largest, resamples)


def _most_relevant(
    sae: SparseAutoencoder, probe: LinearProbe, spans: EncodedSpans
) -> Int[np.ndarray, " best"]:
    """Return the features whose ablation lowers the probe's logit most on events.

    That is by (mean on events - mean on others) · (decoder direction · probe), on val.
    """
    difference = spans.means[0] - spans.means[1]
    effect = difference * (sae.decoder_directions @ probe.weights)
    return np.argsort(-effect, kind="stable")[:BEST]


def _ablation_drops(
    sae: SparseAutoencoder,
    kinds: Sequence[EventKind],
    test: Sequence[EncodedSpans],
    ablated: Int[np.ndarray, "kinds best"],
    probes: Float[np.ndarray, "d_model kinds"],
    resamples: Resamples,
) -> Float[np.ndarray, "kinds kinds resamples"]:
    """Return the drop of each kind's probe AUC on x̂ (columns) by the ablation for each (rows)."""
    # The probe is linear: without feature i its logit is lower by f_i (W_dec,i · w).
    on_probes = sae.decoder_directions[ablated] @ probes
    drops = np.zeros((len(kinds), len(kinds), len(resamples.weights)))
    for j, (kind, spans) in enumerate(zip(kinds, test, strict=True)):
        logits = spans.logits[:, j]
        complete = _probe_auc(spans, logits, kind, resamples)
        features = spans.chosen.reshape(len(logits), *ablated.shape)
        for i in range(len(kinds)):
            part = features[:, i] @ on_probes[i, :, j]
            without = _probe_auc(spans, logits - part, kind, resamples)
            drops[i, j] = complete - without
    return drops
