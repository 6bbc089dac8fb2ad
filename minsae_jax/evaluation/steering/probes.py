"""Linear probes for labelled events on the last layer's activations.

A span (an event, or a stretch without one) is read by the mean of the last layer's activations over
the tokens that it touches on its channels. A probe for a kind of event is a logistic regression on
these means, fitted on the val patients with untouched activations. On the test patients it then
reads steered activations, so that it is downstream of every layer that is steered.
"""

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_array

from minsae_jax.errors import join_some
from minsae_jax.evaluation.dataset import Dataset
from minsae_jax.evaluation.events import (
    WITHOUT_SPANS,
    LabelledEvent,
    draw_spans,
    sample,
    tokens_of,
)
from minsae_jax.evaluation.inputs import EvaluationInputs
from minsae_jax.evaluation.linear_probe import LinearProbe, fit_probe
from minsae_jax.evaluation.ranking import auc
from minsae_jax.evaluation.steering.edit import Place, SteeredEncoder

MAX_SPANS = 2000  # per kind


@dataclass(frozen=True)
class ProbeReading:
    """The scores of the probe for one kind of event on the test patients, at one scale."""

    kind: str
    # AUC over the spans of the kind
    auc: float
    # Share of the kind's events that the probe classifies as events
    positive_rate: float
    # Change of the logit, mean over the events of the kind, in SD of the untouched logits over all
    # of its spans
    change: float


@dataclass(frozen=True)
class Target:
    """The kind of event that the steered features detect best on the val patients."""

    kind: str
    # The best of the steered features
    feature: int
    # AUC of its largest activation within a span
    val_auc: float
    test_auc: float


@dataclass(frozen=True)
class LabelledSpans:
    """Spans of all kinds, and the tokens that they touch."""

    # Of every span
    kind: Int[np.ndarray, " spans"]
    is_event: Bool[np.ndarray, " spans"]
    # Windows that contain tokens of the spans, and the folder of their recordings
    folder: Path
    places: list[Place]
    # Of every token that a span touches, by window
    span: Int[np.ndarray, " touched"]
    place: Int[np.ndarray, " touched"]
    sequence: Int[np.ndarray, " touched"]
    token: Int[np.ndarray, " touched"]

    def has_both(self, kind: int) -> bool:
        """Whether there are spans of a kind with and without an event."""
        return len(np.unique(self.is_event[self.kind == kind])) == 2


class SpanValues(NamedTuple):
    """Values of spans at some scales."""

    # Last layer, mean over the span's tokens
    last: Float[np.ndarray, "spans variants d_model"]
    # Steered features at their layer, largest over the span's tokens
    strongest: Float[np.ndarray, "spans features"]


@dataclass(frozen=True)
class Probe:
    """The fitted probe for one kind of event."""

    kind: str
    # Which of the test spans are of this kind, and which of these are events
    of_kind: Bool[np.ndarray, " spans"]
    is_event: Bool[np.ndarray, " of_kind"]
    # From the last layer's means to logits
    logits: LinearProbe
    # AUC of each feature on the val patients, by its largest activation within a span
    val_aucs: dict[int, float]


@dataclass(frozen=True)
class Probes:
    """The probes for all kinds of event, and the spans of the test patients."""

    probes: tuple[Probe, ...]
    test: LabelledSpans


def make_probes(
    inputs: EvaluationInputs,
    steered: SteeredEncoder,
    features: Sequence[int],
    seed: int,
    expected: Collection[str] | None = None,
) -> Probes | None:
    """Fit the probes on the val patients; None without labelled events.

    features: those that will be steered. Kinds without spans of both classes on val and test are
    left out, with a warning if they are in `expected`, or if that is None.
    """
    events = inputs.events
    if inputs.val is None or events is None:
        return None
    val = _locate_spans(inputs.val, events.val, seed)
    test = _locate_spans(inputs.test, events.test, seed)
    no_scales = np.ones((0, len(features)))
    values = read_spans(steered, val, features, no_scales)
    probes = []
    left_out = []
    for number, kind in enumerate(sorted(events.test)):
        without = [
            split for split, spans in (("val", val), ("test", test)) if not spans.has_both(number)
        ]
        if without:
            if expected is None or kind in expected:
                left_out.append(f"{kind} ({' and '.join(without)})")
            continue
        of_kind = val.kind == number
        is_event = val.is_event[of_kind]
        means = values.last[of_kind, 0].astype(np.float64)
        aucs = auc(values.strongest[of_kind], is_event)
        in_test = test.kind == number
        probe = Probe(
            kind=kind,
            of_kind=in_test,
            is_event=test.is_event[in_test],
            logits=fit_probe(means, is_event),
            val_aucs=dict(zip(features, aucs.tolist(), strict=True)),
        )
        probes.append(probe)
    if left_out:
        warnings.warn(
            f"kinds of events without a probe: {join_some(left_out)}; {WITHOUT_SPANS}",
            stacklevel=2,
        )
    if not probes:
        return None
    return Probes(tuple(probes), test)


def _locate_spans(
    dataset: Dataset, events: Mapping[str, list[LabelledEvent]], seed: int
) -> LabelledSpans:
    """Draw spans of each kind, up to MAX_SPANS, and find their tokens."""
    kind_of_span: list[int] = []
    is_event: list[bool] = []
    touched = []
    for number, kind in enumerate(sorted(events)):
        spans = draw_spans(dataset, events[kind], seed)
        for span in sample(spans, MAX_SPANS, seed):
            sequences, tokens = tokens_of(dataset, span)
            if not len(sequences):
                continue
            span_number = np.full(len(tokens), len(kind_of_span))
            touched.append(np.stack([span_number, sequences, tokens]))
            kind_of_span.append(number)
            is_event.append(span.is_event)
    nothing = np.zeros((3, 0), np.int64)
    columns = np.concatenate([nothing, *touched], axis=1)
    span, sequence, token = columns.astype(np.int64)
    windows = np.stack([dataset.recording[sequence], dataset.window[sequence]])
    distinct, place = np.unique(windows, axis=1, return_inverse=True)
    places = []
    for recording, window in distinct.T.tolist():
        places.append(Place(dataset.recordings[recording], window))
    # A sequence is a channel of its window, or all of it.
    within_window = np.maximum(dataset.channel[sequence], 0)
    order = np.argsort(place, kind="stable")
    return LabelledSpans(
        kind=np.array(kind_of_span, np.int64),
        is_event=np.array(is_event, bool),
        folder=dataset.folder,
        places=places,
        span=span[order],
        place=place[order],
        sequence=within_window[order].astype(np.int64),
        token=token[order],
    )


def read_spans(
    steered: SteeredEncoder,
    spans: LabelledSpans,
    features: Sequence[int],
    scales: Float[np.ndarray, "variants features"],
) -> SpanValues:
    """Run all windows of the spans; the variants are scale 1 everywhere, then `scales`."""
    n_spans = len(spans.kind)
    n_variants = 1 + len(scales)
    last = np.zeros((n_spans, n_variants, steered.sae.d_model), np.float32)
    n_tokens = np.bincount(spans.span, minlength=n_spans)
    weight = 1 / n_tokens.astype(np.float32)
    strongest = np.zeros((n_spans, len(features)), np.float32)
    for windows in steered.run(spans.places, features, scales, spans.folder):
        stop = windows.start + len(windows.hidden)
        first, end = np.searchsorted(spans.place, [windows.start, stop])
        rows = slice(first, end)
        span = spans.span[rows]
        place = spans.place[rows] - windows.start
        sequence = spans.sequence[rows]
        token = spans.token[rows]
        values = steered.sae.encode_features(windows.hidden, features)
        np.maximum.at(strongest, span, values[place, sequence, token])
        # A matrix of means: a row for each span, a column for each touched token of these windows.
        present, row = np.unique(span, return_inverse=True)
        cells = (row, np.arange(len(span)))
        means = csr_array((weight[span], cells), shape=(len(present), len(span)))
        for variant in range(n_variants):
            z = windows.last[place, variant, sequence, token]
            last[present, variant] += means @ z
    return SpanValues(last, strongest)


def find_target(
    probes: Probes,
    features: Sequence[int],
    values: SpanValues,
    choice: tuple[str, int] | None = None,
) -> Target:
    """Return the kind and the feature with the largest AUC on the val patients.

    values: of the test spans and these features. choice: the kind and the feature, if they are
    chosen already.
    """
    val_aucs = {}
    for probe in probes.probes:
        for feature in features:
            val_aucs[probe.kind, feature] = probe.val_aucs[feature]
    kind, feature = choice or max(val_aucs, key=val_aucs.__getitem__)
    probe = next(probe for probe in probes.probes if probe.kind == kind)
    strongest = values.strongest[probe.of_kind, features.index(feature)]
    (test_auc,) = auc(strongest[:, None], probe.is_event)
    return Target(kind, feature, val_aucs[kind, feature], float(test_auc))


def read_probes(probes: Probes, values: SpanValues) -> list[tuple[ProbeReading, ...]]:
    """Return the readings of all probes for each variant: scale 1 first, then the scales."""
    n_variants = values.last.shape[1]
    readings: list[list[ProbeReading]] = [[] for _ in range(n_variants)]
    for probe in probes.probes:
        is_event = probe.is_event
        logits = _logits(probe, values.last[probe.of_kind])
        untouched = logits[:, :1]
        changes = (logits - untouched)[is_event] / untouched.std()
        mean_changes = changes.mean(axis=0)
        aucs = auc(logits, is_event)
        positive_rates = (logits[is_event] > 0).mean(axis=0)
        for variant in range(n_variants):
            reading = ProbeReading(
                kind=probe.kind,
                auc=float(aucs[variant]),
                positive_rate=float(positive_rates[variant]),
                change=float(mean_changes[variant]),
            )
            readings[variant].append(reading)
    return [tuple(of_variant) for of_variant in readings]


def _logits(
    probe: Probe, last: Float[np.ndarray, "spans variants d_model"]
) -> Float[np.ndarray, "spans variants"]:
    # One variant at a time: equal inputs then have equal logits to the bit.
    variants = last.swapaxes(0, 1).astype(np.float64)
    return np.stack([probe.logits(x) for x in variants], axis=1)
