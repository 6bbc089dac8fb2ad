"""The demo's recordings: their law, their events, their files."""

import csv

import numpy as np
import pytest

from minsae_jax import UserError
from minsae_jax.eeg.montage import CHANNELS
from minsae_jax.eeg.recordings import open_windows, read_lengths
from minsae_jax.eeg.synthetic import SAMPLING_RATE, DemoConfig, recording, write_demo

GOLDEN_SAMPLES = [1.91393, 0.69934, -1.446]
GOLDEN_EVENTS = [("alpha", 90), ("spindle", 534), ("spike", 541)]
KINDS = {"alpha", "spindle", "slow_wave", "blink", "spike", "muscle"}


def test_the_law_has_not_moved():
    """The demo encoder was trained on it. Regenerate by printing these numbers, if the law is ever to change."""
    x, events = recording(0, 3000)
    assert x.shape == (3000, 19)
    assert x.dtype == np.float32
    np.testing.assert_allclose(x.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(x.std(0), 1, atol=1e-5)
    np.testing.assert_allclose(x[1000, [0, 9, 18]], GOLDEN_SAMPLES, atol=1e-5)
    assert [(e.kind, e.start) for e in events[:3]] == GOLDEN_EVENTS


def test_events_stand_out_where_they_are_said_to_be():
    """Amplitude on an event's channels during the event, against the same channels at other times."""
    x, events = recording(1, 60_000)
    assert {e.kind for e in events} == KINDS
    for kind, where in (("blink", ("FP1", "FP2")), ("spike", ("T3",)), ("muscle", ("T4",))):
        channels = [CHANNELS.index(c) for c in where]
        during = np.zeros(len(x), bool)
        for e in events:
            if e.kind == kind:
                assert e.channels == where
                during[e.start : e.stop] = True
        assert np.abs(x[during][:, channels]).mean() > 1.2 * np.abs(x[~during][:, channels]).mean()


def test_alpha_is_posterior_and_in_its_band():
    x, events = recording(2, 60_000)
    alpha = [e for e in events if e.kind == "alpha"]
    assert {"O1", "O2"} <= set(alpha[0].channels)
    o1 = CHANNELS.index("O1")
    power = np.mean(
        [
            np.abs(np.fft.rfft(x[e.start : e.start + 250, o1], 250)) ** 2
            for e in alpha
            if e.stop <= 60_000
        ],
        0,
    )
    hz = np.fft.rfftfreq(250, 1 / SAMPLING_RATE)
    assert 8 <= hz[4:][power[4:].argmax()] <= 12


def test_folder(tmp_path):
    folder = tmp_path / "data" / "tuhab_preprocessed"
    settings = DemoConfig(root_path=str(folder), patients=10, minutes=0.5)
    assert "15 recordings of 10 patients" in write_demo(settings)
    lengths = read_lengths(folder / "file_lengths_map.csv")
    assert set(lengths) == {p.name for p in folder.glob("*.npy")}
    assert all(len(np.load(folder / name)) == length for name, length in lengths.items())
    for split in ("train", "val", "test"):
        assert len(open_windows(folder, split, 42, 1000, 10, 19)) > 0
    with (folder / "events.csv").open() as f:
        rows = list(csv.DictReader(f))
    assert list(rows[0]) == ["recording", "event", "start", "stop", "channels"]
    for row in rows:
        assert 0 <= int(row["start"]) < int(row["stop"]) <= lengths[row["recording"]]
        assert set(row["channels"].split()) <= set(CHANNELS)
    assert [p.name for p in folder.parent.iterdir()] == ["tuhab_preprocessed"]


def test_again_and_otherwise(tmp_path):
    folder = tmp_path / "tuhab_preprocessed"
    settings = DemoConfig(root_path=str(folder), patients=10, minutes=0.5)
    write_demo(settings)
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert "already" in write_demo(settings)
    other = DemoConfig(root_path=str(folder), patients=10, minutes=0.5, seed=1)
    with pytest.raises(UserError, match="--overwrite"):
        write_demo(other)
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == before
    write_demo(DemoConfig(root_path=str(folder), patients=10, minutes=0.5, seed=1, overwrite=True))
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} != before
    (folder / "events.csv").unlink()
    write_demo(
        DemoConfig(root_path=str(folder), patients=10, minutes=0.5, seed=1)
    )  # what is damaged is written again
    assert (folder / "events.csv").exists()
    (folder / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"holds notes\.txt"):
            write_demo(DemoConfig(root_path=str(folder), overwrite=overwrite))
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="no demo"):
        write_demo(DemoConfig(root_path=str(tmp_path / "mine"), overwrite=True))
