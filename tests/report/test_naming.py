"""Names of features: regions, suggestions and labels.csv."""

import numpy as np
import pytest

from minsae_jax import UserError
from minsae_jax.eeg.montage import CHANNELS, POSITIONS
from minsae_jax.report.describe import DEFAULT_BANDS
from minsae_jax.report.naming import read_labels, region, suggest_name


def test_suggestion_has_region_band_and_limits():
    back = np.where(POSITIONS[:, 1] < -0.5, 4.0, 0.3)
    assert suggest_name(DEFAULT_BANDS, back, "alpha", POSITIONS) == "posterior alpha, 8–13 Hz"
    assert (
        suggest_name(DEFAULT_BANDS, np.ones(19), "broadband", POSITIONS) == "widespread broadband"
    )
    assert suggest_name(DEFAULT_BANDS, np.ones(4), "alpha", None) == "alpha, 8–13 Hz"
    assert suggest_name(DEFAULT_BANDS, back, "", POSITIONS) == "posterior"


@pytest.mark.parametrize(
    ("channels", "name"),
    [
        (("O1", "O2", "PZ"), "posterior"),
        (("FP1", "FP2"), "frontal"),
        (("T4",), "right temporal"),
        (("T3", "T3"), "left temporal"),
        (("CZ",), "central"),
        (("F3", "FP1", "F7"), "left frontal"),
        ((), "widespread"),
    ],
)
def test_region_of_the_most_active_channels(channels, name):
    ratio = np.full(len(CHANNELS), 0.5 if channels else 1.0)
    for channel in channels:
        ratio[CHANNELS.index(channel)] = 5.0
    assert region(ratio, POSITIONS) == name


def test_labels(tmp_path):
    path = tmp_path / "labels.csv"
    assert read_labels(path) == {}
    path.write_text('feature,label,note\n12,alpha,\n7,"eyes, closed",sure\n')
    assert read_labels(path) == {12: ("alpha", ""), 7: ("eyes, closed", "sure")}
    path.write_text("feature,name\nx,y\n")
    with pytest.raises(UserError, match="must have the columns feature, label and note"):
        read_labels(path)
