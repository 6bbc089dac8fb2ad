"""Pictures for people, by matplotlib: the members' trade-off, and a run's course: `python -m minsae_jax plot`."""

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

from minsae_jax.errors import UserError
from minsae_jax.files import atomic_write
from minsae_jax.sae.config import PlotConfig, load_run_config

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#2a6f97", "#e07a5f", "#3d8b5f", "#8d5a97", "#c9a227", "#5f6b73")
MARKERS = ("o", "s", "^", "D")
STYLES = ("-", "--", ":", "-.")
HYPER = {
    "lambda": "λ",
    "d_sae": "d_sae",
    "lr": "lr",
    "seed": "seed",
}  # in a member's name, and in a legend
FRAMES = 60  # of an animation, at the most
BIN = 0.1  # of log10 density
SMOOTH = (
    np.array([1, 4, 6, 4, 1]) / 16
)  # over bins: a density of few tokens has gaps of up to three bins


def draw_pareto(path: Path, points: Mapping[str, Sequence[Mapping[str, Any]]], title: str) -> None:
    """L0 against FVU, a point a member; each kind of member (of one size, say) is a line. λ stands beside the points
    where there are few kinds, else at the ends of each line. Members without figures are left out.

    points: for every kind its members' lambda_sparsity, l0 and fvu.
    """
    figure = _figure(7.0 if len(points) == 1 else 9.0, 4.5)
    axes = figure.subplots()
    for i, (kind, members) in enumerate(points.items()):
        line = sorted(
            (m for m in members if np.isfinite(m["l0"]) and np.isfinite(m["fvu"])),
            key=lambda m: m["l0"],
        )
        l0, fvu = [m["l0"] for m in line], [m["fvu"] for m in line]
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i // len(COLOURS) % len(MARKERS)]
        axes.plot(
            l0,
            fvu,
            "-",
            color=colour,
            marker=marker,
            alpha=0.8,
            label=kind,
            markersize=5,
            linewidth=1,
        )
        for member in line if len(points) <= 3 else line[:1] + line[1:][-1:]:
            where = (member["l0"], member["fvu"])
            axes.annotate(
                f"{member['lambda_sparsity']:g}",
                where,
                (4, 4),
                textcoords="offset points",
                fontsize=8,
            )
    axes.set(xlabel="L0: active features a token", ylabel="FVU: variance not explained")
    axes.set_title(title, parse_math=False)
    _tidy(axes)
    if len(points) > 1:
        figure.legend(frameon=False, fontsize=8, loc="outside right upper")
    axes.text(
        1,
        1.01,
        "numbers: λ",
        transform=axes.transAxes,
        ha="right",
        va="bottom",
        fontsize=8,
        color="grey",
    )
    with atomic_write(path) as aside:
        figure.savefig(aside, format="png", dpi=120)


@dataclass(frozen=True)
class Course:
    """A member over its run, from metrics.csv: a number a window."""

    label: str
    look: dict[str, Any]  # of its line
    step: Int[np.ndarray, " windows"]
    tokens: Int[np.ndarray, " windows"]  # up to the window's end
    mse: Float[np.ndarray, " windows"]
    l1: Float[np.ndarray, " windows"]
    act_freqs: Path


@dataclass(frozen=True)
class Densities:
    """Histograms over log10 density, the share of a window's tokens on which a feature was active."""

    windows: Int[np.ndarray, " frames"]  # which windows of the run
    edges: Float[np.ndarray, " edges"]
    percent: Float[np.ndarray, "frames members bins"]  # of all features, smoothed
    silent: Int[np.ndarray, "frames members"]  # features that were active on no token of the window


def plot(settings: PlotConfig) -> str:
    """mse_l1.png and density.gif of a run, finished or not; returns what to tell.

    Raises UserError on a folder that is no run, or whose files are damaged or have no rows yet.
    """
    if not settings.run:
        raise UserError("plot needs --run, the folder of a run")
    run = Path(settings.run)
    if not (run / "config.yaml").is_file() or not (run / "members").is_dir():
        raise UserError(f"{run} is no run: it needs config.yaml and members/")
    l1_name = "λ · L1" if load_run_config(run).recipe == "minsae" else "L1"
    courses = read_courses(run / "members")
    out = Path(settings.out) if settings.out else run / "plots"
    densities = read_densities(courses)
    out.mkdir(parents=True, exist_ok=True)
    _draw_courses(out / "mse_l1.png", courses, l1_name, run.resolve().name)
    _animate_densities(out / "density.gif", courses, densities, run.resolve().name)
    return f"wrote {out / 'mse_l1.png'} and {out / 'density.gif'}"


def read_courses(members: Path) -> list[Course]:
    """All members by their hyper-parameters, each up to the last window that all of them have."""
    found = {path: _hyper(path) for path in members.iterdir() if path.is_dir()}
    found = dict(sorted(found.items(), key=lambda item: [item[1].get(name, 0) for name in HYPER]))
    rows = {path: _read_metrics(path / "metrics.csv") for path in found}
    windows = min(map(len, rows.values()), default=0)
    if not windows:
        raise UserError(
            f"{members} has no rows of metrics yet: wait for the first --eval_window steps"
        )
    values = {name: sorted({hyper.get(name, 0) for hyper in found.values()}) for name in HYPER}
    varied = [name for name in HYPER if len(values[name]) > 1] or ["lambda"]
    courses = []
    for path, hyper in found.items():
        label = ", ".join(f"{HYPER[name]} {hyper.get(name, 0):g}" for name in varied)
        places = [values[name].index(hyper.get(name, 0)) for name in varied]
        shades = max(len(values[varied[0]]) - 1, 1)
        look: dict[str, Any] = {
            "color": _shade(places[0] / shades),
            "linestyle": STYLES[sum(places[1:]) % len(STYLES)],
        }
        step, tokens, mse, l1 = rows[path][:windows].T
        courses.append(
            Course(
                label, look, step.astype(int), tokens.astype(int), mse, l1, path / "act_freqs.csv"
            )
        )
    return courses


def _hyper(member: Path) -> dict[str, float]:
    """Of `lambda=5,d_sae=1024`."""
    try:
        hyper = {
            name: float(value)
            for name, value in (part.split("=") for part in member.name.split(","))
        }
    except ValueError:
        hyper = {}
    if "lambda" not in hyper or not hyper.keys() <= HYPER.keys():
        raise UserError(f"{member} is no member's folder: its name should be like lambda=5")
    return hyper


def _lines(path: Path) -> Iterator[str]:
    """Of a file that may be growing: a last line without an end is left out."""
    with path.open(errors="replace") as f:
        yield from (line.rstrip("\n") for line in f if line.endswith("\n"))


def _damaged(path: Path, why: object) -> UserError:
    return UserError(f"{path} is damaged ({why}): train the run anew, or bring the file back")


def _read_metrics(path: Path) -> Float[np.ndarray, "windows 4"]:
    """step, tokens, mse and l1."""
    try:
        rows = [
            [
                float(int(row["step"])),
                float(int(row["tokens"])),
                float(row["mse"]),
                float(row["l1"]),
            ]
            for row in csv.DictReader(_lines(path))
        ]
    except KeyError as e:
        raise _damaged(path, f"it has no column {e}") from None
    except (TypeError, ValueError, OverflowError, csv.Error) as e:
        raise _damaged(path, e) from None
    if any(a[0] >= b[0] or a[1] >= b[1] for a, b in pairwise([[0.0, 0.0], *rows])):
        raise _damaged(path, "its steps or tokens do not grow")
    return np.array(rows, float).reshape(-1, 4)


def read_densities(courses: list[Course]) -> Densities:
    """Of at most FRAMES windows, from the first to the last."""
    windows = np.unique(np.linspace(0, len(courses[0].step) - 1, FRAMES).round().astype(int))
    most = max(int(np.diff(course.tokens, prepend=0).max()) for course in courses)
    edges = (
        np.arange(-np.ceil(np.log10(most) / BIN) - 3, 4) * BIN
    )  # from below the density of one token to above 1
    members = [
        [_histogram(density, edges) for density in _read_act_freqs(course, windows)]
        for course in courses
    ]
    frames = list(
        zip(*members, strict=False)
    )  # a member that was just being written may have one less
    percent = np.array([[percent for percent, _ in frame] for frame in frames])
    silent = np.array([[silent for _, silent in frame] for frame in frames])
    return Densities(windows[: len(frames)], edges, percent, silent)


def _read_act_freqs(
    course: Course, windows: Int[np.ndarray, " frames"]
) -> Iterator[Float[np.ndarray, " d_sae"]]:
    """Every feature's density in these windows."""
    lines = _lines(course.act_freqs)
    d_sae = next(lines, "").count(",")
    wanted, window = set(windows.tolist()), -1
    in_window = np.diff(course.tokens, prepend=0)
    for window, line in zip(range(len(course.tokens)), lines, strict=False):
        if window not in wanted:
            continue
        try:
            tokens, *active = map(int, line.split(","))
            fits = tokens == course.tokens[window] and len(active) == d_sae
            fits = fits and 0 <= min(active) <= max(active) <= in_window[window]
        except ValueError as e:
            raise _damaged(course.act_freqs, e) from None
        if not fits:
            raise _damaged(course.act_freqs, f"row {window + 1} does not fit metrics.csv")
        yield np.array(active) / in_window[window]
    if window + 1 < max(len(course.tokens) - 1, 1):  # the last row may be on its way
        raise _damaged(
            course.act_freqs, f"it has {window + 1} rows, but metrics.csv {len(course.tokens)}"
        )


def _histogram(
    density: Float[np.ndarray, " d_sae"], edges: Float[np.ndarray, " edges"]
) -> tuple[Float[np.ndarray, " bins"], int]:
    counts, _ = np.histogram(np.log10(density[density > 0]), edges)
    return 100 * np.convolve(counts, SMOOTH, "same") / len(density), int((density == 0).sum())


def _draw_courses(path: Path, courses: list[Course], l1_name: str, title: str) -> None:
    """MSE and L1 over steps, a line a member."""
    from matplotlib.ticker import LogFormatter

    figure = _figure(11.0, 4.5)
    for axes, name, told in zip(
        figure.subplots(1, 2), ("mse", "l1"), ("MSE", l1_name), strict=True
    ):
        for course in courses:
            values = getattr(course, name)
            values = np.where(np.isfinite(values) & (values > 0), values, np.nan)
            axes.plot(course.step, values, label=course.label, linewidth=1.6, **course.look)
        if np.nanmax([0.0, *(y for line in axes.lines for y in line.get_ydata())]) > 0:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(LogFormatter())
            axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
        axes.set(xlabel="step", title=told)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        _tidy(axes)
    figure.suptitle(title, x=0.01, ha="left", parse_math=False)
    handles, labels = axes.get_legend_handles_labels()
    _legend(figure, handles, labels)
    with atomic_write(path) as aside:
        figure.savefig(aside, format="png", dpi=120)


def _animate_densities(path: Path, courses: list[Course], densities: Densities, title: str) -> None:
    """The histograms of all members, a curve each, a frame a window."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    figure = _figure(9.5, 4.8)
    canvas, axes = FigureCanvasAgg(figure), figure.subplots()
    edges, percent, silent = densities.edges, densities.percent, densities.silent
    x = np.concatenate([edges[:1], (edges[1:] + edges[:-1]) / 2, edges[-1:]])
    looks = [
        c.look | {"facecolor": (c.look["color"], 0.1), "edgecolor": c.look["color"]}
        for c in courses
    ]
    areas = [axes.fill(x, 0 * x, linewidth=1.6, **look)[0] for look in looks]
    # The first frames, in which all features are much alike, may be higher.
    axes.set(xlim=(edges[0], edges[-1]), ylim=(0, 1.1 * percent[len(percent) // 10 :].max() or 1))
    axes.set(
        xlabel="log10 of the share of tokens on which a feature is active",
        ylabel="% of features in 0.1 decade",
    )
    _tidy(axes)
    wide, digits = max(len(course.label) for course in courses), len(f"{silent.max():,}")
    labels = [
        [f"{c.label:{wide}}  dead: {n:{digits},}" for c, n in zip(courses, row, strict=True)]
        for row in silent
    ]
    legend = _legend(figure, areas, labels[0], prop={"family": "monospace", "size": 9})
    heading = axes.set_title(" ", loc="left", parse_math=False)
    images: list[Image.Image] = []
    for frame, window in enumerate(densities.windows):
        for area, curve, text, label in zip(
            areas, percent[frame], legend.get_texts(), labels[frame], strict=True
        ):
            area.set_xy(np.column_stack([x, np.concatenate([[0], curve, [0]])]))
            text.set_text(label)
        heading.set_text(
            f"{title}   step {courses[0].step[window]:,}   {courses[0].tokens[window]:,} tokens"
        )
        canvas.draw()
        figure.set_layout_engine("none")  # the first frame's is that of all
        image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
        palette = images[0] if images else image.quantize(128, Image.Quantize.MAXCOVERAGE)
        images.append(image.quantize(palette=palette, dither=Image.Dither.NONE))
    with atomic_write(path) as aside:
        milliseconds = [120] * (len(images) - 1) + [2000]
        images[0].save(
            aside,
            format="GIF",
            save_all=True,
            append_images=images[1:],
            duration=milliseconds,
            loop=0,
        )


def _figure(width: float, height: float) -> "Figure":
    """Inches; nothing of pyplot, which would look for a screen."""
    from matplotlib.backends.backend_agg import (
        FigureCanvasAgg,  # half a second, which few verbs need
    )
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _legend(figure: "Figure", handles: Sequence[Any], labels: Sequence[str], **text: Any) -> Any:
    """Beside the axes, in as many columns as the height asks for."""
    columns = -(-len(labels) // 20)
    return figure.legend(
        handles, labels, loc="outside right center", frameon=False, ncols=columns, **text
    )


def _tidy(axes: Any) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _shade(share: float) -> Any:
    """From dark to light, for values from small to large."""
    import matplotlib

    return matplotlib.colormaps["viridis"](0.85 * share)
