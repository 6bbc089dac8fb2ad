"""Channels of the international 10-20 system in the TUH corpus's order, and frequency bands."""

import numpy as np

# Old names: T3, T4, T5 and T6 are T7, T8, P7 and P8 of the newer 10-10 system.
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

# Name, lower and upper limit in Hz.
BANDS = (
    ("delta", 1.0, 4.0),
    ("theta", 4.0, 8.0),
    ("alpha", 8.0, 13.0),
    ("beta", 13.0, 25.0),
    ("gamma", 25.0, 35.0),
)
