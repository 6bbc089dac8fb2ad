"""Names of features: the user's own in labels.csv, and suggestions from channels and spectrum."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from minsae_jax.errors import UserError
from minsae_jax.evaluation.config import Band

LABELS_CSV = "labels.csv"
WIDESPREAD_EXCESS = 0.3  # below it no channel is much more active than the others


class Label(NamedTuple):
    """A user's name for a feature."""

    label: str = ""
    note: str = ""


def suggest_name(
    bands: Sequence[Band],
    channel_ratio: Float[np.ndarray, " n_vars"],
    band: str,
    positions: Float[np.ndarray, "n_vars 2"] | None,
) -> str:
    """Return a name from region and dominant band, such as "posterior alpha, 8–13 Hz".

    positions: of the channels on a unit head, NaN where unknown; None gives no region.
    """
    words = []
    if positions is not None:
        words.append(region(channel_ratio, positions))
    if band:
        words.append(band)
    name = " ".join(words)
    for known in bands:
        if known.name == band:
            return f"{name}, {known.low:g}–{known.high:g} Hz"
    return name


def region(
    channel_ratio: Float[np.ndarray, " n_vars"], positions: Float[np.ndarray, "n_vars 2"]
) -> str:
    """Return the region of the head where a feature is more active than on average.

    The region is that of the centre of mass of (ratio - 1), of channels with a ratio above 1.

    >>> from minsae_jax.eeg.montage import POSITIONS
    >>> region(np.where(POSITIONS[:, 1] < -0.5, 4.0, 0.2), POSITIONS)
    'posterior'
    """
    is_placed = ~np.isnan(positions).any(axis=1)
    excess = np.maximum(channel_ratio[is_placed] - 1, 0)
    if excess.max() < WIDESPREAD_EXCESS:
        return "widespread"
    x, y = (excess[:, None] * positions[is_placed]).sum(axis=0) / excess.sum()
    # On the head of `montage.POSITIONS`: T3 and T4 are at x = -1 and 1, O1 and O2 at y = -0.9.
    side = ""
    if x < -0.3:
        side = "left "
    elif x > 0.3:
        side = "right "
    if abs(x) > 0.6 and abs(y) < 0.5:
        return f"{side}temporal"
    if y > 0.35:
        return f"{side}frontal"
    if y < -0.35:
        return f"{side}posterior"
    return f"{side}central"


def read_labels(path: Path) -> dict[int, Label]:
    """Return the label of each feature in labels.csv, or none if there is no such file.

    Raises UserError if the file has not the columns feature, label and note.
    """
    if not path.exists():
        return {}
    labels = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            for row in csv.DictReader(file):
                feature = int(row["feature"])
                labels[feature] = Label(row["label"] or "", row.get("note") or "")
    except (KeyError, TypeError, ValueError, csv.Error) as e:
        raise UserError(
            f"{path} must have the columns feature, label and note, one row per feature ({e})"
        ) from None
    return labels
