"""Plots of a run, by matplotlib: Pareto plots, and `minsae plot` for metrics over steps."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from minsae_jax.errors import UserError
from minsae_jax.files import atomic_write, make_folder
from minsae_jax.locks import lock_folder
from minsae_jax.sae.config import PlotConfig, load_run_config
from minsae_jax.sae.history import Densities, MemberHistory, read_densities, read_histories
from minsae_jax.sae.hyper import SPARSITY, SYMBOLS, Hyper, sparsity, value_text, varied_names

if TYPE_CHECKING:  # matplotlib takes half a second to import, and few verbs need it
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend
    from PIL.Image import Image

COLOURS = ("#2a6f97", "#e07a5f", "#3d8b5f", "#8d5a97", "#c9a227", "#5f6b73")
# The kind of the principal components beside the members of a Pareto plot.
PCA = "pca"
PARETO_DPI = 120
# Sizes in a Pareto plot, in pixels: a digit of 8 points, and the room around a point.
DIGIT_WIDTH = 9.0
LABEL_HEIGHT = 12.0
LABEL_GAP = 7.0
POINT_SIZE = 8.0
MARKERS = ("o", "s", "^", "D", "v", "P")
KIND_COLOURS = {
    "relu": "#2a6f97",
    "topk": "#e07a5f",
    "batchtopk": "#3d8b5f",
    "jumprelu": "#8d5a97",
    "matryoshka": "#c9a227",
    "gated": "#a0522d",
    PCA: "#5f6b73",
}
STYLES = ("-", "--", ":", "-.")
FRAME_MILLISECONDS = 120
LAST_FRAME_MILLISECONDS = 2000


@dataclass(frozen=True)
class ParetoPoint:
    """One member of a Pareto plot."""

    hyper: Hyper
    l0: float
    fvu: float


class LineKey(NamedTuple):
    """Settings shared by the members of a line of a Pareto plot."""

    kind: str  # "" if unknown
    others: str  # varied settings but kind and sparsity, as a label
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


@dataclass(frozen=True)
class PlotFiles:
    """The files that `plot` wrote."""

    metrics: Path  # mse_l1.png
    densities: Path  # density.gif


@dataclass(frozen=True)
class LineStyle:
    """Colour and dashes of one member's line."""

    color: tuple[float, float, float, float]
    linestyle: str


def draw_pareto(path: Path, points: Sequence[ParetoPoint], title: str) -> None:
    """Write a PNG of FVU over L0, one point per member.

    Members that differ only in their sparsity setting are joined by a line. If there are several
    kinds, the colour of a line is its kind, and marker and dashes are its other varied settings;
    otherwise each line has its own colour. Points are labelled with the sparsity setting where
    there is room. Axes are logarithmic if their values span more than a decade. Points that are not
    finite are left out.
    """
    finite = [p for p in points if np.isfinite([p.l0, p.fvu]).all()]
    lines = _group_by_line(finite)
    figure = _make_figure(7.0 if len(lines) <= 1 else 9.0, 5.0)
    figure.set_dpi(PARETO_DPI)
    axes = figure.subplots()
    styles = _pareto_styles(list(lines))
    for key, members in lines.items():
        x = [m.l0 for m in members]
        y = [m.fvu for m in members]
        axes.plot(x, y, alpha=0.85, markersize=6, linewidth=1.2, **vars(styles[key]))
    if _spans_decade([m.l0 for m in finite]):
        axes.set_xscale("log")
        _set_ticks(axes.xaxis)
    if _spans_decade([m.fvu for m in finite]):
        axes.set_yscale("log")
        _set_ticks(axes.yaxis)
    axes.set(xlabel="L0: active features per token", ylabel="FVU: fraction of variance unexplained")
    axes.set_title(title, loc="left", parse_math=False)
    axes.margins(0.08)
    _tidy(axes)
    _explain_lines(figure, lines, styles)
    # The layout must be known, so that labels can avoid each other and the points.
    figure.canvas.draw()
    figure.set_layout_engine("none")
    _label_points(axes, lines, styles)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=PARETO_DPI)


def _group_by_line(points: Sequence[ParetoPoint]) -> dict[LineKey, list[ParetoPoint]]:
    """Return the points of each line by increasing L0."""
    # A setting that some kinds do not have, such as PCA, does not vary because of them.
    names = []
    for name in SYMBOLS:
        values = {point.hyper[name] for point in points if name in point.hyper}
        if name not in ("kind", *SPARSITY) and len(values) > 1:
            names.append(name)
    lines: dict[LineKey, list[ParetoPoint]] = {}
    for point in points:
        hyper = point.hyper
        others = [f"{SYMBOLS[name]} {value_text(hyper[name])}" for name in names if name in hyper]
        setting = sparsity(hyper)
        symbol = "" if setting is None else SYMBOLS[setting[0]]
        key = LineKey(str(hyper.get("kind", "")), ", ".join(others), symbol)
        lines.setdefault(key, []).append(point)
    return {key: sorted(line, key=lambda point: point.l0) for key, line in lines.items()}


def _pareto_styles(keys: Sequence[LineKey]) -> dict[LineKey, ParetoStyle]:
    kinds = list(dict.fromkeys(key.kind for key in keys))
    others = list(dict.fromkeys(key.others for key in keys if key.kind != PCA))
    has_several_kinds = len({*kinds} - {PCA}) > 1
    styles = {}
    for key in keys:
        other = others.index(key.others) if key.others in others else 0
        if has_several_kinds or key.kind == PCA:
            colour = KIND_COLOURS.get(key.kind, COLOURS[kinds.index(key.kind) % len(COLOURS)])
        else:
            colour = COLOURS[other % len(COLOURS)]
        marker = "x" if key.kind == PCA else MARKERS[other % len(MARKERS)]
        styles[key] = ParetoStyle(colour, STYLES[other % len(STYLES)], marker)
    return styles


def _explain_lines(
    figure: "Figure",
    lines: Mapping[LineKey, Sequence[ParetoPoint]],
    styles: Mapping[LineKey, ParetoStyle],
) -> None:
    """Add a legend: kinds by colour with the setting that labels their points, others by marker.

    A single line has a note instead.
    """
    from matplotlib.lines import Line2D

    symbols = [key.symbol for key in lines if key.symbol]
    if len(lines) <= 1:
        if symbols:
            note = f"numbers: {symbols[0]}"
            figure.axes[0].set_title(note, loc="right", fontsize=8, color="grey")
        return
    members = [key for key in lines if key.kind != PCA]
    has_several_kinds = len({key.kind for key in members}) > 1
    has_several_others = len({key.others for key in members}) > 1
    entries: dict[str, Line2D] = {}
    for key, style in styles.items():
        setting = f" ({key.symbol})" if key.symbol else ""
        if key.kind == PCA:
            entries[f"PCA{setting}"] = Line2D([], [], **vars(style))
        elif has_several_kinds:
            handle = Line2D([], [], color=style.color, marker="o")
            entries.setdefault(f"{key.kind or 'unknown'}{setting}", handle)
        else:
            label = key.others or key.kind or "members"
            entries[f"{label}{setting}"] = Line2D([], [], **vars(style))
    if has_several_kinds and has_several_others:
        for key in members:
            style = replace(styles[key], color="black")
            entries.setdefault(key.others, Line2D([], [], **vars(style)))
    legend = figure.legend(
        list(entries.values()),
        list(entries),
        loc="outside right upper",
        frameon=False,
        fontsize=9,
        title="numbers at the points:\nsetting in brackets" if symbols else None,
        title_fontsize=8,
        alignment="left",
    )
    legend.get_title().set_color("grey")


def _label_points(
    axes: "Axes",
    lines: Mapping[LineKey, Sequence[ParetoPoint]],
    styles: Mapping[LineKey, ParetoStyle],
) -> None:
    """Write the sparsity setting beside each point, unless it would hide a point or a label."""
    taken: list[Box] = []
    for line in lines.values():
        for point in line:
            x, y = axes.transData.transform((point.l0, point.fvu))
            half = POINT_SIZE / 2
            taken.append(Box(x - half, y - half, x + half, y + half))
    for key, line in lines.items():
        for point in line:
            setting = sparsity(point.hyper)
            if setting is None:
                continue
            text = value_text(setting[1])
            x, y = axes.transData.transform((point.l0, point.fvu))
            box = next((b for b in _places(x, y, len(text)) if not b.overlaps_any(taken)), None)
            if box is None:
                continue
            taken.append(box)
            axes.annotate(
                text,
                (point.l0, point.fvu),
                (box.left - x, box.bottom - y),
                textcoords="offset pixels",
                fontsize=8,
                color=styles[key].color,
            )


def _places(x: float, y: float, n_digits: int) -> "list[Box]":
    """Return places for a label around a point, all in pixels, the best first."""
    width = DIGIT_WIDTH * n_digits
    right = x + LABEL_GAP
    left = x - LABEL_GAP - width
    above = y + LABEL_GAP
    below = y - LABEL_GAP - LABEL_HEIGHT
    level = y - LABEL_HEIGHT / 2
    middle = x - width / 2
    corners = [
        (right, above - 5), (left, below + 5), (right, level), (left, level),
        (middle, above), (middle, below), (right, below), (left, above),
    ]  # fmt: skip
    return [Box(x, y, x + width, y + LABEL_HEIGHT) for x, y in corners]


def _spans_decade(values: Sequence[float]) -> bool:
    """Return whether values are positive and span more than a decade."""
    return bool(values) and min(values) > 0 and max(values) > 10 * min(values)


def _set_ticks(axis: "Axis") -> None:
    """Put ticks of a logarithmic axis at 1, 2 and 5, as plain numbers."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")


def plot(settings: PlotConfig) -> PlotFiles:
    """Write mse_l1.png and density.gif of a run, finished or not.

    Raises UserError if the folder is not a run, or if its files are damaged or have no rows yet.
    """
    run = Path(settings.run)
    if not (run / "config.yaml").is_file() or not (run / "members").is_dir():
        raise UserError(f"{run} is not a run: it needs config.yaml and members/")
    # The PyTorch minSAE logs the L1 penalty with its weight.
    l1_title = "λ · L1" if load_run_config(run).recipe == "minsae" else "L1"
    histories = read_histories(run)
    densities = read_densities(histories)
    out = Path(settings.out) if settings.out else run / "plots"
    make_folder(out)
    files = PlotFiles(out / "mse_l1.png", out / "density.gif")
    with lock_folder(out):
        _draw_metrics(files.metrics, histories, l1_title, run.resolve().name)
        _animate_densities(files.densities, histories, densities, run.resolve().name)
    return files


def _member_labels(histories: Sequence[MemberHistory]) -> list[str]:
    hypers = [history.hyper for history in histories]
    # A single member varies in nothing and is labelled by its sparsity.
    names = varied_names(hypers) or list(SPARSITY)
    labels = []
    for hyper in hypers:
        parts = [f"{SYMBOLS[n]} {value_text(hyper[n])}" for n in names if n in hyper]
        labels.append(", ".join(parts))
    return labels


def _member_styles(histories: Sequence[MemberHistory]) -> list[LineStyle]:
    """Colour by the first varied hyper-parameter, from dark to light; dashes by all others."""
    import matplotlib

    colours = matplotlib.colormaps["viridis"]
    hypers = [history.hyper for history in histories]
    names = varied_names(hypers) or list(SPARSITY)
    values = {name: sorted({hyper.get(name, 0) for hyper in hypers}) for name in names}
    styles = []
    for hyper in hypers:
        first, *others = [values[name].index(hyper.get(name, 0)) for name in names]
        share = first / max(len(values[names[0]]) - 1, 1)
        # The lightest 15 % of the colour map are hard to see on white.
        colour = colours(0.85 * share)
        styles.append(LineStyle(colour, STYLES[sum(others) % len(STYLES)]))
    return styles


def _draw_metrics(
    path: Path, histories: Sequence[MemberHistory], l1_title: str, title: str
) -> None:
    """Draw MSE and L1 over steps, one line per member."""
    figure = _make_figure(11.0, 4.5)
    mse_axes, l1_axes = figure.subplots(1, 2)
    labels = _member_labels(histories)
    styles = _member_styles(histories)
    for history, label, style in zip(histories, labels, styles, strict=True):
        _plot_positive(mse_axes, history.step, history.mse, label, style)
        _plot_positive(l1_axes, history.step, history.l1, label, style)
    _finish_metric_axes(mse_axes, "MSE")
    _finish_metric_axes(l1_axes, l1_title)
    figure.suptitle(title, x=0.01, ha="left", parse_math=False)
    handles, handle_labels = l1_axes.get_legend_handles_labels()
    _add_legend(figure, handles, handle_labels)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _plot_positive(
    axes: "Axes", step: np.ndarray, values: np.ndarray, label: str, style: LineStyle
) -> None:
    """Plot values that a logarithmic axis can show; the others become gaps."""
    is_shown = np.isfinite(values) & (values > 0)
    shown = np.where(is_shown, values, np.nan)
    axes.plot(step, shown, label=label, linewidth=1.6, **vars(style))


def _finish_metric_axes(axes: "Axes", title: str) -> None:
    from matplotlib.ticker import LogFormatter

    has_values = any(np.isfinite(line.get_ydata()).any() for line in axes.lines)
    if has_values:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(LogFormatter())
        # Labels some minor ticks on axes of up to two decades, all of them up to half a decade.
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    axes.set(xlabel="step", title=title)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    _tidy(axes)


def _animate_densities(
    path: Path, histories: Sequence[MemberHistory], densities: Densities, title: str
) -> None:
    """Write a GIF of density histograms: one curve per member, one frame per interval."""
    from PIL import Image

    figure = _make_figure(9.5, 4.8)
    axes = figure.subplots()
    edges = densities.edges
    middles = (edges[1:] + edges[:-1]) / 2
    # `fill` needs a closed outline, so the curve starts and ends on the axis.
    x = np.concatenate([edges[:1], middles, edges[-1:]])
    areas = []
    for style in _member_styles(histories):
        (area,) = axes.fill(x, 0 * x, linewidth=1.6, **vars(style))
        area.set(facecolor=(style.color, 0.1), edgecolor=style.color)
        areas.append(area)
    # In the first frames most features have the same density: their peak may be cut off.
    highest = densities.percent[len(densities.percent) // 10 :].max()
    axes.set(
        xlim=(edges[0], edges[-1]),
        ylim=(0, 1.1 * highest or 1),
        xlabel="log10 of the share of tokens with the feature active",
        ylabel="% of features per 0.1 decade",
    )
    _tidy(axes)
    labels = _frame_labels(histories, densities)
    legend = _add_legend(figure, areas, labels[0], prop={"family": "monospace", "size": 9})
    heading = axes.set_title(" ", loc="left", parse_math=False)
    images: list[Image.Image] = []
    for frame, interval in enumerate(densities.intervals):
        for area, curve in zip(areas, densities.percent[frame], strict=True):
            y = np.concatenate([[0], curve, [0]])
            area.set_xy(np.column_stack([x, y]))
        for text, label in zip(legend.get_texts(), labels[frame], strict=True):
            text.set_text(label)
        step = histories[0].step[interval]
        tokens = histories[0].tokens[interval]
        heading.set_text(f"{title}   step {step:,}   {tokens:,} tokens")
        images.append(_render(figure, images))
    durations = [FRAME_MILLISECONDS] * (len(images) - 1) + [LAST_FRAME_MILLISECONDS]
    # Pillow itself ignores it if the system writes a part of a GIF only.
    content = io.BytesIO()
    images[0].save(
        content,
        format="GIF",
        save_all=True,
        append_images=images[1:],
        duration=durations,
        loop=0,
    )
    with atomic_write(path) as temporary:
        temporary.write_bytes(content.getbuffer())


def _frame_labels(histories: Sequence[MemberHistory], densities: Densities) -> list[list[str]]:
    """Return the legend of every frame: members with their number of silent features, aligned."""
    labels = _member_labels(histories)
    width = max(map(len, labels))
    digits = len(f"{densities.silent.max():,}")
    padded = [f"{label:{width}}" for label in labels]
    frames = []
    for row in densities.silent:
        frame = [f"{label}  dead: {n:{digits},}" for label, n in zip(padded, row, strict=True)]
        frames.append(frame)
    return frames


def _render(figure: "Figure", earlier: "list[Image]") -> "Image":
    """Return the figure as an image with the layout and the palette of the first frame."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    # From here on the axes keep their place, however wide the legend becomes.
    figure.set_layout_engine("none")
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    # One palette and no dithering: colours do not flicker, and frames compress well.
    palette = earlier[0] if earlier else image.quantize(128, Image.Quantize.MAXCOVERAGE)
    return image.quantize(palette=palette, dither=Image.Dither.NONE)


def _make_figure(width: float, height: float) -> "Figure":
    """Return a figure in inches, without pyplot, which would look for a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _add_legend(
    figure: "Figure", handles: Sequence[Any], labels: Sequence[str], **text: Any
) -> "Legend":
    """Add a legend to the right of the axes, with up to 20 entries per column."""
    n_columns = -(-len(labels) // 20)
    return figure.legend(
        handles, labels, loc="outside right center", frameon=False, ncols=n_columns, **text
    )


def _tidy(axes: "Axes") -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
