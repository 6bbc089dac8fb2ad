"""Channels: names and their aliases, and positions on the head."""

import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

# The TUH corpus's 19 channels of the international 10-20 system, in its order. Old names: T3, T4,
# T5 and T6 are T7, T8, P7 and P8 of the newer 10-10 system.
CHANNELS = (
    "FP1", "FP2", "F7", "F3", "FZ", "F4", "F8", "T3", "C3", "CZ",
    "C4", "T4", "T5", "P3", "PZ", "P4", "T6", "O1", "O2",
)  # fmt: skip

# [19, 2] on a unit head seen from above: x to the right, y to the front.
POSITIONS = np.array([
    (-0.3, 0.9), (0.3, 0.9), (-0.8, 0.55), (-0.4, 0.5), (0, 0.45), (0.4, 0.5), (0.8, 0.55),
    (-1, 0), (-0.5, 0), (0, 0), (0.5, 0), (1, 0),
    (-0.8, -0.55), (-0.4, -0.5), (0, -0.45), (0.4, -0.5), (0.8, -0.55), (-0.3, -0.9), (0.3, -0.9),
])  # fmt: skip

# The same channels in MNE's montage standard_1005, in mm: x to the right, y to the front, z up,
# from the point between the ears.
HEAD_POSITIONS_MM = (
    (-30.9, 114.6, 27.9), (28.4, 115.3, 27.7), (-71.9, 73.1, 25.8), (-51.8, 86.7, 78.7),
    (-1.2, 93.3, 102.6), (50.3, 87.4, 77.3), (71.4, 74.5, 25.1), (-86.0, 14.9, 31.2),
    (-67.1, 23.4, 104.5), (-1.4, 27.6, 140.2), (65.3, 23.6, 103.7), (83.3, 15.3, 31.0),
    (-74.5, -42.1, 41.3), (-55.0, -44.2, 99.9), (-1.7, -45.2, 126.7), (53.6, -44.3, 100.5),
    (71.0, -42.3, 41.2), (-31.6, -80.6, 54.8), (27.7, -80.5, 54.7),
)  # fmt: skip

# The centre of the head is this far above the point between the ears in most montages of MNE, to
# within 6 mm, and 0 to 15 mm in front of it.
HEAD_CENTRE_Z = 0.04  # m
CENTRE_PRIOR = 0.02  # m; channels that are less spread from back to front say little about it
EAR_ANGLE = np.deg2rad(95)  # from the vertex to T7 and T8, seen from that centre

NEW_NAMES = {"T3": "T7", "T4": "T8", "T5": "P7", "T6": "P8"}
# Without a separator, an electrode of the 10-10 system must follow: EEGFP1, but not EEG001.
ELECTRODE = r"(FP|AF|F|FT|FC|T|C|TP|CP|P|PO|O)(Z|[1-9]|10)(?![A-Z0-9])"
PREFIX = re.compile(rf"^((EEG|POL)[ _:-]+|EEG(?={ELECTRODE}))")
# References that all channels of a recording share. A1, A2, M1 and M2 alone are not among them:
# F3-A2 beside F4-A1 has two references, which no average over the channels can remove. With the
# lookbehind, the time grows with the length of a name and not with its square.
REFERENCE = re.compile(r"(?<![ _:-])[ _:-]+(REF|LE|AR|AVG|AVE|A1A2|M1M2|A1\+A2|M1\+M2|LM|CAR|G2)$")


def canonical(name: str) -> str:
    """Return the upper-case 10-10 name of a channel, equal for all spellings of one electrode.

    Only references that all channels share are dropped; bipolar channels keep their names.

    >>> [canonical(name) for name in ("EEG FP1-REF", "t3", "Fc5.", "EEG T5-LE", "F3-C3")]
    ['FP1', 'T7', 'FC5', 'P7', 'F3-C3']
    """
    name = " ".join(name.upper().split())
    name = PREFIX.sub("", name)
    name = REFERENCE.sub("", name)
    name = name.strip(" .")
    return NEW_NAMES.get(name, name)


def scalp_positions(
    positions: Sequence[tuple[float, float, float] | None],
) -> Float[np.ndarray, "channels 2"]:
    """Return positions on the unit head of `POSITIONS`; NaN for channels without one.

    positions: metres in MNE's head coordinates. The projection from the centre of the head is
    azimuthal and equidistant: the ears are at x = -1 and 1.
    """
    missing = (np.nan, np.nan, np.nan)
    located = [missing if position is None else position for position in positions]
    x, y, z = np.array(located, np.float64).reshape(-1, 3).T
    z = z - HEAD_CENTRE_Z
    y = y - _centre_y(x, y, z)
    angle = np.arctan2(np.hypot(x, y), z)
    radius = angle / EAR_ANGLE
    azimuth = np.arctan2(y, x)
    return np.stack([radius * np.cos(azimuth), radius * np.sin(azimuth)], axis=1)


def _centre_y(
    x: Float[np.ndarray, " channels"],
    y: Float[np.ndarray, " channels"],
    z: Float[np.ndarray, " channels"],
) -> float:
    """Return y of the centre of the sphere around (0, y, 0) that fits channels best, in metres.

    On it x² + y² + z² = 2 y y_centre + constant: half the slope of a regression on y, which is
    drawn to 0 where channels hardly differ in y.
    """
    is_known = ~np.isnan(y)
    if not is_known.any():
        return 0.0
    squares = (x**2 + y**2 + z**2)[is_known]
    deviation = y[is_known] - y[is_known].mean()
    return float(
        deviation @ squares / 2 / (deviation @ deviation + len(deviation) * CENTRE_PRIOR**2)
    )
