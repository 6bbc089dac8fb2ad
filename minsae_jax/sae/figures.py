"""Colours and figures that all plots share."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # matplotlib takes half a second to import, and few verbs need it
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

COLOURS = ("#2a6f97", "#e07a5f", "#3d8b5f", "#8d5a97", "#c9a227", "#5f6b73")
STYLES = ("-", "--", ":", "-.")
# The kind of the principal components beside the members of a plot
PCA = "pca"
KIND_COLOURS = {
    "relu": "#2a6f97",
    "topk": "#e07a5f",
    "batchtopk": "#3d8b5f",
    "jumprelu": "#8d5a97",
    "matryoshka": "#c9a227",
    "gated": "#a0522d",
    PCA: "#5f6b73",
}


def make_figure(width: float, height: float) -> "Figure":
    """Return a figure in inches, without pyplot, which would look for a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plain_log_ticks(axis: "Axis") -> None:
    """Put ticks of a logarithmic axis at 1, 2 and 5, as plain numbers."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")


def tidy(axes: "Axes") -> None:
    """Add a grid, and remove the lines at the top and on the right."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
