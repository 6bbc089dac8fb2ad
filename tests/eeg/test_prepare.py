"""`prepare` against MNE's own pipeline, on files of every format that these tests write."""

import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import mne
import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from minsae_jax import PrepareConfig, UserError, prepare
from minsae_jax.eeg.description import read_description
from minsae_jax.eeg.montage import CHANNELS
from minsae_jax.eeg.recordings import open_windows, read_lengths
from minsae_jax.evaluation.events import read_events

NEW_NAMES = ("Fp1", "Fp2", "F7", "F3", "Fz", "F4", "F8", "T7", "C3", "Cz", "C4", "T8", "P7", "P3",
             "Pz", "P4", "P8", "O1", "O2")  # fmt: skip
ROOT = Path(__file__).parents[2]
SECONDS = 20
FORMATS = ("edf", "bdf", "vhdr", "set", "fif")


def make_raw(
    names: Sequence[str] = NEW_NAMES, rate: float = 256.0, seed: int = 0, seconds: int = SECONDS
) -> mne.io.RawArray:
    """Return EEG-like noise with drifts and offsets, in volts, and three annotations."""
    rng = np.random.default_rng(seed)
    steps = rng.normal(size=(len(names), int(seconds * rate)))
    drifts = np.cumsum(steps, axis=1)
    drifts *= 30 / drifts.std()
    signals = 5 * steps + drifts + rng.normal(0, 50, (len(names), 1))
    info = mne.create_info(list(names), rate, "eeg")
    raw = mne.io.RawArray(signals * 1e-6, info, verbose="ERROR")
    onsets = [2.0, 5.5, seconds - 0.2]
    raw.set_annotations(mne.Annotations(onsets, [0.5, 0.0, 0.0], ["spike", "blink", "end"]))
    return raw


def write_file(raw: mne.io.BaseRaw, path: Path) -> Path:
    """Write an EEG file in the format of its ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".fif":
        raw.save(path, verbose="ERROR")
    else:
        mne.export.export_raw(path, raw, overwrite=True, verbose="ERROR")
    return path


def run(source: Path | Sequence[Path], out: Path, **settings):
    if isinstance(source, Path):
        source = [source]
    return prepare(PrepareConfig(source=tuple(map(str, source)), out=str(out), **settings))


def load(folder: Path) -> np.ndarray:
    (path,) = folder.glob("*.npy")
    return np.load(path)


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
    events = [
        (e.kind.removeprefix("Comment/"), e.start, e.stop) for e in prepared.records[0].events
    ]
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


def test_extract_reads_the_output(tmp_path):
    for patient in range(3):
        write_file(make_raw(seed=patient), tmp_path / f"eeg/p{patient}.edf")
    run(tmp_path / "eeg", tmp_path / "out")
    windows = open_windows(tmp_path / "out", "all", 42, 100, 10, 19)
    assert len(windows.files) == 3
    assert len(windows) == 3 * (2000 // 110)
    assert set(read_lengths(tmp_path / "out/file_lengths_map.csv").values()) == {2000}


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_recording_of_a_damaged_record_is_prepared_again(tmp_path):
    write_file(make_raw(seed=0), tmp_path / "eeg/p0.edf")
    run(tmp_path / "eeg", tmp_path / "out")
    expected = snapshot(tmp_path / "out")
    (record,) = (tmp_path / "out/.prepare").iterdir()
    content = record.read_text()
    record.write_text(content.replace("n_samples", "n_sampler"))
    assert run(tmp_path / "eeg", tmp_path / "out").n_new == 1
    assert snapshot(tmp_path / "out") == expected
    assert record.read_text() == content


def test_resumed_and_repeated_runs_give_the_same_bytes(tmp_path, monkeypatch):
    for patient in range(3):
        write_file(make_raw(seed=patient), tmp_path / f"eeg/p{patient}.edf")
    whole = tmp_path / "whole"
    run(tmp_path / "eeg", whole)
    expected = snapshot(whole)
    assert len(expected) == 3 + 4
    part = tmp_path / "part"
    run(tmp_path / "eeg/p1.edf", part)
    stamp = (part / "p1_s001_t000_preprocessed.npy").stat().st_mtime_ns
    prepared = run(tmp_path / "eeg", part)
    assert prepared.n_new == 2
    assert snapshot(part) == expected
    assert (part / "p1_s001_t000_preprocessed.npy").stat().st_mtime_ns == stamp
    assert run(tmp_path / "eeg", part).n_new == 0
    assert snapshot(part) == expected
    # A changed source is prepared again; the others are not.
    write_file(make_raw(seed=9), tmp_path / "eeg/p2.edf")
    assert run(tmp_path / "eeg", part).n_new == 1
    assert snapshot(part) != expected


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_killed_run_resumes_to_the_same_bytes(tmp_path, jobs):
    """SIGKILL after the first recording; the workers end with their main process."""
    for patient in range(8):
        write_file(make_raw(seed=patient, seconds=120), tmp_path / f"eeg/p{patient}.edf")
    whole = tmp_path / "whole"
    run(tmp_path / "eeg", whole)
    killed = tmp_path / "killed"
    words = ["minsae_jax", "prepare", "eeg", "--out", "killed", "--jobs", str(jobs)]
    with subprocess.Popen(
        [sys.executable, "-m", *words],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    ) as process:
        while not list(killed.glob("*.npy")):
            assert process.poll() is None
            time.sleep(0.001)
        process.kill()
        # The pipe is closed when no process has it open any more.
        process.stderr.read()
    assert 0 < len(list(killed.glob("*.npy"))) < 8
    assert not (killed / "file_lengths_map.csv").exists()
    run(tmp_path / "eeg", killed)
    assert snapshot(killed) == snapshot(whole)


MEMORY = """
import sys
from minsae_jax import PrepareConfig, prepare
from benchmarks.timing import peak_rss

def run(name):
    settings = {"channels": ("biosemi32",), "l_freq": 0.5, "notch": (50.0,)}
    prepare(PrepareConfig(source=(f"{name}.edf",), out=f"out_{name}", **settings))
    return peak_rss()

before = run("small")
print(run("large") - before)
"""


@pytest.mark.slow
def test_peak_memory_is_below_three_times_the_recording(tmp_path):
    seconds = 1800
    names = mne.channels.make_standard_montage("biosemi32").ch_names
    write_file(make_raw(names), tmp_path / "small.edf")
    write_file(make_raw(names, seconds=seconds), tmp_path / "large.edf")
    done = subprocess.run(
        [sys.executable, "-c", MEMORY],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=True,
    )
    as_float32 = 32 * seconds * 256 * 4
    assert as_float32 < int(done.stdout) < 3 * as_float32


@pytest.mark.slow
def test_jobs_give_the_same_bytes(tmp_path):
    for patient in range(4):
        write_file(make_raw(seed=patient), tmp_path / f"eeg/p{patient}.edf")
    with threadpool_limits(2):  # conftest.py limits BLAS to one thread
        run(tmp_path / "eeg", tmp_path / "one")
    run(tmp_path / "eeg", tmp_path / "two", jobs=2)
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "two")


def test_other_settings_are_refused_or_overwritten(tmp_path):
    path = write_file(make_raw(), tmp_path / "a.edf")
    out = tmp_path / "out"
    run(path, out)
    before = snapshot(out)
    with pytest.raises(UserError, match="recordings of other settings, versions or sources"):
        run(path, out, l_freq=1.0)
    other = write_file(make_raw(), tmp_path / "b.edf")
    with pytest.raises(UserError, match="other settings, versions or sources, such as a_s001"):
        run(other, out)
    assert snapshot(out) == before
    run(other, out, l_freq=1.0, overwrite=True)
    assert [name for name in snapshot(out) if name.endswith(".npy")] == [
        "b_s001_t000_preprocessed.npy"
    ]


def test_folder_of_something_else_is_refused(tmp_path, demo_folder):
    path = write_file(make_raw(), tmp_path / "a.edf")
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="which `prepare` did not write"):
        run(path, tmp_path)
    with pytest.raises(UserError, match="which `prepare` did not write"):
        run(path, demo_folder, overwrite=True)


def with_samples(change) -> mne.io.RawArray:
    raw = make_raw()
    change(raw._data)
    return raw


def clip(data: np.ndarray) -> None:
    np.clip(data[5], np.quantile(data[5], 0.05), None, out=data[5])


def scaled(factor: float):
    def change(data: np.ndarray) -> None:
        data *= factor

    return change


def with_nan(data: np.ndarray) -> None:
    data[3, 77] = np.nan


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (scaled(1e-6), {}, "its unit is probably wrong"),
        (scaled(1e6), {}, "its unit is probably wrong"),
        (with_nan, {}, "contains NaN or infinity"),
        (scaled(1), {"min_duration": 30.0}, "is too short: 20 s instead of --min_duration 30"),
        (scaled(1), {"max_duration": 15.0}, "is too long: 20 s"),
        (scaled(1), {"crop": 11.0}, "is too short: 0 s"),
        (scaled(1), {"channels": ("Fz", "AFz"), "on_missing": "error"}, "lacks AFz"),
        (scaled(1), {"channels": ("Fz", "AFz")}, "has 1 usable channels of 2"),
        (scaled(1), {"reference": ("M1",)}, "has no reference channel M1"),
        (scaled(1), {"sampling_rate": 500.0, "h_freq": 200.0}, "is too low for --h_freq 200"),
        (scaled(1), {"sampling_rate": 500.0, "notch": (180.0,)}, "is too low for --notch 180"),
    ],
)
def test_unusable_recording_is_named_and_nothing_is_written(tmp_path, change, settings, message):
    path = write_file(with_samples(change), tmp_path / "a_raw.fif")
    with pytest.raises(UserError, match=message) as e:
        run(path, tmp_path / "out", **settings)
    assert str(path) in str(e.value)
    assert not (tmp_path / "out").exists()


def test_wrong_unit_is_corrected_by_scale(tmp_path):
    good = write_file(make_raw(), tmp_path / "a_raw.fif")
    wrong = write_file(with_samples(scaled(1e6)), tmp_path / "b_raw.fif")
    run(good, tmp_path / "good")
    run(wrong, tmp_path / "out", scale=1e-6)
    np.testing.assert_allclose(load(tmp_path / "out"), load(tmp_path / "good"), atol=1e-5)


def test_clipped_channel_is_found(tmp_path):
    path = write_file(with_samples(clip), tmp_path / "a_raw.fif")
    assert run(path, tmp_path / "out").findings() == [
        "channels clipped: F4 (in a-raw_s001_t000_preprocessed.npy)"
    ]


def test_bad_recordings_and_copies_can_be_skipped(tmp_path):
    good = write_file(make_raw(), tmp_path / "eeg/a.edf")
    (tmp_path / "eeg/b.edf").write_bytes(good.read_bytes())
    (tmp_path / "eeg/c.edf").write_bytes(good.read_bytes()[:100])
    with pytest.raises(UserError, match=r"b.edf is a copy of \S*a.edf; recording \S*c.edf cannot"):
        run(tmp_path / "eeg", tmp_path / "out")
    assert not (tmp_path / "out/file_lengths_map.csv").exists()
    prepared = run(tmp_path / "eeg", tmp_path / "out", on_bad_recording="skip")
    assert [record.name for record in prepared.records] == ["a_s001_t000_preprocessed.npy"]
    assert prepared.n_new == 0  # it was prepared in the first run
    assert [each.source.path.name for each in prepared.rejected] == ["b.edf", "c.edf"]
    assert "left out" in prepared.summary()


def test_recording_with_missing_channels_is_skipped(tmp_path):
    write_file(make_raw(), tmp_path / "eeg/a.edf")
    write_file(make_raw(NEW_NAMES[1:], seed=1), tmp_path / "eeg/b.edf")
    prepared = run(tmp_path / "eeg", tmp_path / "out", on_missing="skip")
    assert len(prepared.records) == 1
    assert [each.reason for each in prepared.rejected] == ["lacks FP1"]


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
        for personal in (b"4711", b"doe", b"jane", b"2001", b"eeg/"):
            assert personal not in text.lower(), written


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"channels": ("tuhh",), "montage": "x"}, "MNE has no montage 'x'"),
        ({"channels": ("T3", "T7")}, "one electrode twice: T3 and T7"),
        ({"channels": ("Fz", " ")}, "--channels contains an empty name"),
        ({"reference": ("average", "M1")}, "--reference average cannot be combined"),
        ({"l_freq": 60.0}, "--l_freq must be below"),
        ({"h_freq": 60.0}, "--h_freq must be at most half of --sampling_rate, 50"),
        ({"patient_pattern": "("}, "is not a regular expression"),
        ({"patient_pattern": "x"}, "must contain the group"),
        ({"labels": "no.csv"}, "no.csv"),
    ],
)
def test_invalid_setting_is_one_line(tmp_path, settings, message):
    path = write_file(make_raw(), tmp_path / "a.edf")
    with pytest.raises(UserError, match=message):
        run(path, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


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
