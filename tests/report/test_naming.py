"""Names of features: regions, suggestions and labels.csv."""

import numpy as np
import pytest

from minsae_jax import UserError
from minsae_jax.eeg.montage import CHANNELS, POSITIONS, scalp_positions
from minsae_jax.eeg.prepare.channels import montage_positions
from minsae_jax.report.context import DEFAULT_BANDS
from minsae_jax.report.naming import (
    fits_region,
    lobes_of,
    read_feature_labels,
    region,
    suggest_name,
)


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
        (("T3", "T4"), "temporal"),
        (("CZ",), "central"),
        (("T6", "O2"), "right posterior"),
        (("F3", "FP1", "F7"), "left frontal"),
        ((), "widespread"),
    ],
)
def test_region_of_the_most_active_channels(channels, name):
    ratio = np.full(len(CHANNELS), 0.5 if channels else 1.0)
    for channel in channels:
        ratio[CHANNELS.index(channel)] = 5.0
    assert region(ratio, POSITIONS) == name


@pytest.mark.parametrize(
    "montage", ["standard_1005", "standard_1020", "fsaverage_1005", "biosemi64", "easycap-M1"]
)
def test_electrodes_are_in_the_lobe_of_their_name(montage):
    lobes = {"F": "frontal", "C": "central", "T": "temporal", "P": "posterior", "O": "posterior"}
    names = ("Fp1", "Fp2", "F7", "F3", "Fz", "F4", "F8", "T7", "C3", "Cz", "C4", "T8")
    names += ("P7", "P3", "Pz", "P4", "P8", "O1", "O2")
    positions = scalp_positions(montage_positions(names, montage))
    assert lobes_of(positions).tolist() == [lobes[name[0]] for name in names]


@pytest.mark.parametrize("channel", CHANNELS)
def test_the_strongest_channel_is_in_the_region(channel):
    """Activity falls off with distance, as it does on the scalp."""
    i = CHANNELS.index(channel)
    ratio = 5 * np.exp(-((POSITIONS - POSITIONS[i]) ** 2).sum(1) / 0.3)
    name = region(ratio, POSITIONS)
    assert fits_region(name, np.array([i]), POSITIONS).all()
    if channel in ("T3", "T4"):
        assert name == ("left temporal" if channel == "T3" else "right temporal")


def test_activity_everywhere_but_at_one_channel_is_widespread():
    ratio = np.full(19, 2.0)
    ratio[CHANNELS.index("CZ")] = 0.2
    assert region(ratio, POSITIONS) == "widespread"


def test_labels_of_another_member_are_left_out(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("member,feature,label,note\na,1,alpha,\nb,1,beta,\n,2,both,\n")
    assert read_feature_labels(path, 16, "a") == {1: ("alpha", ""), 2: ("both", "")}
    assert read_feature_labels(path, 16, "b") == {1: ("beta", ""), 2: ("both", "")}


def test_labels_without_a_member_warn_if_the_member_changed(tmp_path):
    path = tmp_path / "labels.csv"
    assert read_feature_labels(path, 16, "b", before="a") == {}
    path.write_text("feature,label,note\n1,alpha,\n")
    for before in (None, "b"):
        assert read_feature_labels(path, 16, "b", before) == {1: ("alpha", "")}
    with pytest.warns(UserWarning, match="the report before was about a"):
        assert read_feature_labels(path, 16, "b", before="a") == {1: ("alpha", "")}
    path.write_text("feature,label,note,member\n1,alpha,,a\n")
    assert read_feature_labels(path, 16, "b", before="a") == {}
    path.write_bytes("feature,läbel,note\n".encode("latin-1"))
    message = "must have the columns feature, label and note, .* must be UTF-8, got the byte 0xe4"
    with pytest.raises(UserError, match=message):
        read_feature_labels(path, 16, "b", before="a")


def test_labels(tmp_path):
    path = tmp_path / "labels.csv"
    assert read_feature_labels(path, 16) == {}
    path.write_text('feature,label,note\n12,alpha,\n7,"eyes, closed",sure\n')
    assert read_feature_labels(path, 16) == {12: ("alpha", ""), 7: ("eyes, closed", "sure")}
    with pytest.warns(UserWarning, match="names feature 12, but the member has features 0 to 11"):
        assert read_feature_labels(path, 12) == {7: ("eyes, closed", "sure")}
    path.write_text("feature,label,note\n-1,alpha,\n")
    with pytest.raises(UserError, match="feature -1 is below 0"):
        read_feature_labels(path, 16)
    path.write_text("feature,name\nx,y\n")
    with pytest.raises(UserError, match="must have the columns feature, label and note"):
        read_feature_labels(path, 16)


def channel_ratios(rng, n_active, share, burst=1):
    """Exponential activations of active tokens on the channels, over their mean."""
    counts = burst * rng.multinomial(n_active // burst, share)
    sums = np.array([rng.exponential(size=count).sum() for count in counts])
    return sums / sums.mean()


@pytest.mark.parametrize("n_active", [16, 64, 500, 3000])
def test_random_tokens_have_no_region(n_active):
    """Without the number of tokens, 75 % of features of 64 random tokens had one."""
    rng = np.random.default_rng(n_active)
    everywhere = np.full(19, 1 / 19)
    ratios = [channel_ratios(rng, n_active, everywhere) for _ in range(200)]
    names = [region(ratio, POSITIONS, n_active) for ratio in ratios]
    assert names.count("widespread") >= 188


def test_few_tokens_of_a_region_name_it():
    rng = np.random.default_rng(0)
    is_posterior = POSITIONS[:, 1] < -0.35
    share = np.where(is_posterior, 6.0, 1.0)
    for _ in range(50):
        ratio = channel_ratios(rng, 300, share / share.sum())
        assert "posterior" in region(ratio, POSITIONS, 300)
