"""`minsae plot`: metrics of a run over its steps, and its densities as an animation."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minsae_jax.errors import UserError
from minsae_jax.files import atomic_write, make_folder
from minsae_jax.locks import lock_folder
from minsae_jax.sae.config import PlotConfig, TrainConfig, load_run_config
from minsae_jax.sae.figures import STYLES, make_figure, tidy
from minsae_jax.sae.history import Densities, MemberHistory, read_densities, read_histories
from minsae_jax.sae.hyper import SPARSITY, Hyper, hyper_label, varied_names

if TYPE_CHECKING:  # matplotlib takes half a second to import, and few verbs need it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend
    from PIL.Image import Image

FRAME_MILLISECONDS = 120
LAST_FRAME_MILLISECONDS = 2000


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


def plot(settings: PlotConfig) -> PlotFiles:
    """Write mse_l1.png and density.gif of a run, finished or not.

    Raises UserError if the folder is not a run, or if its files are damaged or have no rows yet.
    """
    run = Path(settings.run)
    if not (run / "config.yaml").is_file() or not (run / "members").is_dir():
        raise UserError(f"{run} is not a run: it needs config.yaml and members/")
    histories = read_histories(run)
    if not histories:
        raise UserError(f"{run} has no metrics: the first are written after --eval_window steps")
    l1_title = penalty_title(load_run_config(run), [history.hyper for history in histories])
    densities = read_densities(histories)
    out = Path(settings.out) if settings.out else run / "plots"
    make_folder(out)
    files = PlotFiles(out / "mse_l1.png", out / "density.gif")
    with lock_folder(out):
        _draw_metrics(files.metrics, histories, l1_title, run.resolve().name)
        _animate_densities(files.densities, histories, densities, run.resolve().name)
    return files


def penalty_title(config: TrainConfig, hypers: Sequence[Hyper]) -> str:
    """Return what the column l1 of metrics.csv contains, which depends on the kind."""
    # The PyTorch minSAE logs the L1 penalty with its weight.
    of_relu = "λ · L1" if config.recipe == "minsae" else "L1"
    kinds = {hyper.get("kind", "relu") for hyper in hypers}
    if "jumprelu" not in kinds:
        return of_relu
    has_target = any("target_l0" in hyper for hyper in hypers)
    of_jumprelu = "L0" if has_target or config.jumprelu_penalty == "step" else "penalty"
    return f"{of_relu}, of jumprelu {of_jumprelu}" if "relu" in kinds else of_jumprelu


def _member_labels(histories: Sequence[MemberHistory]) -> list[str]:
    hypers = [history.hyper for history in histories]
    # A single member varies in nothing and is labelled by its sparsity.
    names = varied_names(hypers) or list(SPARSITY)
    return [hyper_label(hyper, names) for hyper in hypers]


def member_styles(hypers: Sequence[Hyper]) -> list[LineStyle]:
    """Return colours by the first varied hyper-parameter, dark to light, and dashes by the others.

    Up to four members of one colour have different dashes.
    """
    import matplotlib

    colours = matplotlib.colormaps["viridis"]
    names = varied_names(hypers) or list(SPARSITY)
    values = {name: sorted({hyper.get(name, 0) for hyper in hypers}) for name in names}
    places = [tuple(values[name].index(hyper.get(name, 0)) for name in names) for hyper in hypers]
    styles = []
    for first, *others in places:
        of_colour = sorted({place[1:] for place in places if place[0] == first})
        share = first / max(len(values[names[0]]) - 1, 1)
        # The lightest 15 % of the colour map are hard to see on white.
        colour = colours(0.85 * share)
        styles.append(LineStyle(colour, STYLES[of_colour.index(tuple(others)) % len(STYLES)]))
    return styles


def _draw_metrics(
    path: Path, histories: Sequence[MemberHistory], l1_title: str, title: str
) -> None:
    """Draw MSE and L1 over steps, one line per member; MSE alone if no member has an L1."""
    # That of top-k kinds is 0.
    has_l1 = any((history.l1 > 0).any() for history in histories)
    figure = make_figure(11.0 if has_l1 else 6.5, 4.5)
    (mse_axes, *l1_axes) = figure.subplots(1, 1 + has_l1, squeeze=False)[0]
    labels = _member_labels(histories)
    styles = member_styles([history.hyper for history in histories])
    for history, label, style in zip(histories, labels, styles, strict=True):
        _plot_positive(mse_axes, history.step, history.mse, label, style)
        for axes in l1_axes:
            _plot_positive(axes, history.step, history.l1, label, style)
    _finish_metric_axes(mse_axes, "MSE")
    for axes in l1_axes:
        _finish_metric_axes(axes, l1_title)
    figure.suptitle(title, x=0.01, ha="left", parse_math=False)
    handles, handle_labels = mse_axes.get_legend_handles_labels()
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
    tidy(axes)


def _animate_densities(
    path: Path, histories: Sequence[MemberHistory], densities: Densities, title: str
) -> None:
    """Write a GIF of density histograms: one curve per member, one frame per interval."""
    from PIL import Image

    figure = make_figure(9.5, 4.8)
    axes = figure.subplots()
    edges = densities.edges
    middles = (edges[1:] + edges[:-1]) / 2
    # `fill` needs a closed outline, so the curve starts and ends on the axis.
    x = np.concatenate([edges[:1], middles, edges[-1:]])
    areas = []
    for style in member_styles([history.hyper for history in histories]):
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
    tidy(axes)
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


def _add_legend(
    figure: "Figure", handles: Sequence[Any], labels: Sequence[str], **text: Any
) -> "Legend":
    """Add a legend to the right of the axes, with up to 20 entries per column."""
    n_columns = -(-len(labels) // 20)
    return figure.legend(
        handles, labels, loc="outside right center", frameon=False, ncols=n_columns, **text
    )
