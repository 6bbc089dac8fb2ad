"""How an autoencoder's features, alone and together, separate labelled events.

Features, probes and ties are chosen on the val patients and measured on the test patients;
docs/evaluate.md has the definitions and their sources. Raw dimensions and principal components are
scored by the same functions: they are autoencoders whose features are the positive and the negative
parts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from minsae_jax.evaluation.bootstrap import (
    Interval,
    interval,
    rank,
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
    span_groups,
)
from minsae_jax.sae.kinds import Params, SAEKind
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
    # AUC of the probe on x, on the test spans
    x_probe_auc: float
    # Which test tokens touch an event on their channel, and which are in one for half of it
    touched: Bool[np.ndarray, "sequences n_located"]
    covered: Bool[np.ndarray, "sequences n_located"]

    @property
    def base_rate(self) -> float:
        """Share of the test tokens that touch an event: the precision of random tokens."""
        return float(self.touched.mean())


@dataclass(frozen=True)
class EventScore:
    """How well features of one set separate one kind of events; on test patients unless said."""

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
    probe_auc: float
    # AUC of a linear probe that was fitted on x, on x and on x̂
    x_probe_auc: float
    x_hat_probe_auc: float
    # Drop of that AUC when the five most relevant features for this kind are ablated, and the mean
    # drop of the other kinds' probes; None with a single kind
    ablation_drop: float
    ablation_drop_others: float | None
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


@dataclass(frozen=True)
class SpanMeasures:
    """Measures of one autoencoder on the spans of all kinds, in the order of the kinds."""

    scores: list[EventScore]
    # Of every feature
    val_auc: Float[np.ndarray, "kinds d_sae"]
    auc: Float[np.ndarray, "kinds d_sae"]
    recall: Float[np.ndarray, "kinds d_sae"]
    # Intervals of the means over kinds, all from the same resamples
    mean_auc_interval: Interval | None
    mean_recall_interval: Interval | None


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
    scores = max_over_spans(logits[:, None], lengths)
    x_probe_auc = float(auc(scores, test.is_event)[0])
    return EventKind(name, val, test, probe, x_probe_auc, share > 0, share >= 0.5)


def measure_spans(
    sae: SparseAutoencoder,
    kinds: Sequence[EventKind],
    val_weights: Float[np.ndarray, "resamples val_recordings"],
    test_weights: Float[np.ndarray, "resamples test_recordings"],
) -> SpanMeasures:
    """Score an autoencoder's features on all kinds of events; weights: see `draw_weights`."""
    probes = np.stack([kind.probe.weights for kind in kinds], axis=1).astype(np.float32)
    val = [_encode_spans(sae, kind.val, probes, np.zeros(0, np.int32)) for kind in kinds]
    relevant = [_most_relevant(sae, kind.probe, one) for kind, one in zip(kinds, val, strict=True)]
    ablated = np.stack(relevant).astype(np.int32)
    test = [_encode_spans(sae, kind.test, probes, ablated.reshape(-1)) for kind in kinds]
    drops = _ablation_drops(sae, kinds, test, ablated, probes)
    scores = []
    columns: dict[str, list[np.ndarray]] = {"val_auc": [], "auc": [], "recall": []}
    replicates = []
    for i, kind in enumerate(kinds):
        val_auc = _by_columns(auc, val[i].maxima, kind.val.is_event)
        test_auc = _by_columns(auc, test[i].maxima, kind.test.is_event)
        recall = _by_columns(recall_at_precision, test[i].maxima, kind.test.is_event)
        for column, values in zip(columns.values(), (val_auc, test_auc, recall), strict=True):
            column.append(values)
        best = np.argsort(-val_auc, kind="stable")[:MOST]
        ranked = rank(
            test[i].maxima[:, best[0]],
            kind.test.is_event,
            test_weights[:, kind.test.recording],
        )
        of_kind = (weighted_auc(ranked), weighted_recall(ranked))
        replicates.append(of_kind)
        ties = _ties(val[i].maxima[:, best[0]], val_auc, kind.val, val_weights)
        others = np.delete(drops[i], i)
        score = EventScore(
            val_events=int(kind.val.is_event.sum()),
            test_events=int(kind.test.is_event.sum()),
            feature=int(best[0]),
            auc=float(test_auc[best[0]]),
            auc_interval=interval(of_kind[0]),
            val_auc=float(val_auc[best[0]]),
            n_ties=len(ties),
            ties=tuple(ties[:MAX_TIES].tolist()),
            ties_auc=(float(test_auc[ties].min()), float(test_auc[ties].max())),
            recall=float(recall[best[0]]),
            recall_interval=interval(of_kind[1]),
            best_five=tuple(best.tolist()),
            probe_2_auc=_sparse_probe(val[i].maxima, test[i].maxima, kind, best[:2]),
            probe_auc=_sparse_probe(val[i].maxima, test[i].maxima, kind, best),
            x_probe_auc=kind.x_probe_auc,
            x_hat_probe_auc=_probe_auc(test[i], test[i].logits[:, i], kind),
            ablation_drop=float(drops[i, i]),
            ablation_drop_others=float(others.mean()) if len(others) else None,
        )
        scores.append(score)
    mean_auc, mean_recall = np.mean(replicates, axis=0)
    return SpanMeasures(
        scores,
        val_auc=np.stack(columns["val_auc"]),
        auc=np.stack(columns["auc"]),
        recall=np.stack(columns["recall"]),
        mean_auc_interval=interval(mean_auc),
        mean_recall_interval=interval(mean_recall),
    )


class _EncodedSpans(NamedTuple):
    """The features of one autoencoder on the spans of one kind."""

    # Largest activation of each feature over the tokens of each span
    maxima: Float[np.ndarray, "spans d_sae"]
    # Tokens of each span
    lengths: Int[np.ndarray, " spans"]
    # Mean activations over the tokens of events, and of other spans
    means: Float[np.ndarray, "2 d_sae"]
    # Of every kind's probe on x̂, without bias
    logits: Float[np.ndarray, "tokens kinds"]
    some: Float[np.ndarray, "tokens chosen"]


def _encode_spans(
    sae: SparseAutoencoder,
    spans: SpanActivations,
    probes: Float[np.ndarray, "d_model kinds"],
    chosen: Int[np.ndarray, " chosen"],
) -> _EncodedSpans:
    lengths = np.array([len(x) for x in spans.activations])
    maxima = []
    logits = []
    some = []
    sums = np.zeros((2, sae.d_sae))
    for group in span_groups(spans.activations):
        x = np.concatenate([spans.activations[i] for i in group])
        side = np.repeat(spans.is_event[group], lengths[group])
        # Padded to a power of two, so that groups share few compiled programs.
        n_padded = 1 << max(len(x) - 1, 0).bit_length()
        padded = np.zeros((n_padded, sae.d_model), np.float32)
        padded[: len(x)] = x
        sides = np.zeros((2, n_padded), np.float32)
        sides[0, : len(x)] = side
        sides[1, : len(x)] = ~side
        with jax.default_matmul_precision("highest"):
            encoded = _encode(sae.kind, sae.params, padded, sides, probes, chosen)
        features, side_sums, group_logits, group_some = map(np.asarray, encoded)
        maxima.append(max_over_spans(features[: len(x)], lengths[group]))
        logits.append(group_logits[: len(x)])
        some.append(group_some[: len(x)])
        sums += side_sums
    is_event = np.repeat(spans.is_event, lengths)
    counts = np.array([is_event.sum(), (~is_event).sum()])
    return _EncodedSpans(
        np.concatenate(maxima),
        lengths,
        sums / counts[:, None],
        np.concatenate(logits),
        np.concatenate(some),
    )


@partial(jax.jit, static_argnums=0)
def _encode(
    kind: SAEKind,
    params: Params,
    x: Float[Array, "tokens d_model"],
    sides: Float[Array, "2 tokens"],
    probes: Float[Array, "d_model kinds"],
    chosen: Int[Array, " chosen"],
) -> tuple[Array, Array, Array, Array]:
    """Return features, their sums over each side, the probes on x̂, and the chosen features."""
    features = kind.encode(params, x)
    logits = kind.decode(params, features) @ probes
    return features, sides @ features, logits, features[:, chosen]


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
    ranked = rank(best, spans.is_event, weights[:, spans.recording])
    of_best = interval(weighted_auc(ranked))
    lowest = val_auc.max() if of_best is None else min(of_best.low, val_auc.max())
    by_auc = np.argsort(-val_auc, kind="stable")
    return by_auc[: int((val_auc >= lowest).sum())]


def _sparse_probe(
    val: Float[np.ndarray, "val_spans d_sae"],
    test: Float[np.ndarray, "test_spans d_sae"],
    kind: EventKind,
    features: Int[np.ndarray, " k"],
) -> float:
    """Return the test AUC of a probe on some features, fitted on val."""
    probe = fit_probe(val[:, features].astype(np.float64), kind.val.is_event)
    return float(auc(probe(test[:, features])[:, None], kind.test.is_event)[0])


def _probe_auc(
    spans: _EncodedSpans, logits: Float[np.ndarray, " tokens"], kind: EventKind
) -> float:
    """Return the AUC of a span's largest logit."""
    return float(auc(max_over_spans(logits[:, None], spans.lengths), kind.test.is_event)[0])


def _most_relevant(
    sae: SparseAutoencoder, probe: LinearProbe, spans: _EncodedSpans
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
    test: Sequence[_EncodedSpans],
    ablated: Int[np.ndarray, "kinds 5"],
    probes: Float[np.ndarray, "d_model kinds"],
) -> Float[np.ndarray, "kinds kinds"]:
    """Return the drop of each kind's probe AUC on x̂ (columns) by the ablation for each (rows)."""
    # The probe is linear: without feature i its logit is lower by f_i (W_dec,i · w).
    on_probes = sae.decoder_directions[ablated] @ probes
    drops = np.zeros((len(kinds), len(kinds)))
    for j, (kind, spans) in enumerate(zip(kinds, test, strict=True)):
        logits = spans.logits[:, j]
        complete = _probe_auc(spans, logits, kind)
        features = spans.some.reshape(len(logits), *ablated.shape)
        for i in range(len(kinds)):
            without = logits - features[:, i] @ on_probes[i, :, j]
            drops[i, j] = complete - _probe_auc(spans, without, kind)
    return drops


def mean_over_kinds(scores: Mapping[str, EventScore], name: str) -> float:
    """Return the mean of a measure over all kinds that have it; NaN if none has."""
    values = [getattr(score, name) for score in scores.values()]
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if defined else float("nan")
