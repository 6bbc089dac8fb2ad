"""Pictures for people, by matplotlib."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minsae_jax.files import written_aside

COLOURS = ("#2a6f97", "#e07a5f", "#3d8b5f", "#8d5a97", "#c9a227", "#5f6b73")


def draw_pareto(path: Path, points: Mapping[str, Sequence[Mapping[str, Any]]], title: str) -> None:
    """L0 against FVU, a point a member with λ beside it; each kind of member (of one size, say) is a line.

    points: for every kind its members' lambda_sparsity, l0 and fvu.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # half a second, which few verbs need
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for i, (kind, members) in enumerate(points.items()):
        line = sorted(members, key=lambda m: m["l0"])
        l0, fvu = [m["l0"] for m in line], [m["fvu"] for m in line]
        axes.plot(l0, fvu, "o-", color=COLOURS[i % len(COLOURS)], alpha=0.8, label=kind, markersize=5, linewidth=1)
        for member in line:
            where = (member["l0"], member["fvu"])
            axes.annotate(f"{member['lambda_sparsity']:g}", where, (4, 4), textcoords="offset points", fontsize=8)
    axes.set(xlabel="L0: active features a token", ylabel="FVU: variance not explained", title=title)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if len(points) > 1:
        axes.legend(frameon=False, fontsize=8)
    axes.text(1, 1.01, "numbers: λ", transform=axes.transAxes, ha="right", va="bottom", fontsize=8, color="grey")
    with written_aside(path) as aside:
        figure.savefig(aside, format="png", dpi=120)
