"""`prepare` against MNE's own pipeline, on files of every format that these tests write."""

import csv
import itertools
import json
import logging
import re
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, date, datetime, time
from pathlib import Path

import edfio
import mne
import numpy as np
import pytest

from minsae_jax import UserError
from minsae_jax.eeg.description import read_description
from minsae_jax.eeg.montage import CHANNELS
from minsae_jax.eeg.recordings import open_windows, read_lengths
from minsae_jax.evaluation.events import read_events
from tests.eeg.eeg_files import NEW_NAMES, SECONDS, load, make_raw, run, write_file

FORMATS = ("edf", "bdf", "vhdr", "set", "fif")


def mne_pipeline(path: Path, missing: Sequence[str] = (), flat: Sequence[str] = ()) -> np.ndarray:
    """Return [channels, samples] in µV as the TUH corpus is preprocessed, before the z-score."""
    raw = mne.io.read_raw(path, preload=True, verbose="ERROR")
    names = {name: name.removeprefix("EEG ").removesuffix("-REF").title() for name in raw.ch_names}
    raw.rename_channels(names)
    raw.pick([name for name in NEW_NAMES if name not in missing])
    for name in missing:
        info = mne.create_info([name], raw.info["sfreq"], "eeg", verbose="ERROR")
        zeros = mne.io.RawArray(np.zeros((1, len(raw.times))), info, verbose="ERROR")
        raw.add_channels([zeros], force_update_info=True)
    raw.reorder_channels(list(NEW_NAMES))
    raw.set_montage("colin27_1005", verbose="ERROR")
    raw.info["bads"] = [*missing, *flat]
    if raw.info["bads"]:
        raw.interpolate_bads(verbose="ERROR")
    raw.set_eeg_reference("average", verbose="ERROR")
    raw.resample(100, verbose="ERROR")
    return raw.get_data() * 1e6


def z_score(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(axis=1, keepdims=True)) / x.std(axis=1, keepdims=True)


@pytest.mark.parametrize("ending", FORMATS)
def test_default_equals_the_pipeline_of_mne(tmp_path, ending):
    name = f"p1_raw.{ending}" if ending == "fif" else f"p1.{ending}"
    path = write_file(make_raw(), tmp_path / name)
    prepared = run(path, tmp_path / "out")
    expected = mne_pipeline(path)
    recording = load(tmp_path / "out")
    assert recording.dtype == np.float32
    assert recording.shape == (SECONDS * 100, 19)
    np.testing.assert_allclose(recording.T, z_score(expected), rtol=1e-6, atol=1e-6)
    described = read_description(tmp_path / "out")
    (of_recording,) = described.recordings.values()
    np.testing.assert_allclose(of_recording.mean_uv, expected.mean(axis=1), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(of_recording.sd_uv, expected.std(axis=1), rtol=1e-6)
    assert described.channels == CHANNELS
    assert of_recording.original_sampling_rate == 256
    assert of_recording.source == name
    events = [(e.kind, e.start, e.stop) for e in prepared.records[0].events]
    assert events == [("spike", 200, 250), ("blink", 550, 650), ("end", 1980, 2000)]


def test_missing_and_flat_channels_are_interpolated_as_mne_does(tmp_path):
    raw = make_raw()
    raw.drop_channels(["Cz"])
    raw._data[raw.ch_names.index("P4")] = 3e-5
    path = write_file(raw, tmp_path / "a.bdf")
    prepared = run(path, tmp_path / "out")
    expected = mne_pipeline(path, missing=["Cz"], flat=["P4"])
    np.testing.assert_allclose(load(tmp_path / "out").T, z_score(expected), rtol=1e-6, atol=1e-6)
    (described,) = read_description(tmp_path / "out").recordings.values()
    assert described.bad_channels == ("P4",)
    assert described.interpolated_channels == ("CZ", "P4")
    findings = "\n".join(prepared.findings())
    assert "channels missing: CZ (in a_s001_t000_preprocessed.npy)" in findings
    assert "channels flat: P4" in findings


def labram(raw: mne.io.BaseRaw) -> np.ndarray:
    """dataset_maker/shock/utils/eegUtils.py and engine_for_pretraining.py of 935963004/LaBraM."""
    raw.filter(0.1, 75, verbose="ERROR").notch_filter(50, verbose="ERROR")
    return raw.resample(200, verbose="ERROR").get_data(units="uV") / 100


def cbramod(raw: mne.io.BaseRaw) -> np.ndarray:
    """preprocessing/preprocessing_tueg_for_pretraining.py of wjq-learning/CBraMod."""
    raw.resample(200, verbose="ERROR").filter(0.3, 75, verbose="ERROR")
    raw.notch_filter(60, verbose="ERROR")
    order = "Fp1 Fp2 F3 F4 C3 C4 P3 P4 O1 O2 F7 F8 T7 T8 P7 P8 Fz Cz Pz"
    return raw.reorder_channels(order.split()).get_data(units="uV") / 100


def eegpt(raw: mne.io.BaseRaw) -> np.ndarray:
    """datasets/pretrain/prepare_pretrain_dataset.py of BINE022/EEGPT; MNE's resampling."""
    x = raw.resample(256, verbose="ERROR").get_data() * 1e3
    return x - x.mean(axis=0)


def reve(raw: mne.io.BaseRaw) -> np.ndarray:
    """arXiv:2510.21585, without the clipping at 15 SD."""
    raw.filter(0.5, 99.5, verbose="ERROR").resample(200, verbose="ERROR")
    return z_score(raw.get_data(units="uV"))


@pytest.mark.parametrize(
    ("preset", "unit"), [(labram, "100 uV"), (cbramod, "100 uV"), (eegpt, "mV"), (reve, "SD")]
)
def test_preset_equals_the_pipeline_of_the_model(tmp_path, preset, unit):
    # At 200 Hz, filters before and after resampling to 200 Hz are the same.
    path = write_file(make_raw(rate=200.0), tmp_path / "a.edf")
    run(path, tmp_path / "out", preset=preset.__name__)
    expected = preset(mne.io.read_raw(path, preload=True, verbose="ERROR"))
    np.testing.assert_allclose(load(tmp_path / "out").T, expected, rtol=1e-6, atol=1e-6)
    described = read_description(tmp_path / "out")
    assert described.unit == unit
    assert described.sampling_rate == (256 if preset is eegpt else 200)


def test_labram_preset_filters_before_it_resamples(tmp_path):
    path = write_file(make_raw(rate=256.0), tmp_path / "a.edf")
    run(path, tmp_path / "out", preset="labram")
    expected = labram(mne.io.read_raw(path, preload=True, verbose="ERROR"))
    np.testing.assert_allclose(load(tmp_path / "out").T, expected, rtol=1e-6, atol=1e-6)


def test_channels_reference_and_crop(tmp_path):
    path = write_file(make_raw((*NEW_NAMES, "M1", "M2")), tmp_path / "a.bdf")
    settings = {"channels": ("O2", "Fz"), "reference": ("M1", "M2"), "sampling_rate": 256.0}
    run(path, tmp_path / "out", **settings, normalize="uV", crop=2.0)
    raw = mne.io.read_raw(path, preload=True, verbose="ERROR")
    raw.set_eeg_reference(["M1", "M2"], verbose="ERROR").pick(["O2", "Fz"])
    expected = raw.get_data(["O2", "Fz"], start=512, stop=18 * 256, units="uV")
    np.testing.assert_allclose(load(tmp_path / "out").T, expected, rtol=1e-6, atol=1e-6)
    with (tmp_path / "out/events.csv").open(newline="") as file:
        events = [(row["event"], row["start"], row["channels"]) for row in csv.DictReader(file)]
    assert events == [("spike", "0", "O2 Fz"), ("blink", str(round(3.5 * 256)), "O2 Fz")]


def test_events_of_channels_with_spaces_are_read_back(tmp_path):
    """`evaluate` finds the columns of the channels that an annotation names."""
    raw = make_raw(("Fz", "Resp Belt", 'Cz "left"'))
    names = [("Resp Belt", 'Cz "left"'), ("Fz",), ()]
    onsets = [2.0, 3.0, 4.0]
    raw.set_annotations(mne.Annotations(onsets, 1.0, ["breath", "blink", "all"], ch_names=names))
    path = write_file(raw, tmp_path / "a_raw.fif")
    run(path, tmp_path / "out", channels=tuple(raw.ch_names), reference=("none",), normalize="uV")
    events = read_events(tmp_path / "out")
    columns = {kind: event.channels for kind, (event,) in events.items()}
    assert columns == {"breath": (1, 2), "blink": (0,), "all": (0, 1, 2)}
    assert load(tmp_path / "out").shape == (2000, 3)


def test_markers_of_brainvision_and_short_events_are_kept(tmp_path):
    """BrainVision Recorder writes markers with a size of one sample."""
    raw = make_raw(rate=500.0)
    raw.set_annotations(mne.Annotations([2.0], [0.0], ["Stimulus/S  1"]))
    path = write_file(raw, tmp_path / "a.vhdr")
    # Number=type, text, sample from 1, size in samples, channel from 1 or 0 for all
    markers = ["Stimulus,S  1,1001,1,0", "Stimulus,S  2,4501,1,0", "Response,R  1,9903,2,0"]
    lines = [f"Mk{number}={marker}" for number, marker in enumerate(markers, start=1)]
    head = path.with_suffix(".vmrk").read_text().partition("Mk1=")[0]
    path.with_suffix(".vmrk").write_text(head + "\n".join(lines) + "\n")
    run(path, tmp_path / "out", event_seconds=0.5)
    with (tmp_path / "out/events.csv").open(newline="") as file:
        events = [(row["event"], row["start"], row["stop"]) for row in csv.DictReader(file)]
    # At 100 Hz; the last one is of 4 ms, and in the file at 19.804 s.
    expected = [("Stimulus/S 1", "200", "250"), ("Stimulus/S 2", "900", "950")]
    assert events == [*expected, ("Response/R 1", "1980", "1981")]


def make_discontinuous(path: Path, gap: float) -> None:
    """Move the second half of an EDF+ file of 20 records of 1 s by some seconds.

    The annotation channel is the last one; header fields of 8 characters, see edfplus.info.
    """
    content = bytearray(path.read_bytes())
    n_channels = int(content[252:256])
    first_size = 256 + 216 * n_channels
    places = [first_size + 8 * i for i in range(n_channels)]
    sizes = [2 * int(content[place : place + 8]) for place in places]
    header = int(content[184:192])
    content[192:197] = b"EDF+D"
    for record in range(10, 20):
        end = header + (record + 1) * sum(sizes)
        texts = bytes(content[end - sizes[-1] : end]).rstrip(b"\0") + b"\0"

        def later(match: re.Match) -> bytes:
            return b"+%g" % (float(match[0]) + gap)

        moved = re.sub(rb"\+[\d.]+", later, texts)
        content[end - sizes[-1] : end] = moved.ljust(sizes[-1], b"\0")
        assert len(moved) <= sizes[-1]
    path.write_bytes(content)


@pytest.mark.parametrize("gap", [3.5, 1000.0])
def test_events_after_a_gap_of_a_discontinuous_file_keep_their_places(tmp_path, gap):
    raw = make_raw()
    # The first one makes room in all records.
    kinds = ["of many words", "lost", "b", "c"]
    raw.set_annotations(mne.Annotations([2.0, 4.0, 9.5, 15.0], [0.5, 0.5, 1.0, 0.5], kinds))
    path = write_file(raw, tmp_path / "x.edf")
    run(path, tmp_path / "whole")
    make_discontinuous(path, gap)
    in_gap = path.read_bytes().replace(b"+4\x150.5\x14lost", b"+12\x150.5\x14los")
    path.write_bytes(in_gap)
    prepared = run(path, tmp_path / "out")
    np.testing.assert_array_equal(load(tmp_path / "out"), load(tmp_path / "whole"))
    with (tmp_path / "out/events.csv").open(newline="") as file:
        events = [(row["event"], row["start"], row["stop"]) for row in csv.DictReader(file)]
    # The second one ends in the gap.
    assert events == [("of many words", "200", "250"), ("b", "950", "1000"), ("c", "1500", "1550")]
    finding, *_ = prepared.findings()
    assert finding.startswith("gaps across which windows are cut: 1 (in")


def write_edf(path: Path, signals: Sequence[tuple], notes: Sequence[tuple] = (), **fields) -> Path:
    """Write channels (name, µV, rate) and annotations (onset, duration, text)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    channels = [
        edfio.EdfSignal(x, sampling_frequency=rate, label=name, physical_dimension="uV")
        for name, x, rate in signals
    ]
    annotations = [edfio.EdfAnnotation(*note) for note in notes]
    edfio.Edf(channels, annotations=annotations, **fields).write(path)
    return path


def test_fast_channels_that_are_not_used_leave_the_others_unchanged(tmp_path):
    """MNE resamples all channels of a file to the highest rate, and a part of it wrongly."""
    raw = make_raw(rate=250.0)
    eeg = list(zip(NEW_NAMES, raw.get_data(units="uV"), [250] * 19, strict=True))
    ecg = np.random.default_rng(0).normal(0, 100, SECONDS * 1000)
    write_edf(tmp_path / "alone.edf", eeg)
    notes = [(3.0, 1.0, "spike@@Fz"), (5.0, 1.0, "beat@@ECG")]
    write_edf(tmp_path / "mixed.edf", [*eeg, ("ECG", ecg, 1000)], notes)
    for crop in (0.0, 3.3):
        alone = run(tmp_path / "alone.edf", tmp_path / f"alone{crop}", crop=crop)
        mixed = run(tmp_path / "mixed.edf", tmp_path / f"mixed{crop}", crop=crop)
        np.testing.assert_array_equal(
            load(tmp_path / f"mixed{crop}"), load(tmp_path / f"alone{crop}")
        )
        assert mixed.records[0].unused_channels == ("ECG",)
        assert mixed.records[0].description.original_sampling_rate == 250
        assert alone.records[0].n_samples == round((SECONDS - 2 * crop) * 100)
    # The annotations of other channels are left out; the first one was cut at 3.3 s.
    (event,) = mixed.records[0].events
    assert (event.kind, event.channels, event.start, event.stop) == ("spike", ("FZ",), 0, 70)


def with_unit(path: Path, unit: bytes, n_channels: int, factor: float = 1.0) -> Path:
    """Replace the unit of the first channels of an EDF file, and multiply their limits."""
    content = bytearray(path.read_bytes())
    n_total = int(content[252:256])

    def field(offset: int, i: int) -> slice:  # of 8 characters, see edfplus.info
        start = 256 + offset * n_total + 8 * i
        return slice(start, start + 8)

    for i in range(n_channels):
        content[field(96, i)] = unit.ljust(8)
        for limit in (104, 112) if factor != 1 else ():
            value = float(content[field(limit, i)]) * factor
            content[field(limit, i)] = f"{value:.6f}"[:8].encode().ljust(8)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("unit", "factor"),
    [
        *[(unit, 1.0) for unit in (b"uv", b"UV", b"uV\0\0", b"uVolt", "µV".encode())],
        *[("μV".encode(code), 1.0) for code in ("utf-8", "shift-jis", "gbk")],
        *[("µV".encode(code), 1.0) for code in ("latin-1", "cp437")],
        *[(unit, 1e-3) for unit in (b"mV", b"mv", b"MV")],
    ],
)
def test_units_of_edf_files_are_read_in_all_spellings(tmp_path, unit, factor):
    path = write_file(make_raw(), tmp_path / "a.edf")
    run(path, tmp_path / "expected", normalize="uV")
    run(with_unit(path, unit, 4, factor), tmp_path / "out", normalize="uV")
    # The limits in mV have fewer digits.
    tolerance = {"rtol": 1e-3, "atol": 0.1} if factor < 1 else {"rtol": 1e-6, "atol": 1e-5}
    np.testing.assert_allclose(load(tmp_path / "out"), load(tmp_path / "expected"), **tolerance)


@pytest.mark.parametrize("unit", [b".V", b"", b"%"])
def test_electrodes_in_an_unknown_unit_are_interpolated(tmp_path, unit):
    """MNE reads them as volts: in the average, they would replace all other channels."""
    raw = make_raw((*NEW_NAMES, "Belt"))
    path = write_file(raw, tmp_path / "a.edf")
    expected = mne_pipeline(path, missing=["Fp1", "Fp2"])
    prepared = run(with_unit(path, unit, 2), tmp_path / "out")
    np.testing.assert_allclose(load(tmp_path / "out").T, z_score(expected), rtol=1e-5, atol=1e-5)
    (finding, _) = prepared.findings()
    assert finding.startswith("channels with an SD above 10,000 µV: FP1 FP2 (in a_s001")
    # A channel that is not of an electrode is used as it is.
    path = with_unit(write_file(make_raw(("Belt", "Fz", "Cz")), tmp_path / "b.edf"), unit, 1)
    settings = {"channels": ("Belt", "Fz", "Cz"), "reference": ("none",)}
    prepared = run(path, tmp_path / "belt", **settings)
    assert prepared.records[0].description.bad_channels == ()
    assert any("SD above 10,000 µV: Belt" in finding for finding in prepared.findings())
    with pytest.raises(UserError, match="has a flat or bad reference channel: BELT"):
        run(path, tmp_path / "no", channels=("Fz", "Cz"), reference=("Belt",))


def test_used_channels_of_different_rates_are_cut_at_one_time(tmp_path):
    raw = make_raw(("Fz", "Cz"), rate=250.0)
    fz, cz = raw.get_data(units="uV")
    path = write_edf(tmp_path / "a.edf", [("Fz", fz, 250), ("Cz", cz[::2], 125)])
    settings = {"channels": ("Cz", "Fz"), "sampling_rate": 250.0, "normalize": "uV"}
    run(path, tmp_path / "out", **settings, reference=("none",), crop=3.3)
    whole = mne.io.read_raw(path, preload=True, verbose="ERROR")
    expected = whole.get_data(["Cz", "Fz"], start=825, stop=SECONDS * 250 - 825, units="uV")
    np.testing.assert_allclose(load(tmp_path / "out").T, expected, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("gap", [None, 100.0])
def test_annotations_in_latin_1_are_read(tmp_path, gap):
    raw = make_raw()
    # The longest text is first: it makes room in all records.
    raw.set_annotations(mne.Annotations([2.0, 9.0], [0.5, 0.5], ["Anfall am Morgen", "Anfall"]))
    path = write_file(raw, tmp_path / "x.edf")
    if gap:
        make_discontinuous(path, gap)
    path.write_bytes(path.read_bytes().replace(b"Anfall", "Anfäll".encode("latin-1")))
    (record,) = run(path, tmp_path / "out").records
    events = [(event.kind, event.start) for event in record.events]
    assert events == [("Anfäll am Morgen", 200), ("Anfäll", 900)]


def test_markers_of_gaps_are_no_events(tmp_path):
    """EEGLAB marks cut parts, with their lengths, and BrainVision each start."""
    raw = make_raw()
    marks = [(0.0, 0.0, "boundary"), (5.0, 7.0, "boundary"), (9.0, 0.0, "New Segment/")]
    marks.append((7.0, 1.0, "BAD_ACQ_SKIP"))
    onsets, durations, kinds = zip(*marks, (8.0, 1.0, "go"), strict=True)
    raw.set_annotations(mne.Annotations(onsets, durations, kinds))
    prepared = run(write_file(raw, tmp_path / "a.set"), tmp_path / "out")
    assert [(e.kind, e.start, e.stop) for e in prepared.records[0].events] == [("go", 800, 900)]
    assert prepared.findings()[0].startswith("gaps across which windows are cut: 3 (in")


def test_hypnogram_gives_events_to_the_recording_of_its_patient_and_session(tmp_path):
    """Named as in Sleep-EDF; the second one starts 5 s after its recording."""
    rng = np.random.default_rng(0)
    for night, delay in (("SC4011", 0), ("SC4012", 5)):
        signals = [(name, rng.normal(0, 20, 2000), 100) for name in ("EEG Fpz-Cz", "EEG Pz-Oz")]
        start = {"recording": edfio.Recording(startdate=date(1989, 4, 24))}
        write_edf(tmp_path / f"eeg/{night}E0-PSG.edf", signals, starttime=time(16, 13), **start)
        stages = [(0.0, 4.0, "Sleep stage W"), (4.0, 20.0, "Sleep stage 2")]
        path = tmp_path / f"eeg/{night}EC-Hypnogram.edf"
        write_edf(path, [], stages, starttime=time(16, 13, delay), **start)
    settings = {"channels": ("Fpz-Cz", "Pz-Oz"), "reference": ("none",)}
    with pytest.raises(UserError, match=r"Hypnogram.edf contains annotations and no signals"):
        run(tmp_path / "eeg", tmp_path / "out", **settings)
    settings["patient_pattern"] = r"SC4(?P<patient>\d\d)(?P<session>\d)"
    prepared = run(tmp_path / "eeg", tmp_path / "nights", **settings)
    events = {
        record.name.removesuffix("_preprocessed.npy"): [
            (event.kind, event.start, event.stop) for event in record.events
        ]
        for record in prepared.records
    }
    assert events == {
        "01_s001_t000": [("Sleep stage W", 0, 400), ("Sleep stage 2", 400, 2000)],
        "01_s002_t000": [("Sleep stage W", 500, 900), ("Sleep stage 2", 900, 2000)],
    }
    assert run(tmp_path / "eeg", tmp_path / "nights", **settings).n_new == 0
    path.touch()  # a changed hypnogram
    assert run(tmp_path / "eeg", tmp_path / "nights", **settings).n_new == 1


def test_hypnogram_of_a_recording_that_starts_after_its_acquisition(tmp_path):
    """In FIF, the date is that of the acquisition, which can have begun before the recording."""
    raw = make_raw(seconds=50)
    raw.set_meas_date(datetime(2020, 1, 1, 10, tzinfo=UTC))
    write_file(raw.crop(tmin=30), tmp_path / "eeg/p_s001_t000.fif")
    start = {"recording": edfio.Recording(startdate=date(2020, 1, 1)), "starttime": time(10)}
    write_edf(tmp_path / "eeg/p_s001_t001.edf", [], [(36.0, 2.0, "stage")], **start)
    (record,) = run(tmp_path / "eeg", tmp_path / "out").records
    events = [(event.kind, event.start, event.stop) for event in record.events]
    assert ("stage", 600, 800) in events


@pytest.mark.parametrize("gap", [None, 100.0])
def test_hypnogram_of_another_date_is_reported(tmp_path, gap):
    raw = make_raw()
    raw.set_annotations(mne.Annotations([2.0], [0.5], ["a long text that makes room"]))
    path = write_file(raw, tmp_path / "eeg/p_s001_t000.edf")
    if gap:
        make_discontinuous(path, gap)
    for day, n_outside in ((1, 0), (2, 1)):
        start = {"recording": edfio.Recording(startdate=date(1985, 1, day)), "starttime": time(0)}
        write_edf(tmp_path / "eeg/p_s001_t001.edf", [], [(6.0, 2.0, "stage")], **start)
        prepared = run(tmp_path / "eeg", tmp_path / str(day))
        line = "files of annotations that are all before or after the recording"
        assert sum(finding.startswith(line) for finding in prepared.findings()) == n_outside
        assert ("stage" in [event.kind for event in prepared.records[0].events]) == (day == 1)


@pytest.mark.parametrize("gap", [None, 100.0])
def test_annotations_of_several_lines_are_read_and_those_without_a_text_are_not(tmp_path, gap):
    raw = make_raw()
    texts = ["a long text that makes room", "two:lines", ":", "last"]
    raw.set_annotations(mne.Annotations([2.0, 4.0, 6.0, 8.0], [0.5] * 4, texts))
    path = write_file(raw, tmp_path / "x.edf")
    if gap:
        make_discontinuous(path, gap)
    content = path.read_bytes().replace(b"two:lines", b"two\nlines")
    path.write_bytes(content.replace(b"\x14:\x14", b"\x14 \x14"))
    (record,) = run(path, tmp_path / "out").records
    events = [(event.kind, event.start, event.stop) for event in record.events]
    assert events == [(texts[0], 200, 250), ("two lines", 400, 450), ("last", 800, 850)]


def test_upsampling_and_low_pass(tmp_path):
    path = write_file(make_raw(rate=80.0), tmp_path / "a.bdf")
    prepared = run(path, tmp_path / "out", h_freq=30.0)
    raw = mne.io.read_raw(path, preload=True, verbose="ERROR")
    raw.filter(None, 30, verbose="ERROR").set_eeg_reference("average", verbose="ERROR")
    expected = z_score(raw.resample(100, verbose="ERROR").get_data())
    np.testing.assert_allclose(load(tmp_path / "out").T, expected, rtol=1e-6, atol=1e-6)
    assert "sampling rate 80 Hz is below the target" in prepared.findings()[0]


def test_spellings_of_channels_are_matched(tmp_path):
    old = [f"EEG {name}-REF" for name in CHANNELS]
    raw = make_raw([*reversed(old), "ECG"])
    path = write_file(raw, tmp_path / "a.edf")
    prepared = run(path, tmp_path / "out", reference=("none",), normalize="uV", sampling_rate=256.0)
    expected = mne.io.read_raw(path, verbose="ERROR").get_data(old, units="uV")
    np.testing.assert_allclose(load(tmp_path / "out").T, expected, rtol=1e-6, atol=1e-4)
    assert prepared.findings() == ["channels not used (recordings): ECG (1)"]


def test_reference_of_most_channels_is_no_part_of_their_names(tmp_path):
    """Others have other references: they are not of the same electrode."""
    names = [f"EEG {name}-A2" for name in NEW_NAMES]
    names[3] = "EEG F3-A1"
    raw = make_raw([*names, "ECG"])
    raw.info["bads"] = ["EEG Cz-A2"]
    raw.set_annotations(mne.Annotations([2.0], [0.5], ["spike"], ch_names=[["EEG O1-A2"]]))
    prepared = run(write_file(raw, tmp_path / "a_raw.fif"), tmp_path / "out")
    (record,) = prepared.records
    assert record.description.interpolated_channels == ("F3", "CZ")
    assert record.unused_channels == ("ECG", "F3-A1")
    assert [event.channels for event in record.events] == [("O1",)]
    # By its whole name, a channel can still be used.
    settings = {"channels": ("O1-A2", "F3-A1"), "normalize": "uV", "sampling_rate": 256.0}
    run(tmp_path / "a_raw.fif", tmp_path / "two", **settings, reference=("none",))
    expected = raw.get_data(["EEG O1-A2", "EEG F3-A1"], units="uV")
    np.testing.assert_allclose(load(tmp_path / "two").T, expected, rtol=1e-5, atol=1e-4)


def test_channels_of_a_file_that_cannot_be_used_are_named(tmp_path):
    pairs = [f"{a}-{b}" for a, b in itertools.pairwise(NEW_NAMES)]
    path = write_file(make_raw(pairs), tmp_path / "a.edf")
    with pytest.raises(UserError, match=r"other channels of the file: C3-CZ, .* and 8 more"):
        run(path, tmp_path / "out")


def test_montage_with_two_names_of_an_electrode_is_a_list_of_channels(tmp_path):
    names = mne.channels.make_standard_montage("colin27_1020").ch_names
    channels = [name for name in names if name not in ("T3", "T4", "T5", "T6")]
    path = write_file(make_raw(channels, seconds=10), tmp_path / "a_raw.fif")
    run(path, tmp_path / "out", channels=("colin27_1020",))
    assert read_description(tmp_path / "out").channels == tuple(channels)


def test_channels_without_a_position_are_reported(tmp_path):
    names = mne.channels.make_standard_montage("GSN-HydroCel-32").ch_names[:32]
    path = write_file(make_raw(names), tmp_path / "a.set")
    finding, *_ = run(path, tmp_path / "out", channels=tuple(names)).findings()
    assert finding.startswith("channels without a position in --montage standard_1005, which")
    assert "E1, E2" in finding
    net = {"montage": "GSN-HydroCel-32"}
    assert run(path, tmp_path / "net", channels=tuple(names), **net).findings() == []


def test_extract_reads_the_output(tmp_path):
    for patient in range(3):
        write_file(make_raw(seed=patient), tmp_path / f"eeg/p{patient}.edf")
    run(tmp_path / "eeg", tmp_path / "out")
    windows = open_windows(tmp_path / "out", "all", 42, 100, 10, 19)
    assert len(windows.files) == 3
    assert len(windows) == 3 * (2000 // 110)
    assert set(read_lengths(tmp_path / "out/file_lengths_map.csv").values()) == {2000}


def test_no_personal_field_is_copied(tmp_path):
    raw = make_raw()
    raw.info["subject_info"] = {"his_id": "ID-4711", "last_name": "Doe", "first_name": "Jane",
                                "sex": 2}  # fmt: skip
    raw.set_meas_date(1e9)
    path = write_file(raw, tmp_path / "eeg/doe.edf")
    assert b"4711" in path.read_bytes()[:200]
    assert b"Doe" in path.read_bytes()[:200]
    run(path, tmp_path / "out", hash_patients=True)
    for written in (tmp_path / "out").rglob("*"):
        text = written.name.encode()
        if written.is_file() and written.suffix != ".npy":
            text += written.read_bytes()
        # Hashes contain any four digits now and then.
        text = re.sub(rb"[0-9a-f]{12,}", b"", text.lower())
        for personal in (b"4711", b"doe", b"jane", b"2001", b"eeg/"):
            assert personal not in text, written


WITHOUT_MNE = """
import sys
sys.modules["mne"] = None
import minsae_jax.__main__
assert not any(name.startswith("mne.") for name in sys.modules)
try:
    minsae_jax.prepare(minsae_jax.PrepareConfig(source=("x",), out="y"))
except minsae_jax.UserError as e:
    assert "pip install" in str(e)
else:
    raise AssertionError
"""


def test_package_runs_without_mne():
    subprocess.run([sys.executable, "-c", WITHOUT_MNE], check=True)


def test_description_has_every_step(tmp_path):
    path = write_file(make_raw(), tmp_path / "a.edf")
    run(path, tmp_path / "out", notch=(50.0,), l_freq=0.5, sampling_rate=128.0)
    content = json.loads((tmp_path / "out/dataset.json").read_text())
    settings = content["preparation"]["settings"]
    assert settings["notch"] == [50.0]
    assert settings["l_freq"] == 0.5
    assert settings["reference"] == ["average"]
    assert content["preparation"]["versions"]["mne"] == mne.__version__
    assert str(tmp_path) not in json.dumps(content)


def test_truncated_file_is_reported_also_where_logging_is_off(tmp_path):
    """As in the command line, which turns off the logs of libraries."""
    path = write_file(make_raw(), tmp_path / "a.edf")
    path.write_bytes(path.read_bytes()[:-50_000])
    logging.disable()
    try:
        prepared = run(path, tmp_path / "out")
    finally:
        logging.disable(logging.NOTSET)
    assert load(tmp_path / "out").shape[0] < SECONDS * 100
    assert "file is shorter or longer than its header says" in prepared.findings()[0]
