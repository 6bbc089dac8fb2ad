"""Channel names are matched through their aliases, and positions projected onto the head."""

import time

import numpy as np
import pytest

from minsae_jax.eeg.description import TUH
from minsae_jax.eeg.montage import CHANNELS, POSITIONS, canonical, scalp_positions


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Fp1", "FP1"),
        ("EEG FP1-REF", "FP1"),
        ("EEG  T6-LE", "P8"),
        ("eeg_cz", "CZ"),
        ("EEG_Fp1-REF", "FP1"),
        ("EEGFp1", "FP1"),
        ("EEGT3-REF", "T7"),
        ("EEGFT10 LE", "FT10"),
        ("EEGC3-P3", "C3-P3"),
        ("EEG001", "EEG001"),
        ("EEG1", "EEG1"),
        ("EEGA1", "EEGA1"),
        ("EEGF11", "EEGF11"),
        ("EEGC3A", "EEGC3A"),
        ("EEGPOz.", "POZ"),
        ("POL T3", "T7"),
        ("T7", "T7"),
        ("Af7.", "AF7"),
        ("O1-AVG", "O1"),
        ("EEG Fz-A1A2", "FZ"),
        ("C3-A2", "C3-A2"),
        ("EEG C3-P3", "C3-P3"),
        ("ECG", "ECG"),
        ("", ""),
    ],
)
def test_spellings_of_one_electrode_are_equal(name, expected):
    assert canonical(name) == expected


def test_the_corpus_has_19_electrodes():
    assert len({canonical(name) for name in CHANNELS}) == 19


def test_projection_of_measured_positions_resembles_the_drawn_head():
    projected = scalp_positions(TUH.positions)
    assert np.abs(projected - POSITIONS).max() < 0.15
    np.testing.assert_allclose(projected[[7, 11], 0], [-1, 1], atol=0.06)  # T3 and T4


def test_projection_is_equidistant_along_meridians():
    angle = np.deg2rad([0, 47.5, 95])
    radius = 0.095
    zeros = np.zeros(3)
    xyz = np.stack([radius * np.sin(angle), zeros, 0.04 + radius * np.cos(angle)], axis=1)
    flat = scalp_positions([*map(tuple, xyz.tolist()), None])
    np.testing.assert_allclose(flat[:3], [[0, 0], [0.5, 0], [1, 0]], atol=1e-9)
    assert np.isnan(flat[3]).all()


@pytest.mark.parametrize("forward", [0.0, 0.015])
def test_heads_in_front_of_the_point_between_the_ears_are_centred(forward):
    """A ring of channels around the vertex; MNE's default montage is 15 mm in front."""
    angle = 2 * np.pi * np.arange(16) / 16
    ring = np.stack([0.09 * np.sin(angle), forward + 0.09 * np.cos(angle), np.full(16, 0.05)], 1)
    vertex = (0.0, forward, 0.135)
    flat = scalp_positions([*map(tuple, ring.tolist()), vertex])
    assert abs(flat[-1, 1]) < 0.02
    np.testing.assert_allclose(np.hypot(*flat[:-1].T), np.hypot(*flat[0]), atol=0.02)


def test_few_channels_do_not_move_the_head_far():
    """Three channels in a row, whose heights say nothing about the centre's place."""
    row = [(-0.065, 0.023, 0.104), (-0.0014, 0.028, 0.140), (0.065, 0.024, 0.104)]
    assert np.abs(scalp_positions(row)[:, 1] - 0.1).max() < 0.1


@pytest.mark.parametrize("name", ["- " * 100_000, "-" * 200_000 + "x", "EEG " * 50_000])
def test_long_names_take_little_time(name):
    """With time proportional to the square of the length, these took minutes."""
    started = time.process_time()
    canonical(name)
    assert time.process_time() - started < 5
