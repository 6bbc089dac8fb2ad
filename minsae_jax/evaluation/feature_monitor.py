"""Measures of features during training: detection of events, and stability between seeds.

`train` calls a `FeatureMonitor` whenever it measures the members on held-out tokens, and writes the
results to TensorBoard. The best feature for a kind of events is chosen and scored on the same val
patients, so that scores are a little too high; `evaluate` scores it on the test patients.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from minsae_jax.eeg.events import EVENTS
from minsae_jax.errors import UserError
from minsae_jax.evaluation.dataset import Dataset
from minsae_jax.evaluation.events import (
    Span,
    SpanActivations,
    draw_spans,
    gather,
    read_events,
    sample,
    span_maxima,
)
from minsae_jax.evaluation.members import Member
from minsae_jax.evaluation.ranking import auc
from minsae_jax.evaluation.stability import seed_stability
from minsae_jax.sae.member import SparseAutoencoder
from minsae_jax.sae.snapshot import FeatureMeasures, Image, Snapshot

MAX_SPANS = 400  # of each kind of events
EXAMPLES = 5  # strongest spans in the picture of a feature
MARGIN = 0.75  # seconds shown before and after a span


class BestFeature(NamedTuple):
    """The feature of a member that separates one kind of events best."""

    feature: int
    auc: float
    # Share of events among as many of its strongest spans as there are events
    precision: float
    # Spans by decreasing activation
    strongest: Int[np.ndarray, " spans"]


class FeatureMonitor:
    """Scores and pictures of features on the events of the val patients."""

    def __init__(self, val: Dataset | None):
        """Read the events of the dataset's recordings. Without one only stability is measured.

        Raises UserError if events.csv is invalid.
        """
        self.val = val
        self.kinds: dict[str, SpanActivations] = {}
        if val is None:
            return
        if not (val.folder / EVENTS).exists():
            raise UserError(f"--events_path {val.folder} has no {EVENTS}")
        for kind, events in sorted(read_events(val.folder).items()):
            drawn = draw_spans(val, events, seed=0)
            spans = gather(val, sample(drawn, MAX_SPANS, seed=0))
            if spans.has_both:
                self.kinds[kind] = spans

    def __call__(self, snapshots: Sequence[Snapshot]) -> FeatureMeasures:
        """Measure the members; the picture is of the one with the largest mean AUC."""
        metrics: dict[str, dict[str, float]] = {}
        best: dict[str, dict[str, BestFeature]] = {}
        for snapshot in snapshots:
            best_by_kind = {
                kind: best_feature(snapshot.sae, spans) for kind, spans in self.kinds.items()
            }
            best[snapshot.name] = best_by_kind
            metrics[snapshot.name] = _event_metrics(best_by_kind)
        members = [Member(snapshot.name, snapshot.sae) for snapshot in snapshots]
        is_live = {snapshot.name: snapshot.is_live for snapshot in snapshots}
        for name, stability in seed_stability(members, is_live).items():
            metrics[name]["stability"] = stability.share()
        images = {}
        if self.val is not None and self.kinds:
            shown = max(best, key=lambda name: metrics[name]["mean_auc"])
            images["strongest_spans"] = self._draw(self.val, shown, best[shown])
        return FeatureMeasures(metrics, images)

    def _draw(self, val: Dataset, member: str, best: Mapping[str, BestFeature]) -> Image:
        """Draw the strongest spans of the best feature for each kind of events."""
        figure = Figure(figsize=(2.4 * EXAMPLES, 1.3 * len(best) + 0.5), layout="constrained")
        figure.suptitle(
            f"{member}: strongest spans of the best feature for each kind of event. Red: an event "
            "of this kind, grey: none.",
            x=0.01,
            ha="left",
            fontsize=10,
            parse_math=False,
        )
        rows = figure.subplots(len(best), EXAMPLES, squeeze=False)
        for axes, (kind, one) in zip(rows, best.items(), strict=True):
            axes[0].set_title(
                f"{kind}: feature {one.feature}, AUC {one.auc:.2f}",
                loc="left",
                fontsize=9,
                parse_math=False,
            )
            for axis in axes:
                axis.set_axis_off()
            for axis, i in zip(axes, one.strongest, strict=False):
                _draw_span(axis, val, self.kinds[kind].spans[i])
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def best_feature(sae: SparseAutoencoder, spans: SpanActivations) -> BestFeature:
    """Return the feature with the largest AUC for events against spans without one."""
    scores = span_maxima(sae, spans)
    aucs = auc(scores, spans.is_event)
    feature = int(np.argmax(aucs))
    order = np.argsort(-scores[:, feature], kind="stable")
    n_events = int(spans.is_event.sum())
    precision = float(spans.is_event[order[:n_events]].mean())
    return BestFeature(feature, float(aucs[feature]), precision, order[:EXAMPLES])


def _event_metrics(best: Mapping[str, BestFeature]) -> dict[str, float]:
    metrics = {}
    for kind, one in best.items():
        metrics[f"{kind}_auc"] = one.auc
        metrics[f"{kind}_precision"] = one.precision
    if best:
        metrics["mean_auc"] = float(np.mean([one.auc for one in best.values()]))
        metrics["mean_precision"] = float(np.mean([one.precision for one in best.values()]))
    return metrics


def _draw_span(axes: Axes, val: Dataset, span: Span) -> None:
    """Draw the EEG of a span's first channel, and where the span is."""
    margin = round(MARGIN * val.sampling_rate)
    first = max(span.start - margin, 0)
    eeg = val.eeg_between(span.recording, first, span.stop + margin)
    seconds = (first + np.arange(len(eeg))) / val.sampling_rate
    axes.plot(seconds, eeg[:, span.channels[0]], color="black", linewidth=0.6)
    colour = "tab:red" if span.is_event else "tab:grey"
    axes.axvspan(
        span.start / val.sampling_rate, span.stop / val.sampling_rate, color=colour, alpha=0.2
    )
