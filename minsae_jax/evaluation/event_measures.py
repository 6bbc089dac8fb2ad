"""How an autoencoder's features, alone and together, separate labelled events.

Features, probes and ties are chosen on the val patients and measured on the test patients;
docs/evaluate.md has the definitions and their sources. Raw dimensions and principal components are
scored by the same functions: they are autoencoders whose features are the positive and the negative
parts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from minsae_jax.evaluation.bootstrap import (
    Interval,
    interval,
    recall_at_precision,
    weighted_auc,
    weighted_recall,
)
from minsae_jax.evaluation.events import (
    LinearProbe,
    SpanActivations,
    auc,
    fit_probe,
    max_over_spans,
)
from minsae_jax.evaluation.span_features import EncodedSpans, encode_spans
from minsae_jax.sae.member import SparseAutoencoder

PROBE_FEATURES = (1, 2, 5)  # k of the sparse probes
MOST = max(PROBE_FEATURES)
MAX_TIES = 20  # listed
MAX_PROBE_TOKENS = 5_000
COLUMN_BLOCK = 1024


@dataclass(frozen=True)
class EventKind:
    """Everything about one kind of events that does not depend on an autoencoder."""

    name: str
    val: SpanActivations
    test: SpanActivations
    # Fitted on the tokens of the val spans
    probe: LinearProbe
    # Its largest logit on x in each test span
    x_logits: Float[np.ndarray, " test_spans"]
    # Which test tokens touch an event on their channel, and which are in one for half of it
    touched: Bool[np.ndarray, "sequences n_located"]
    covered: Bool[np.ndarray, "sequences n_located"]

    @property
    def base_rate(self) -> float:
        """Share of the test tokens that touch an event: the precision of random tokens."""
        return float(self.touched.mean())

    def test_auc(
        self,
        scores: Float[np.ndarray, " test_spans"],
        weights: Float[np.ndarray, "resamples recordings"],
    ) -> Float[np.ndarray, " resamples"]:
        """Return the AUC of a score of the test spans in each resample of their recordings."""
        return weighted_auc(scores, self.test.is_event, self.test.recording, weights)


@dataclass(frozen=True)
class EventScore:
    """How well features of one set separate one kind of events; on test patients unless said.

    Intervals are over recordings; features, probes and ties are those chosen on val.
    """

    # Events in the val and test spans; each has a span without an event, if there is room
    val_events: int
    test_events: int
    # The feature with the largest AUC on val
    feature: int
    auc: float
    auc_interval: Interval | None
    val_auc: float
    # Features whose AUC on val is inside the interval of the best: any of them could be `feature`
    n_ties: int
    ties: tuple[int, ...]  # the first MAX_TIES of them, by AUC on val
    # Smallest and largest test AUC among all of them
    ties_auc: tuple[float, float]
    # Share of the events found by `feature` at a precision of 90 % among the spans
    recall: float
    recall_interval: Interval | None
    # The five features with the largest AUC on val
    best_five: tuple[int, ...]
    # AUC of logistic regressions on the best two and the best five
    probe_2_auc: float
    probe_2_auc_interval: Interval | None
    probe_auc: float
    probe_auc_interval: Interval | None
    # AUC of a linear probe that was fitted on x, on x and on x̂
    x_probe_auc: float
    x_hat_probe_auc: float
    x_hat_probe_auc_interval: Interval | None
    # Drop of that AUC when the five most relevant features for this kind are ablated, and the mean
    # drop of the other kinds' probes; None with a single kind
    ablation_drop: float
    ablation_drop_interval: Interval | None
    ablation_drop_others: float | None
    ablation_drop_others_interval: Interval | None
    # AUC of `feature` over single tokens; None if all of them are covered, or none
    token_auc: float | None = None
    # Share of the test tokens that touch an event
    token_base_rate: float | None = None
    # Share of the strongest tokens of `feature` that touch an event, and number of these tokens
    precision: float | None = None
    precision_interval: Interval | None = None
    examples: int = 0
    # Features of the whole set whose strongest tokens nearly all touch an event of this kind
    pure_features: int = 0


class MeanIntervals(NamedTuple):
    """Intervals of means over kinds, all from the same resamples; see `EventSummary`."""

    auc: Interval | None
    recall: Interval | None
    probe_auc: Interval | None
    tpp: Interval | None
    probe_recovered: Interval | None


@dataclass(frozen=True)
class SpanMeasures:
    """Measures of one autoencoder on the spans of all kinds, in the order of the kinds."""

    scores: list[EventScore]
    # Of every feature
    val_auc: Float[np.ndarray, "kinds d_sae"]
    auc: Float[np.ndarray, "kinds d_sae"]
    recall: Float[np.ndarray, "kinds d_sae"]
    intervals: MeanIntervals


def make_kind(
    name: str,
    val: SpanActivations,
    test: SpanActivations,
    share: Float[np.ndarray, "sequences n_located"],
) -> EventKind:
    """Return a kind of events with its probe; share: see `event_share` of the test tokens."""
    x, is_event = _tokens(val)
    if len(x) > MAX_PROBE_TOKENS:
        some = np.random.default_rng(0).choice(len(x), MAX_PROBE_TOKENS, replace=False)
        x, is_event = x[some], is_event[some]
    probe = fit_probe(x.astype(np.float64), is_event)
    lengths = np.array([len(x) for x in test.activations])
    logits = probe(np.concatenate(test.activations))
    x_logits = max_over_spans(logits[:, None], lengths)[:, 0]
    return EventKind(name, val, test, probe, x_logits, share > 0, share >= 0.5)


def measure_spans(
    sae: SparseAutoencoder,
    kinds: Sequence[EventKind],
    val_weights: Float[np.ndarray, "resamples val_recordings"],
    test_weights: Float[np.ndarray, "resamples test_recordings"],
) -> SpanMeasures:
    """Score an autoencoder's features on all kinds of events; weights: see `draw_weights`."""
    # The first row is of the recordings as they are.
    weights = np.insert(test_weights, 0, 1, axis=0)
    probes = np.stack([kind.probe.weights for kind in kinds], axis=1).astype(np.float32)
    val = [encode_spans(sae, kind.val, probes, np.zeros(0, np.int32)) for kind in kinds]
    relevant = [_most_relevant(sae, kind.probe, one) for kind, one in zip(kinds, val, strict=True)]
    ablated = np.stack(relevant).astype(np.int32)
    test = [encode_spans(sae, kind.test, probes, ablated.reshape(-1)) for kind in kinds]
    drops = _ablation_drops(sae, kinds, test, ablated, probes, weights)
    scores = []
    columns: dict[str, list[np.ndarray]] = {"val_auc": [], "auc": [], "recall": []}
    resampled = []
    for i, kind in enumerate(kinds):
        val_auc = _by_columns(auc, val[i].maxima, kind.val.is_event)
        test_auc = _by_columns(auc, test[i].maxima, kind.test.is_event)
        recall = _by_columns(recall_at_precision, test[i].maxima, kind.test.is_event)
        for column, values in zip(columns.values(), (val_auc, test_auc, recall), strict=True):
            column.append(values)
        best = np.argsort(-val_auc, kind="stable")[:MOST]
        ties = _ties(val[i].maxima[:, best[0]], val_auc, kind.val, val_weights)
        of_best = test[i].maxima[:, best[0]]
        recalls = weighted_recall(of_best, kind.test.is_event, kind.test.recording, weights)
        of_kind = _Resampled(
            auc=kind.test_auc(of_best, weights),
            recall=recalls,
            probe_2=_sparse_probe(val[i].maxima, test[i].maxima, kind, best[:2], weights),
            probe_5=_sparse_probe(val[i].maxima, test[i].maxima, kind, best, weights),
            x_probe=kind.test_auc(kind.x_logits, weights),
            x_hat_probe=_probe_auc(test[i], test[i].logits[:, i], kind, weights),
            drop=drops[i, i],
            drop_others=_mean_without(drops[i], i),
        )
        resampled.append(of_kind)
        scores.append(_score(kind, of_kind, best, val_auc, test_auc, ties))
    return SpanMeasures(
        scores,
        val_auc=np.stack(columns["val_auc"]),
        auc=np.stack(columns["auc"]),
        recall=np.stack(columns["recall"]),
        intervals=_mean_intervals(resampled),
    )


class _Resampled(NamedTuple):
    """Measures of one kind: first on the recordings as they are, then on each resample."""

    auc: Float[np.ndarray, " n"]
    recall: Float[np.ndarray, " n"]
    probe_2: Float[np.ndarray, " n"]
    probe_5: Float[np.ndarray, " n"]
    x_probe: Float[np.ndarray, " n"]
    x_hat_probe: Float[np.ndarray, " n"]
    drop: Float[np.ndarray, " n"]
    # NaN with a single kind
    drop_others: Float[np.ndarray, " n"]


def _score(
    kind: EventKind,
    resampled: _Resampled,
    best: Int[np.ndarray, " 5"],
    val_auc: Float[np.ndarray, " d_sae"],
    test_auc: Float[np.ndarray, " d_sae"],
    ties: Int[np.ndarray, " ties"],
) -> EventScore:
    """Return the scores of a kind; those on single tokens are filled in later."""
    value = {name: float(values[0]) for name, values in resampled._asdict().items()}
    within = {name: interval(values[1:]) for name, values in resampled._asdict().items()}
    drop_others = value["drop_others"]
    return EventScore(
        val_events=int(kind.val.is_event.sum()),
        test_events=int(kind.test.is_event.sum()),
        feature=int(best[0]),
        auc=value["auc"],
        auc_interval=within["auc"],
        val_auc=float(val_auc[best[0]]),
        n_ties=len(ties),
        ties=tuple(ties[:MAX_TIES].tolist()),
        ties_auc=(float(test_auc[ties].min()), float(test_auc[ties].max())),
        recall=value["recall"],
        recall_interval=within["recall"],
        best_five=tuple(best.tolist()),
        probe_2_auc=value["probe_2"],
        probe_2_auc_interval=within["probe_2"],
        probe_auc=value["probe_5"],
        probe_auc_interval=within["probe_5"],
        x_probe_auc=value["x_probe"],
        x_hat_probe_auc=value["x_hat_probe"],
        x_hat_probe_auc_interval=within["x_hat_probe"],
        ablation_drop=value["drop"],
        ablation_drop_interval=within["drop"],
        ablation_drop_others=None if np.isnan(drop_others) else drop_others,
        ablation_drop_others_interval=within["drop_others"],
    )


def _mean_intervals(resampled: Sequence[_Resampled]) -> MeanIntervals:
    """Return the intervals of the means over kinds and of what is computed from them."""
    means = _Resampled(*(np.mean(measure, axis=0)[1:] for measure in zip(*resampled, strict=True)))
    x = means.x_probe - 0.5
    x_hat = means.x_hat_probe - 0.5
    recovered = np.divide(x_hat, x, out=np.full(len(x), np.nan), where=x > 0)
    return MeanIntervals(
        auc=interval(means.auc),
        recall=interval(means.recall),
        probe_auc=interval(means.probe_5),
        tpp=interval(means.drop - means.drop_others),
        probe_recovered=interval(recovered),
    )


def _mean_without(values: Float[np.ndarray, "kinds n"], i: int) -> Float[np.ndarray, " n"]:
    """Return the mean of the other rows than i; NaN if there are none."""
    others = np.delete(values, i, axis=0)
    return others.mean(axis=0) if len(others) else np.full(values.shape[1], np.nan)


def _tokens(
    spans: SpanActivations,
) -> tuple[Float[np.ndarray, "tokens d_model"], Bool[np.ndarray, " tokens"]]:
    """Return the tokens of all spans, and whether each is of an event."""
    lengths = [len(x) for x in spans.activations]
    return np.concatenate(spans.activations), np.repeat(spans.is_event, lengths)


def _by_columns(
    measure: Callable[[np.ndarray, np.ndarray], np.ndarray],
    scores: Float[np.ndarray, "spans d_sae"],
    is_event: Bool[np.ndarray, " spans"],
) -> Float[np.ndarray, " d_sae"]:
    """Return a measure of every column; in blocks, since it sorts them, which takes memory."""
    starts = range(0, scores.shape[1], COLUMN_BLOCK)
    return np.concatenate([measure(scores[:, i : i + COLUMN_BLOCK], is_event) for i in starts])


def _ties(
    best: Float[np.ndarray, " spans"],
    val_auc: Float[np.ndarray, " d_sae"],
    spans: SpanActivations,
    weights: Float[np.ndarray, "resamples recordings"],
) -> Int[np.ndarray, " ties"]:
    """Return the features whose AUC is inside the interval of the best, the best first."""
    of_best = interval(weighted_auc(best, spans.is_event, spans.recording, weights))
    lowest = val_auc.max() if of_best is None else min(of_best.low, val_auc.max())
    by_auc = np.argsort(-val_auc, kind="stable")
    return by_auc[: int((val_auc >= lowest).sum())]


def _sparse_probe(
    val: Float[np.ndarray, "val_spans d_sae"],
    test: Float[np.ndarray, "test_spans d_sae"],
    kind: EventKind,
    features: Int[np.ndarray, " k"],
    weights: Float[np.ndarray, "resamples recordings"],
) -> Float[np.ndarray, " resamples"]:
    """Return the test AUC of a probe on some features, fitted on val."""
    probe = fit_probe(val[:, features].astype(np.float64), kind.val.is_event)
    return kind.test_auc(probe(test[:, features]), weights)


def _probe_auc(
    spans: EncodedSpans,
    logits: Float[np.ndarray, " tokens"],
    kind: EventKind,
    weights: Float[np.ndarray, "resamples recordings"],
) -> Float[np.ndarray, " resamples"]:
    """Return the AUC of a span's largest logit."""
    return kind.test_auc(max_over_spans(logits[:, None], spans.lengths)[:, 0], weights)


def _most_relevant(
    sae: SparseAutoencoder, probe: LinearProbe, spans: EncodedSpans
) -> Int[np.ndarray, " 5"]:
    """Return the features whose ablation lowers the probe's logit most on events.

    That is by (mean on events - mean on others) · (decoder direction · probe), on val.
    """
    difference = spans.means[0] - spans.means[1]
    effect = difference * (sae.decoder_directions @ probe.weights)
    return np.argsort(-effect, kind="stable")[:MOST]


def _ablation_drops(
    sae: SparseAutoencoder,
    kinds: Sequence[EventKind],
    test: Sequence[EncodedSpans],
    ablated: Int[np.ndarray, "kinds 5"],
    probes: Float[np.ndarray, "d_model kinds"],
    weights: Float[np.ndarray, "resamples recordings"],
) -> Float[np.ndarray, "kinds kinds resamples"]:
    """Return the drop of each kind's probe AUC on x̂ (columns) by the ablation for each (rows)."""
    # The probe is linear: without feature i its logit is lower by f_i (W_dec,i · w).
    on_probes = sae.decoder_directions[ablated] @ probes
    drops = np.zeros((len(kinds), len(kinds), len(weights)))
    for j, (kind, spans) in enumerate(zip(kinds, test, strict=True)):
        logits = spans.logits[:, j]
        complete = _probe_auc(spans, logits, kind, weights)
        features = spans.some.reshape(len(logits), *ablated.shape)
        for i in range(len(kinds)):
            without = logits - features[:, i] @ on_probes[i, :, j]
            drops[i, j] = complete - _probe_auc(spans, without, kind, weights)
    return drops


def mean_over_kinds(scores: Mapping[str, EventScore], name: str) -> float:
    """Return the mean of a measure over all kinds that have it; NaN if none has."""
    values = [getattr(score, name) for score in scores.values()]
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if defined else float("nan")
