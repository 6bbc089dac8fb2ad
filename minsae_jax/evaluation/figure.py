"""evaluation.png: every measure over L0, with PCA and the recommended member."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from minsae_jax.estimates import Estimate
from minsae_jax.files import atomic_write
from minsae_jax.sae.figures import KIND_COLOURS, PCA, make_figure, plain_log_ticks, tidy

if TYPE_CHECKING:  # matplotlib takes half a second to import; results.py imports this module
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

    from minsae_jax.evaluation.event_results import EventSummary
    from minsae_jax.evaluation.results import Evaluation, MemberEvaluation, PCAEvaluation

RAW_COLOUR = "#b0413e"
UNKNOWN_COLOUR = "#222222"


class Point(NamedTuple):
    """One member, or one PCA, in one panel."""

    kind: str
    l0: float
    measure: Estimate
    is_recommended: bool


class Panel(NamedTuple):
    """One measure; read returns None if it was not measured."""

    title: str
    read: "Callable[[MemberEvaluation | PCAEvaluation], Estimate | None]"
    # Whether the axis is logarithmic
    is_log: bool = False


def draw_evaluation(path: Path, evaluation: "Evaluation") -> None:
    """Write a PNG with a panel for each measure that the evaluation has.

    Bars are 95 % intervals, horizontal lines the baselines that have no L0, and the ring is the
    recommended member.
    """
    panels = []
    for panel in PANELS:
        points = _points(panel, evaluation)
        if any(point.kind != PCA for point in points):
            panels.append((panel, points))
    n_columns = min(len(panels), 3)
    n_rows = -(-len(panels) // n_columns)
    figure = make_figure(4.4 * n_columns, 3.6 * n_rows + 0.6)
    grid = figure.subplots(n_rows, n_columns, squeeze=False).ravel()
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    for axes, (panel, points) in zip(grid, panels, strict=False):
        _draw_panel(axes, panel, points)
        _draw_baselines(axes, panel, evaluation)
    handles: dict[str, Artist] = {}
    for axes in grid[: len(panels)]:
        artists, labels = axes.get_legend_handles_labels()
        handles |= dict(zip(labels, artists, strict=True))
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=len(handles),
        frameon=False,
    )  # fmt: skip
    run = evaluation.inputs.run.resolve().name
    title = f"{run} on test patients; recommended: {evaluation.recommended}"
    figure.suptitle(title, x=0.01, ha="left", parse_math=False)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _points(panel: Panel, evaluation: "Evaluation") -> list[Point]:
    """Return the members and PCAs that have the measure, by increasing L0."""
    points = []
    for member in evaluation.members:
        measure = panel.read(member)
        if measure is not None and np.isfinite([measure.value, member.tokens.l0]).all():
            kind = str(member.hyper.get("kind", "relu"))
            is_recommended = member.member == evaluation.recommended
            points.append(Point(kind, member.tokens.l0, measure, is_recommended))
    for pca in evaluation.pca:
        measure = panel.read(pca)
        if measure is not None and np.isfinite(measure.value):
            points.append(Point(PCA, float(pca.k), measure, False))
    return sorted(points, key=lambda point: point.l0)


def _draw_panel(axes: "Axes", panel: Panel, points: Sequence[Point]) -> None:
    for kind in dict.fromkeys(point.kind for point in points):
        of_kind = [point for point in points if point.kind == kind]
        x = [point.l0 for point in of_kind]
        y = [point.measure.value for point in of_kind]
        bars = np.array([_bar(point.measure) for point in of_kind]).T
        colour = KIND_COLOURS.get(kind, UNKNOWN_COLOUR)
        is_pca = kind == PCA
        axes.errorbar(
            x, y, bars,
            fmt="x--" if is_pca else "o", color=colour, label="PCA" if is_pca else kind,
            markersize=5, linewidth=1, elinewidth=0.8, capsize=1.5, alpha=0.85,
        )  # fmt: skip
    for point in points:
        if point.is_recommended:
            axes.plot(
                [point.l0], [point.measure.value], "o", markersize=13, markerfacecolor="none",
                color=UNKNOWN_COLOUR, markeredgewidth=1.6, label="recommended",
            )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    if panel.is_log:
        axes.set_yscale("log")
        plain_log_ticks(axes.yaxis)
    axes.set_title(panel.title, fontsize=10, loc="left")
    axes.set_xlabel("L0: active features per token", fontsize=9)
    tidy(axes)


def _bar(measure: Estimate) -> tuple[float, float]:
    """Return the lengths of the error bar below and above a point."""
    if measure.interval is None:
        return (0.0, 0.0)
    low, high = measure.interval
    return (max(measure.value - low, 0.0), max(high - measure.value, 0.0))


def _draw_baselines(axes: "Axes", panel: Panel, evaluation: "Evaluation") -> None:
    """Draw the mean over kinds of events of raw dimensions and of all principal components."""
    raw = evaluation.raw_events
    pca = evaluation.pca_events
    if panel.title != AUC_TITLE or raw is None or pca is None:
        return
    for events, colour, label in (
        (raw, RAW_COLOUR, "best raw dimension"),
        (pca, KIND_COLOURS[PCA], "best principal component"),
    ):
        axes.axhline(events.summary.auc.value, color=colour, linestyle=":", label=label)


def _loss(evaluated: "MemberEvaluation | PCAEvaluation") -> Estimate | None:
    return None if evaluated.loss is None else evaluated.loss.loss_recovered


def _mean_over_events(
    read: "Callable[[EventSummary], Estimate]",
) -> "Callable[[MemberEvaluation | PCAEvaluation], Estimate | None]":
    """Return a function that reads a measure from the event summary, if there is one."""

    def read_evaluated(evaluated: "MemberEvaluation | PCAEvaluation") -> Estimate | None:
        events = evaluated.event_summary
        return None if events is None else read(events)

    return read_evaluated


AUC_TITLE = "AUC of the best feature, mean over events"
PANELS = (
    Panel("variance unexplained (FVU)", lambda e: Estimate(e.fvu), is_log=True),
    Panel("description, bits per token", lambda e: Estimate(e.description_bits), is_log=True),
    Panel("loss recovered", _loss),
    Panel(AUC_TITLE, _mean_over_events(lambda e: e.auc)),
    Panel("precision of its strongest tokens", _mean_over_events(lambda e: Estimate(e.precision))),
    Panel("targeted probe perturbation", _mean_over_events(lambda e: e.tpp)),
)
