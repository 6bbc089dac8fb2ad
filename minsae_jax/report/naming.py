"""Feature names: those of the user in labels.csv, and suggestions from channels and spectrum."""

import csv
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from minsae_jax.errors import UserError, brief
from minsae_jax.evaluation.config import Band
from minsae_jax.files import regular_file

LABELS_CSV = "labels.csv"
WIDESPREAD_EXCESS = 0.3  # below it no channel is much more active than the others
LOBES = ("frontal", "central", "temporal", "posterior")
MIN_VOTES = 0.5  # share of the lobe with most votes
MIN_SIDE = 0.3  # distance from the midline
MIN_SD = 4  # minimum excess of a region's share of the activation over that of its channels


class Label(NamedTuple):
    """A user's name for a feature."""

    label: str = ""
    note: str = ""


def suggest_name(
    bands: Sequence[Band],
    channel_ratio: Float[np.ndarray, " n_vars"],
    band: str,
    positions: Float[np.ndarray, "n_vars 2"] | None,
    n_active: int | None = None,
) -> str:
    """Return a name from region and dominant band, such as "posterior alpha, 8–13 Hz".

    positions: of the channels on a unit head, NaN where unknown; None gives no region. n_active:
    see `region`.
    """
    words = []
    if positions is not None:
        words.append(region(channel_ratio, positions, n_active))
    if band:
        words.append(band)
    name = " ".join(words)
    for known in bands:
        if known.name == band:
            return f"{name}, {known.low:g}–{known.high:g} Hz"
    return name


def region(
    channel_ratio: Float[np.ndarray, " n_vars"],
    positions: Float[np.ndarray, "n_vars 2"],
    n_active: int | None = None,
) -> str:
    """Return the region of the head where a feature is more active than on average.

    Channels vote by their excess, the ratio minus 1, if it is at least half of the largest one. The
    lobe is the one with most of the votes. It has a side if the votes' mean is on one; without a
    lobe that has half of the votes the region is widespread.

    n_active: active tokens, if the ratios are mean activations. Some channels have most of few
    tokens by chance, so that the region is also widespread if its share of the activation is not
    MIN_SD above that of its channels.

    >>> from minsae_jax.eeg.montage import POSITIONS
    >>> region(np.where(POSITIONS[:, 1] < -0.5, 4.0, 0.2), POSITIONS)
    'posterior'
    """
    is_placed = ~np.isnan(positions).any(axis=1)
    excess = np.maximum(channel_ratio[is_placed] - 1, 0)
    if excess.max() < WIDESPREAD_EXCESS:
        return "widespread"
    votes = np.where(excess >= 0.5 * excess.max(), excess, 0)
    votes = votes / votes.sum()
    lobes = lobes_of(positions[is_placed])
    share = {lobe: votes[lobes == lobe].sum() for lobe in LOBES}
    best = max(LOBES, key=share.__getitem__)
    if share[best] < MIN_VOTES:
        return "widespread"
    is_best = lobes == best
    x = (votes * positions[is_placed, 0])[is_best].sum() / share[best]
    name = best
    if x < -MIN_SIDE:
        name = f"left {best}"
    elif x > MIN_SIDE:
        name = f"right {best}"
    if n_active is None:
        return name
    placed = np.flatnonzero(is_placed)
    is_inside = fits_region(name, placed, positions)
    of_channels = is_inside.mean()
    of_activation = channel_ratio[placed[is_inside]].sum() / channel_ratio[placed].sum()
    # A binomial SD, with exponential activations, whose mean square is twice the squared mean
    sd = np.sqrt(2 * of_channels * (1 - of_channels) / n_active)
    return name if of_activation > of_channels + MIN_SD * sd else "widespread"


def lobes_of(positions: Float[np.ndarray, "n 2"]) -> np.ndarray:
    """Return the lobe of each position on the head of `montage.POSITIONS`, "" where unknown.

    There T3 and T4 are at x = -1 and 1; F7 and F8 are frontal, T5 and T6 posterior.
    """
    x, y = positions.T
    is_temporal = (np.abs(x) > 0.7) & (np.abs(y) < 0.35)
    lobes = np.where(y > 0.35, "frontal", np.where(y < -0.35, "posterior", "central"))
    lobes = np.where(is_temporal, "temporal", lobes)
    return np.where(np.isnan(x), "", lobes)


def fits_region(
    name: str, channels: Int[np.ndarray, " n"], positions: Float[np.ndarray, "n_vars 2"]
) -> Bool[np.ndarray, " n"]:
    """Return whether each channel is in a region; tokens over all channels (-1) fit any."""
    if name == "widespread":
        return np.ones(len(channels), bool)
    side, _, lobe = name.rpartition(" ")
    fits = lobes_of(positions) == lobe
    x = np.nan_to_num(positions[:, 0])
    if side == "left":
        fits &= x < 0
    elif side == "right":
        fits &= x > 0
    return np.where(channels < 0, True, fits[channels])


def read_feature_labels(
    path: Path, d_sae: int, member: str | None = None, before: str | None = None
) -> dict[int, Label]:
    """Return the label of each feature in labels.csv, or none if there is no such file.

    member: the member that the report is about; rows of another one, in the optional column
    `member`, are left out. before: the member of the report before, if any; warns if it is another
    one and the file has no such column. Features from d_sae on are left out with a warning. Raises
    UserError if the file lacks a column feature or label, or a feature is not a number.
    """
    if not path.exists():
        return {}
    labels = {}
    unknown = []
    try:
        with regular_file(path).open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            columns = rows.fieldnames or []
            for row in rows:
                is_other = row.get("member") and member and row["member"] != member
                feature = int(row["feature"])
                if feature < 0:
                    raise ValueError(f"feature {feature} is below 0")
                label = Label(row["label"] or "", row.get("note") or "")
                if not is_other and feature >= d_sae:
                    unknown.append(feature)
                elif not is_other:
                    labels[feature] = label
    except (KeyError, TypeError, ValueError, csv.Error) as e:
        raise UserError(
            f"{path} must have the columns feature, label and note, one row per feature "
            f"({brief(e)})"
        ) from None
    if before not in (None, member) and "member" not in columns:
        warnings.warn(
            f"{path} has no column `member`, and the report before was about {before}: its labels "
            f"are now shown for features of {member}; add the column to tie labels to a member",
            stacklevel=2,
        )
    if unknown:
        warnings.warn(
            f"{path} names feature {unknown[0]}, but {member or 'the member'} has features 0 to "
            f"{d_sae - 1}; its label is not shown",
            stacklevel=2,
        )
    return labels
