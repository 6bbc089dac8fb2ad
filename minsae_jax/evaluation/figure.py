"""evaluation.png: every measure over L0, with PCA and the recommended member."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from minsae_jax.evaluation.bootstrap import Interval
from minsae_jax.files import atomic_write
from minsae_jax.sae.figures import KIND_COLOURS, PCA, make_figure, tidy

if TYPE_CHECKING:  # matplotlib takes half a second to import; results.py imports this module
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

    from minsae_jax.evaluation.results import Evaluation, MemberEvaluation, PCAEvaluation

RAW_COLOUR = "#b0413e"
UNKNOWN_COLOUR = "#222222"


class Value(NamedTuple):
    """A measure, with its 95 % interval if it has one."""

    value: float
    interval: Interval | None = None


class Point(NamedTuple):
    """One member, or one PCA, in one panel."""

    kind: str
    l0: float
    value: float
    interval: Interval | None
    is_recommended: bool


class Panel(NamedTuple):
    """One measure; read returns None if it was not measured."""

    title: str
    read: "Callable[[MemberEvaluation | PCAEvaluation], Value | None]"
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
        read = panel.read(member)
        if read is not None and np.isfinite([read.value, member.tokens.l0]).all():
            kind = str(member.hyper.get("kind", "relu"))
            is_recommended = member.member == evaluation.recommended
            points.append(Point(kind, member.tokens.l0, *read, is_recommended))
    for pca in evaluation.pca:
        read = panel.read(pca)
        if read is not None and np.isfinite(read.value):
            points.append(Point(PCA, float(pca.k), *read, False))
    return sorted(points, key=lambda point: point.l0)


def _draw_panel(axes: "Axes", panel: Panel, points: Sequence[Point]) -> None:
    for kind in dict.fromkeys(point.kind for point in points):
        of_kind = [point for point in points if point.kind == kind]
        x = [point.l0 for point in of_kind]
        y = [point.value for point in of_kind]
        bars = np.array([_bar(point) for point in of_kind]).T
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
                [point.l0], [point.value], "o", markersize=13, markerfacecolor="none",
                color=UNKNOWN_COLOUR, markeredgewidth=1.6, label="recommended",
            )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    if panel.is_log:
        axes.set_yscale("log")
    axes.set_title(panel.title, fontsize=10, loc="left")
    axes.set_xlabel("L0: active features per token", fontsize=9)
    tidy(axes)


def _bar(point: Point) -> tuple[float, float]:
    """Return the lengths of the error bar below and above a point."""
    if point.interval is None:
        return (0.0, 0.0)
    low, high = point.interval
    return (max(point.value - low, 0.0), max(high - point.value, 0.0))


def _draw_baselines(axes: "Axes", panel: Panel, evaluation: "Evaluation") -> None:
    """Draw the mean over kinds of events of raw dimensions and of all principal components."""
    raw = evaluation.raw_events
    pca = evaluation.pca_events
    if panel.title != AUC_TITLE or raw is None or pca is None:
        return
    axes.axhline(raw.summary.auc, color=RAW_COLOUR, linestyle=":", label="best raw dimension")
    axes.axhline(
        pca.summary.auc, color=KIND_COLOURS[PCA], linestyle=":", label="best principal component"
    )


def _loss(evaluated: "MemberEvaluation | PCAEvaluation") -> Value | None:
    loss = evaluated.loss
    return None if loss is None else Value(loss.loss_recovered, loss.interval)


def _mean_over_events(
    name: str,
) -> "Callable[[MemberEvaluation | PCAEvaluation], Value | None]":
    """Return a function that reads a field of the event summary, with its interval."""

    def read(evaluated: "MemberEvaluation | PCAEvaluation") -> Value | None:
        events = evaluated.event_evaluation
        if events is None:
            return None
        interval = getattr(events.summary, f"{name}_interval", None)
        return Value(getattr(events.summary, name), interval)

    return read


AUC_TITLE = "AUC of the best feature, mean over events"
PANELS = (
    Panel("variance unexplained (FVU)", lambda e: Value(e.fvu), is_log=True),
    Panel("description, bits per token", lambda e: Value(e.description_bits), is_log=True),
    Panel("loss recovered", _loss),
    Panel(AUC_TITLE, _mean_over_events("auc")),
    Panel("precision of its strongest tokens", _mean_over_events("precision")),
    Panel("targeted probe perturbation", _mean_over_events("tpp")),
)
