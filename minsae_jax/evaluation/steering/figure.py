"""The figure of steering: waveform, spectrum, scalp, an example and the probes for events."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minsae_jax.errors import join_some
from minsae_jax.evaluation.steering.results import Effect, Steering
from minsae_jax.sae.figures import COLOURS, tidy

if TYPE_CHECKING:  # matplotlib takes half a second to import
    from matplotlib.axes import Axes

DPI = 130
MAX_HZ = 45.0
MAX_NAMED = 10  # features in the title
MAX_TICKS = 32  # channels that are named below bars
GREY = "#9aa3a8"
# Keyword arguments of matplotlib
Style = dict[str, Any]
TITLE: Style = {"loc": "left", "fontsize": 9}
LEGEND: Style = {"frameon": False, "fontsize": 7}
CENTRED: Style = {"ha": "center", "va": "center", "fontsize": 6}


def draw(steering: Steering, folder: Path) -> None:
    """Write steering.png and steering.svg into a folder.

    Without a head that reconstructs there are no panels of the reconstruction, and without labelled
    events none of the probes. Equal results are drawn with equal bytes.
    """
    import matplotlib
    from matplotlib.figure import Figure

    panels = []
    if steering.examples:
        panels += [_draw_example, _draw_waveform, _draw_spectrum, _draw_scalp]
    else:
        panels.append(_draw_last_layer)
    if steering.target is not None:
        panels += [_draw_changes, _draw_aucs]
    n_columns = min(3, len(panels))
    n_rows = -(-len(panels) // n_columns)
    # SVG's identifiers are random, and its date is today's, unless both are set.
    with matplotlib.rc_context({"svg.hashsalt": "steering", "font.size": 9}):
        figure = Figure(figsize=(4.4 * n_columns, 3.4 * n_rows + 0.5), layout="constrained")
        figure.suptitle(_title(steering), x=0.01, ha="left", fontsize=11, parse_math=False)
        for number, panel in enumerate(panels, start=1):
            panel(figure.add_subplot(n_rows, n_columns, number), steering)
        figure.savefig(folder / "steering.png", dpi=DPI)
        figure.savefig(folder / "steering.svg", metadata={"Date": None})


def _title(steering: Steering) -> str:
    features = join_some(list(map(str, steering.features)), limit=MAX_NAMED)
    noun = "feature" if len(steering.features) == 1 else "features"
    title = f"{steering.member}: {noun} {features} scaled at layer {steering.layer}"
    if steering.target is not None:
        title += f", target {steering.target.kind}"
    return title


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _label(effect: Effect) -> str:
    return "× 0 (ablated)" if effect.scale == 0 else f"× {effect.scale:g}"


def _line_style(number: int, effect: Effect) -> Style:
    """Return colour and label of an effect, by its number."""
    return {"color": _colour(number), "label": _label(effect)}


def _finish(axes: "Axes", title: str, x: str, y: str) -> None:
    axes.set_title(title, **TITLE)
    axes.set(xlabel=x, ylabel=y)
    tidy(axes)


def _draw_example(axes: "Axes", steering: Steering) -> None:
    """Draw the EEG and the reconstructions around the strongest token."""
    example = steering.examples[0]
    samples = example.first + np.arange(len(example.eeg))
    seconds = samples / steering.sampling_rate
    axes.plot(seconds, example.eeg, color=GREY, linewidth=1, label="EEG")
    axes.plot(seconds, example.traces[0], color="black", linewidth=1, label="untouched")
    for number, effect in enumerate(steering.effects):
        trace = example.traces[1 + number]
        axes.plot(seconds, trace, linewidth=1, **_line_style(number, effect))
    axes.legend(**LEGEND, ncols=2)
    channel = steering.channels[example.channel]
    recording = example.place.recording.split("_preprocessed")[0]
    title = f"{channel}, {recording}, window {example.place.window}"
    _finish(axes, title, "time in the window (s)", f"reconstruction ({steering.unit})")


def _draw_waveform(axes: "Axes", steering: Steering) -> None:
    for number, effect in enumerate(steering.effects):
        assert effect.reconstruction is not None
        waveform = effect.reconstruction.waveform
        milliseconds = 1000 * np.arange(len(waveform)) / steering.sampling_rate
        axes.plot(milliseconds, waveform, **_line_style(number, effect))
    axes.axhline(0, color="black", linewidth=0.8)
    axes.legend(**LEGEND)
    title = f"mean change of a patch ({steering.n_affected:,} tokens)"
    _finish(axes, title, "time in the patch (ms)", f"change ({steering.unit})")


def _draw_spectrum(axes: "Axes", steering: Steering) -> None:
    is_shown = (steering.hz > 0) & (steering.hz <= MAX_HZ)
    hz = steering.hz[is_shown]
    untouched = steering.untouched.reconstruction
    assert untouched is not None
    axes.plot(hz, untouched.power[is_shown], color="black", label="untouched")
    for number, effect in enumerate(steering.effects):
        assert effect.reconstruction is not None
        power = effect.reconstruction.power[is_shown]
        axes.plot(hz, power, **_line_style(number, effect))
    axes.set_yscale("log")
    axes.legend(**LEGEND)
    unit = f"({steering.unit})" if " " in steering.unit else steering.unit
    title = "power of the reconstruction, affected channels"
    _finish(axes, title, "frequency (Hz)", f"{unit}²/Hz")


def _draw_scalp(axes: "Axes", steering: Steering) -> None:
    """Draw each channel's change at the scale that is farthest from 1."""
    effect = max(steering.effects, key=lambda effect: abs(effect.scale - 1))
    assert effect.reconstruction is not None
    rms = effect.reconstruction.rms
    title = f"RMS change, {_label(effect)} ({steering.unit})"
    if steering.positions is None:
        axes.bar(np.arange(len(rms)), rms, color=COLOURS[0])
        named = np.arange(0, len(rms), -(-len(rms) // MAX_TICKS))
        names = [steering.channels[i] for i in named]
        axes.set_xticks(named, names, rotation=90, fontsize=6)
        _finish(axes, title, "channel", "")
        return
    angle = np.linspace(0, 2 * np.pi, 100)
    head_x = 1.15 * np.cos(angle)
    head_y = 1.15 * np.sin(angle)
    axes.plot(head_x, head_y, color=GREY, linewidth=1)
    axes.plot([-0.12, 0, 0.12], [1.14, 1.28, 1.14], color=GREY, linewidth=1)
    x, y = steering.positions.T
    points = axes.scatter(x, y, c=rms, s=260, cmap="viridis", vmin=0, edgecolors="white")
    # Dark text on light colours.
    colours = np.where(rms > rms.max() / 2, "black", "white")
    for i, name in enumerate(steering.channels):
        if np.isfinite(x[i]):
            axes.text(x[i], y[i], name, color=colours[i], **CENTRED)
    axes.figure.colorbar(points, ax=axes, shrink=0.7)
    axes.set_title(title, **TITLE)
    axes.set_aspect("equal")
    axes.axis("off")


def _draw_last_layer(axes: "Axes", steering: Steering) -> None:
    scales = [f"{effect.scale:g}" for effect in steering.effects]
    places = np.arange(len(scales))
    here = [effect.last_layer for effect in steering.effects]
    elsewhere = [effect.last_layer_elsewhere for effect in steering.effects]
    width = 0.4
    axes.bar(places - 0.2, here, width, color=COLOURS[0], label="affected tokens")
    axes.bar(places + 0.2, elsewhere, width, color=GREY, label="other tokens")
    axes.set_xticks(places, scales)
    axes.legend(**LEGEND)
    _finish(axes, "change of the last layer", "scale", "‖change‖ / ‖activation‖")


def _kinds(axes: "Axes", steering: Steering) -> None:
    """Label the axis with the kinds of event, the target in bold."""
    assert steering.target is not None
    kinds = [reading.kind for reading in steering.untouched.probes]
    places = np.arange(len(kinds))
    axes.set_xticks(places, kinds, rotation=30, ha="right")
    for label in axes.get_xticklabels():
        if label.get_text() == steering.target.kind:
            label.set_fontweight("bold")


def _draw_changes(axes: "Axes", steering: Steering) -> None:
    """Draw the changes of all probes as groups of bars."""
    n_effects = len(steering.effects)
    width = 0.8 / n_effects
    for number, effect in enumerate(steering.effects):
        changes = [reading.change for reading in effect.probes]
        kinds = np.arange(len(changes))
        shift = (number - (n_effects - 1) / 2) * width
        axes.bar(kinds + shift, changes, width, **_line_style(number, effect))
    axes.axhline(0, color="black", linewidth=0.8)
    axes.legend(**LEGEND)
    _kinds(axes, steering)
    title = "change of each probe on its own test events"
    _finish(axes, title, "", "change of the logit (SD)")


def _draw_aucs(axes: "Axes", steering: Steering) -> None:
    effects = [steering.untouched, *steering.effects]
    for number, effect in enumerate(effects):
        aucs = [reading.auc for reading in effect.probes]
        # Side by side, since many are equal.
        shift = 0.5 * (number / len(effects) - 0.5)
        places = np.arange(len(aucs)) + shift
        colour = "black" if number == 0 else _colour(number - 1)
        label = "untouched" if number == 0 else _label(effect)
        axes.plot(places, aucs, "o", color=colour, markersize=4, label=label)
    axes.axhline(0.5, color=GREY, linewidth=0.8)
    axes.legend(**LEGEND)
    _kinds(axes, steering)
    _finish(axes, "AUC of each probe on its own test events", "", "AUC")
