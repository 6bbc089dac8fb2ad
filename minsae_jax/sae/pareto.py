"""Pareto plots: FVU over L0, one point per member, one line through the means over seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float

from minsae_jax.files import atomic_write
from minsae_jax.sae.figures import (
    COLOURS,
    KIND_COLOURS,
    STYLES,
    make_figure,
    plain_log_ticks,
    tidy,
)
from minsae_jax.sae.hyper import SPARSITY, SYMBOLS, Hyper, hyper_label, sparsity, value_text

if TYPE_CHECKING:  # matplotlib takes half a second to import, and few verbs need it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 120
# In pixels: a digit of 8 points, and the room around a point
DIGIT_WIDTH = 9.0
LABEL_HEIGHT = 12.0
LABEL_GAP = 7.0
POINT_SIZE = 8.0
MAX_ENTRIES = 22  # of the legend, which would be cut off
MARKERS = ("o", "s", "^", "D", "v", "P")


@dataclass(frozen=True)
class ParetoPoint:
    """One member of a Pareto plot."""

    hyper: Hyper
    l0: float
    fvu: float


@dataclass(frozen=True)
class SeedGroup:
    """Members that differ only in their seed, with the mean of their L0 and FVU."""

    members: list[ParetoPoint]

    @property
    def l0(self) -> float:
        return float(np.mean([member.l0 for member in self.members]))

    @property
    def fvu(self) -> float:
        return float(np.mean([member.fvu for member in self.members]))


class LineKey(NamedTuple):
    """Settings shared by the members of a line of a Pareto plot."""

    kind: str  # "" if unknown
    others: str  # varied settings but kind, sparsity and seed, as a label
    symbol: str  # of the sparsity setting, "" if there is none


class Box(NamedTuple):
    """A rectangle in pixels."""

    left: float
    bottom: float
    right: float
    top: float

    def overlaps_any(self, others: "Sequence[Box]") -> bool:
        for other in others:
            is_beside = self.right <= other.left or other.right <= self.left
            is_above = self.top <= other.bottom or other.top <= self.bottom
            if not (is_beside or is_above):
                return True
        return False


@dataclass(frozen=True)
class ParetoStyle:
    """Look of a line of a Pareto plot."""

    color: str
    linestyle: str
    marker: str


def draw_pareto(path: Path, points: Sequence[ParetoPoint], title: str) -> None:
    """Write a PNG of FVU over L0, one point per member.

    Members that differ only in their seed have the same look. A line joins the means over seeds of
    the members that differ only in their sparsity setting. If there are several kinds, the colour
    of a line is its kind, and marker and dashes are its other varied settings; otherwise each line
    has its own colour. Means are labelled with the sparsity setting where there is room. Axes are
    logarithmic if their values span more than a decade. Points that are not finite are left out.
    """
    finite = [p for p in points if np.isfinite([p.l0, p.fvu]).all()]
    lines = _group_by_line(finite)
    figure = make_figure(7.0 if len(lines) <= 1 else 9.0, 5.0)
    figure.set_dpi(DPI)
    axes = figure.subplots()
    styles = _pareto_styles(list(lines))
    for key, groups in lines.items():
        _draw_line(axes, groups, styles[key])
    if _spans_decade([m.l0 for m in finite]):
        axes.set_xscale("log")
        plain_log_ticks(axes.xaxis)
    if _spans_decade([m.fvu for m in finite]):
        axes.set_yscale("log")
        plain_log_ticks(axes.yaxis)
    axes.set(xlabel="L0: active features per token", ylabel="FVU: fraction of variance unexplained")
    axes.set_title(title, loc="left", parse_math=False)
    axes.margins(0.08)
    tidy(axes)
    _explain_lines(figure, lines, styles)
    # The layout must be known, so that labels can avoid each other and the points.
    figure.draw_without_rendering()
    figure.set_layout_engine(None)  # otherwise savefig would draw twice
    _label_points(axes, lines, styles)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI)


def _group_by_line(points: Sequence[ParetoPoint]) -> dict[LineKey, list[SeedGroup]]:
    """Return the members of each line by increasing L0, grouped over seeds."""
    # A setting that some kinds do not have does not vary because of them.
    names = []
    for name in SYMBOLS:
        values = {point.hyper[name] for point in points if name in point.hyper}
        if name not in ("kind", "seed", *SPARSITY) and len(values) > 1:
            names.append(name)
    lines: dict[LineKey, dict[Any, list[ParetoPoint]]] = {}
    for point in points:
        hyper = point.hyper
        setting = sparsity(hyper)
        symbol = "" if setting is None else SYMBOLS[setting[0]]
        key = LineKey(str(hyper.get("kind", "")), hyper_label(hyper, names), symbol)
        lines.setdefault(key, {}).setdefault(setting, []).append(point)
    grouped = {}
    for key, line in lines.items():
        groups = [SeedGroup(members) for members in line.values()]
        grouped[key] = sorted(groups, key=lambda group: group.l0)
    return grouped


def _pareto_styles(keys: Sequence[LineKey]) -> dict[LineKey, ParetoStyle]:
    kinds = list(dict.fromkeys(key.kind for key in keys))
    others = list(dict.fromkeys(key.others for key in keys))
    styles = {}
    for key in keys:
        other = others.index(key.others)
        if len(kinds) > 1:
            fallback = COLOURS[kinds.index(key.kind) % len(COLOURS)]
            colour = KIND_COLOURS.get(key.kind, fallback)
        else:
            colour = COLOURS[other % len(COLOURS)]
        marker = MARKERS[other % len(MARKERS)]
        styles[key] = ParetoStyle(colour, STYLES[other % len(STYLES)], marker)
    return styles


def _draw_line(axes: "Axes", groups: Sequence[SeedGroup], style: ParetoStyle) -> None:
    """Draw a point per member, and a line through the means over seeds."""
    x = [group.l0 for group in groups]
    y = [group.fvu for group in groups]
    axes.plot(x, y, alpha=0.85, linewidth=1.2, color=style.color, linestyle=style.linestyle)
    members = [member for group in groups for member in group.members]
    x = [member.l0 for member in members]
    y = [member.fvu for member in members]
    axes.plot(x, y, style.marker, alpha=0.85, markersize=6, color=style.color)


def _explain_lines(
    figure: "Figure",
    lines: Mapping[LineKey, Sequence[SeedGroup]],
    styles: Mapping[LineKey, ParetoStyle],
) -> None:
    """Add a legend: kinds by colour with the setting that labels their points, others by marker.

    A single line has a note instead.
    """
    from matplotlib.lines import Line2D

    symbols = [key.symbol for key in lines if key.symbol]
    has_seeds = any(len(group.members) > 1 for line in lines.values() for group in line)
    notes = ["lines: means over seeds"] if has_seeds else []
    if len(lines) <= 1:
        if symbols:
            notes.insert(0, f"numbers: {symbols[0]}")
        figure.axes[0].set_title("; ".join(notes), loc="right", fontsize=8, color="grey")
        return
    if symbols:
        notes.insert(0, "numbers at the points:\nsetting in brackets")
    has_several_kinds = len({key.kind for key in lines}) > 1
    has_several_others = len({key.others for key in lines}) > 1
    entries: dict[str, Line2D] = {}
    for key, style in styles.items():
        setting = f" ({key.symbol})" if key.symbol else ""
        if has_several_kinds:
            handle = Line2D([], [], color=style.color, marker="o")
            entries.setdefault(f"{key.kind or 'unknown'}{setting}", handle)
        else:
            label = key.others or key.kind or "members"
            entries[f"{label}{setting}"] = Line2D([], [], **vars(style))
    if has_several_kinds and has_several_others:
        for key in lines:
            style = replace(styles[key], color="black")
            entries.setdefault(key.others, Line2D([], [], **vars(style)))
    labels = list(entries)
    handles = list(entries.values())
    if len(labels) > MAX_ENTRIES:
        labels[MAX_ENTRIES - 1 :] = [f"and {len(labels) - MAX_ENTRIES + 1} more"]
        handles[MAX_ENTRIES - 1 :] = [Line2D([], [], linestyle="none")]
    legend = figure.legend(
        handles,
        labels,
        loc="outside right upper",
        frameon=False,
        fontsize=9,
        title="\n".join(notes),
        title_fontsize=8,
        alignment="left",
    )
    legend.get_title().set_color("grey")


def _label_points(
    axes: "Axes",
    lines: Mapping[LineKey, Sequence[SeedGroup]],
    styles: Mapping[LineKey, ParetoStyle],
) -> None:
    """Write the sparsity setting beside its points, unless it would hide a point or a label."""
    half = POINT_SIZE / 2
    taken: list[Box] = []
    for line in lines.values():
        for group in line:
            for x, y in _pixels(axes, group):
                taken.append(Box(x - half, y - half, x + half, y + half))
    for key, line in lines.items():
        for group in line:
            setting = sparsity(group.members[0].hyper)
            if setting is None:
                continue
            text = value_text(setting[1])
            pixels = _pixels(axes, group)
            points = Box(*pixels.min(0), *pixels.max(0))
            places = _places(points, len(text))
            box = next((place for place in places if not place.overlaps_any(taken)), None)
            if box is None:
                continue
            taken.append(box)
            x, y = axes.transData.transform((group.l0, group.fvu))
            axes.annotate(
                text,
                (group.l0, group.fvu),
                (box.left - x, box.bottom - y),
                textcoords="offset pixels",
                fontsize=8,
                color=styles[key].color,
            )


def _pixels(axes: "Axes", group: SeedGroup) -> Float[np.ndarray, "members 2"]:
    """Return the places of a group's points in pixels."""
    return axes.transData.transform([(member.l0, member.fvu) for member in group.members])


def _places(points: Box, n_digits: int) -> list[Box]:
    """Return places for a label around points, all in pixels, the best first."""
    width = DIGIT_WIDTH * n_digits
    right = points.right + LABEL_GAP
    left = points.left - LABEL_GAP - width
    above = points.top + LABEL_GAP
    below = points.bottom - LABEL_GAP - LABEL_HEIGHT
    level = (points.bottom + points.top - LABEL_HEIGHT) / 2
    middle = (points.left + points.right - width) / 2
    corners = [
        (right, above - 5), (left, below + 5), (right, level), (left, level),
        (middle, above), (middle, below), (right, below), (left, above),
    ]  # fmt: skip
    return [Box(x, y, x + width, y + LABEL_HEIGHT) for x, y in corners]


def _spans_decade(values: Sequence[float]) -> bool:
    """Return whether values are positive and span more than a decade."""
    return bool(values) and min(values) > 0 and max(values) > 10 * min(values)
