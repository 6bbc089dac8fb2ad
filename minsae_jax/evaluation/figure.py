"""evaluation.png: every measure over L0, with PCA and the recommended member."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from minsae_jax.estimates import Estimate
from minsae_jax.evaluation.control import RANDOM
from minsae_jax.evaluation.pca import COMPONENTS, RAW
from minsae_jax.evaluation.results import Evaluation, MemberEvaluation, PCAEvaluation
from minsae_jax.files import atomic_write
from minsae_jax.sae.figures import KIND_COLOURS, PCA, make_figure, plain_log_ticks, tidy

if TYPE_CHECKING:  # matplotlib takes half a second to import
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

RAW_COLOUR = "#b0413e"
UNKNOWN_COLOUR = "#222222"
FVU_TITLE = "variance unexplained (FVU)"
BITS_TITLE = "description, bits per token"
AUC_TITLE = "AUC of the best feature, mean over events"


class Point(NamedTuple):
    """One member, or one PCA, in one panel."""

    kind: str
    l0: float
    measure: Estimate
    is_recommended: bool


def draw_evaluation(path: Path, evaluation: Evaluation) -> None:
    """Write a PNG with a panel for each measure that the evaluation has.

    Bars are 95 % intervals, horizontal lines the baselines that have no L0, and the ring is the
    recommended member.
    """
    panels = _panels(evaluation)
    n_columns = min(len(panels), 3)
    n_rows = -(-len(panels) // n_columns)
    figure = make_figure(4.4 * n_columns, 3.6 * n_rows + 0.6)
    grid = figure.subplots(n_rows, n_columns, squeeze=False).ravel()
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    handles: dict[str, Artist] = {}
    for axes, (title, points) in zip(grid, panels.items(), strict=False):
        _draw_panel(axes, title, points)
        if title == AUC_TITLE:
            _draw_baselines(axes, evaluation)
        artists, labels = axes.get_legend_handles_labels()
        handles |= dict(zip(labels, artists, strict=True))
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center",
        ncols=min(len(handles), 2 * n_columns), frameon=False,
    )  # fmt: skip
    title = f"{evaluation.inputs.name} on test patients; recommended: {evaluation.recommended}"
    figure.suptitle(title, x=0.01, ha="left", parse_math=False)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _panels(evaluation: Evaluation) -> dict[str, list[Point]]:
    """Return the points, by increasing L0, of each measure that a member has, by its title."""
    panels: dict[str, list[Point]] = {}
    for member in evaluation.members:
        kind = str(member.hyper.get("kind", "relu"))
        l0 = member.tokens.l0
        is_recommended = member.member == evaluation.recommended
        for title, measure in _measures(member).items():
            points = panels.setdefault(title, [])
            if np.isfinite([measure.value, l0]).all():
                points.append(Point(kind, l0, measure, is_recommended))
    panels = {title: points for title, points in panels.items() if points}
    for pca in evaluation.pca:
        for title, measure in _measures(pca).items():
            if title in panels and np.isfinite(measure.value):
                panels[title].append(Point(PCA, float(pca.k), measure, False))
    for points in panels.values():
        points.sort(key=lambda point: point.l0)
    return panels


def _measures(evaluated: MemberEvaluation | PCAEvaluation) -> dict[str, Estimate]:
    """Return the measures by the title of their panel."""
    measures = {
        FVU_TITLE: Estimate(evaluated.fvu),
        BITS_TITLE: Estimate(evaluated.description_bits),
    }
    if evaluated.loss is not None:
        measures["loss recovered"] = evaluated.loss.loss_recovered
    events = evaluated.event_summary
    if events is not None:
        measures[AUC_TITLE] = events.auc
        measures["precision of its strongest tokens"] = Estimate(events.precision)
        measures["targeted probe perturbation"] = events.tpp
    return measures


def _draw_panel(axes: "Axes", title: str, points: Sequence[Point]) -> None:
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
    if title in (FVU_TITLE, BITS_TITLE):
        axes.set_yscale("log")
        plain_log_ticks(axes.yaxis)
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel("L0: active features per token", fontsize=9)
    tidy(axes)


def _bar(measure: Estimate) -> tuple[float, float]:
    """Return the lengths of the error bar below and above a point."""
    if measure.interval is None:
        return (0.0, 0.0)
    low, high = measure.interval
    return (max(measure.value - low, 0.0), max(high - measure.value, 0.0))


def _draw_baselines(axes: "Axes", evaluation: Evaluation) -> None:
    """Draw the mean over kinds of events of all baselines, and of the selected member's control."""
    for name, colour, label in (
        (RAW, RAW_COLOUR, "best raw dimension"),
        (COMPONENTS, KIND_COLOURS[PCA], "best principal component"),
        (RANDOM, UNKNOWN_COLOUR, f"control of {evaluation.selected}"),
    ):
        if name in evaluation.baseline_events:
            auc = evaluation.baseline_events[name].summary.auc.value
            axes.axhline(auc, color=colour, linestyle=":", label=label)
