"""The demo's recordings: their statistics, their events, their files."""

import csv
import resource
from dataclasses import replace
from os import mkfifo
from pathlib import Path

import numpy as np
import pytest

from minsae_jax import UserError
from minsae_jax.eeg.montage import CHANNELS
from minsae_jax.eeg.recordings import SAMPLING_RATE, open_windows, read_lengths
from minsae_jax.eeg.synthetic import DemoConfig, write_demo
from minsae_jax.eeg.synthetic_signals import recording

GOLDEN_SAMPLES = [1.91393, 0.69934, -1.446]
GOLDEN_EVENTS = [("alpha", 90), ("spindle", 534), ("spike", 541)]
KINDS = {"alpha", "spindle", "slow_wave", "blink", "spike", "muscle"}


def test_recordings_have_not_changed():
    """The demo encoder was trained on them. If the generator must change, print these again."""
    x, events = recording(0, 3000)
    assert x.shape == (3000, 19)
    assert x.dtype == np.float32
    np.testing.assert_allclose(x.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(x.std(0), 1, atol=1e-5)
    np.testing.assert_allclose(x[1000, [0, 9, 18]], GOLDEN_SAMPLES, atol=1e-5)
    assert [(e.kind, e.start) for e in events[:3]] == GOLDEN_EVENTS


def test_events_are_larger_than_the_background():
    """Compare amplitudes on an event's channels during the event and at other times."""
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


def test_more_spindles_change_nothing_else():
    """The recording with more spindles is the one without them outside the added ones."""
    x, events = recording(3, 30_000)
    more, all_events = recording(3, 30_000, spindle_factor=3.0)
    added = [event for event in all_events if event not in events]
    assert {event.kind for event in added} == {"spindle"}
    n_spindles = sum(event.kind == "spindle" for event in events)
    assert 1 < len(added) / n_spindles < 3
    assert sorted(all_events, key=str) == sorted(events + added, key=str)
    is_added = np.zeros(len(x), bool)
    for event in added:
        is_added[event.start : event.stop] = True
    np.testing.assert_array_equal(more[~is_added], x[~is_added])
    difference = more - x
    assert np.abs(difference[is_added]).max() > 1


def test_demo_folder_is_valid(tmp_path):
    folder = tmp_path / "data" / "tuhab_preprocessed"
    settings = DemoConfig(root_path=str(folder), patients=10, minutes=0.5)
    demo = write_demo(settings)
    lengths = read_lengths(folder / "file_lengths_map.csv")
    assert (demo.folder, demo.n_recordings, demo.n_patients) == (folder, 15, 10)
    assert demo.is_new
    assert demo.hours == pytest.approx(sum(lengths.values()) / 100 / 3600)
    assert set(lengths) == {p.name for p in folder.glob("*.npy")}
    for name, length in lengths.items():
        eeg, _ = recording([0, int(name[4:8]), int(name.split("_t")[1][:3])], length)
        np.testing.assert_array_equal(np.load(folder / name), eeg)
    for split in ("train", "val", "test"):
        assert len(open_windows(folder, split, 42, 1000, 10, 19)) > 0
    with (folder / "events.csv").open() as f:
        rows = list(csv.DictReader(f))
    assert demo.n_events == len(rows)
    assert list(rows[0]) == ["recording", "event", "start", "stop", "channels"]
    for row in rows:
        assert 0 <= int(row["start"]) < int(row["stop"]) <= lengths[row["recording"]]
        assert set(row["channels"].split()) <= set(CHANNELS)
    assert [p.name for p in folder.parent.iterdir()] == ["tuhab_preprocessed"]


@pytest.fixture
def settings(tmp_path):
    return DemoConfig(root_path=str(tmp_path / "tuhab_preprocessed"), patients=10, minutes=0.5)


def modification_times(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_complete_demo_is_not_written_again(settings):
    folder = write_demo(settings).folder
    before = modification_times(folder)
    again = write_demo(settings)
    assert not again.is_new
    assert again.n_recordings == 15
    assert modification_times(folder) == before


def test_other_settings_require_overwrite(settings):
    folder = write_demo(settings).folder
    before = modification_times(folder)
    other = replace(settings, seed=1)
    with pytest.raises(UserError, match="--overwrite"):
        write_demo(other)
    assert modification_times(folder) == before
    assert write_demo(replace(other, overwrite=True)).is_new
    assert modification_times(folder) != before


def test_incomplete_demo_is_written_again(settings):
    folder = write_demo(settings).folder
    (folder / "events.csv").unlink()
    assert write_demo(settings).is_new
    assert (folder / "events.csv").exists()


@pytest.mark.parametrize("damage", [Path.touch, mkfifo, lambda path: path.symlink_to("/dev/null")])
def test_recording_that_cannot_be_read_is_written_again(settings, damage):
    path = write_demo(settings).folder / "demo0009_s001_t001_preprocessed.npy"
    content = path.read_bytes()
    path.unlink()
    damage(path)
    assert write_demo(settings).is_new
    assert path.read_bytes() == content


def test_full_disk_is_named(settings, tmp_path):
    """As on a full disk: no file may be longer than 16 KiB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, before[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: .*/tuhab_preprocessed"):
            write_demo(settings)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("overwrite", [False, True])
def test_files_of_others_are_never_replaced(settings, tmp_path, overwrite):
    folder = write_demo(settings).folder
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"contains notes\.txt"):
        write_demo(replace(settings, overwrite=overwrite))
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="is not a demo"):
        write_demo(replace(settings, root_path=str(tmp_path / "mine"), overwrite=overwrite))


def test_labels_are_planted_without_changing_other_patients(tmp_path):
    plain = DemoConfig(root_path=str(tmp_path / "plain"), patients=10, minutes=2.0)
    labelled = replace(plain, root_path=str(tmp_path / "labelled"), labels=True)
    write_demo(plain)
    write_demo(labelled)
    assert not (tmp_path / "plain/labels.csv").exists()
    with (tmp_path / "labelled/labels.csv").open(newline="") as file:
        rows = {row["patient"]: row for row in csv.DictReader(file)}
    assert len(rows) == 10
    assert sum(row["more_spindles"] == "1" for row in rows.values()) == 5
    n_spindles = {"0": 0, "1": 0}
    with (tmp_path / "labelled/events.csv").open(newline="") as file:
        for event in csv.DictReader(file):
            has_more = rows[event["recording"].split("_")[0]]["more_spindles"]
            n_spindles[has_more] += event["event"] == "spindle"
    assert 2 < n_spindles["1"] / n_spindles["0"] < 4
    for name in read_lengths(tmp_path / "plain/file_lengths_map.csv"):
        same = (tmp_path / "plain" / name).read_bytes() == (
            tmp_path / "labelled" / name
        ).read_bytes()
        assert same == (rows[name.split("_")[0]]["more_spindles"] == "0")
    # A demo without its labels is incomplete, and written again.
    (tmp_path / "labelled/labels.csv").unlink()
    assert write_demo(labelled).is_new
    assert not write_demo(labelled).is_new
    with pytest.raises(UserError, match="a demo with other settings"):
        write_demo(replace(labelled, labels=False))
