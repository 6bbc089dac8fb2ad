"""Runs of `prepare` that are repeated, killed, or of several jobs, and their memory."""

import os
import subprocess
import sys
import time
from pathlib import Path

import mne
import pytest
from threadpoolctl import threadpool_limits

from minsae_jax import UserError
from minsae_jax.eeg.prepare import plan
from tests.eeg.eeg_files import make_raw, run, write_file

ROOT = Path(__file__).parents[2]


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


def test_changed_part_of_a_split_file_is_read_again(tmp_path):
    names = ("Fz", "Cz")
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        folder.mkdir()
        raw = make_raw(names, rate=5000.0, seconds=60, seed=seed)
        raw.save(folder / "x_raw.fif", split_size="2MB", verbose="ERROR")
        assert (folder / "x_raw-1.fif").exists()
    settings = {"channels": names}
    source = tmp_path / "0/x_raw.fif"
    assert run(source, tmp_path / "out", **settings).n_new == 1
    assert run(source, tmp_path / "out", **settings).n_new == 0
    (tmp_path / "1/x_raw-1.fif").replace(tmp_path / "0/x_raw-1.fif")
    assert run(source, tmp_path / "out", **settings).n_new == 1


def test_files_of_other_names_that_a_header_names_belong_to_the_recording(tmp_path):
    path = write_file(make_raw(), tmp_path / "x.vhdr")
    path.write_text(path.read_text().replace("DataFile=x.eeg", "DataFile=Ärzte.eeg"))
    data = (tmp_path / "x.eeg").rename(tmp_path / "Ärzte.eeg")
    assert run(path, tmp_path / "out").n_new == 1
    assert run(path, tmp_path / "out").findings() == []
    write_file(make_raw(seed=1), tmp_path / "other/x.vhdr").with_suffix(".eeg").replace(data)
    assert run(path, tmp_path / "out").n_new == 1
    (tmp_path / "x.vmrk").unlink()
    prepared = run(path, tmp_path / "out")
    assert prepared.records[0].events == ()
    assert prepared.findings()[0].startswith("file of markers is missing")


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


# As everywhere in Python, processes import the script that starts them.
UNGUARDED = """
from minsae_jax import PrepareConfig, prepare

prepare(PrepareConfig(source=("eeg",), out="out", jobs=2))
"""


@pytest.mark.slow
def test_error_of_a_script_without_guard_names_it(tmp_path):
    for patient in range(2):
        write_file(make_raw(seed=patient), tmp_path / f"eeg/p{patient}.edf")
    (tmp_path / "script.py").write_text(UNGUARDED)
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 1
    assert '(a script must call prepare below `if __name__ == "__main__":`)' in done.stderr


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
    changes = r"l_freq \(0.0, now 1.0\), reference \(\['average'\], now \['none'\]\)"
    with pytest.raises(UserError, match=rf"recordings of other settings or versions: {changes};"):
        run(path, out, l_freq=1.0, reference=("none",))
    other = write_file(make_raw(), tmp_path / "b.edf")
    with pytest.raises(UserError, match="other settings, versions or sources, such as a_s001"):
        run(other, out)
    assert snapshot(out) == before
    run(other, out, l_freq=1.0, overwrite=True)
    assert [name for name in snapshot(out) if name.endswith(".npy")] == [
        "b_s001_t000_preprocessed.npy"
    ]


def test_recordings_of_an_earlier_version_are_refused(tmp_path, monkeypatch):
    path = write_file(make_raw(), tmp_path / "a.edf")
    monkeypatch.setattr(plan, "VERSION", 1)
    run(path, tmp_path / "out")
    monkeypatch.undo()
    with pytest.raises(UserError, match="recordings of other settings, versions or sources"):
        run(path, tmp_path / "out")
    run(path, tmp_path / "out", overwrite=True)
    assert run(path, tmp_path / "out").n_new == 0


def test_folder_of_something_else_is_refused(tmp_path, demo_folder):
    path = write_file(make_raw(), tmp_path / "a.edf")
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="which `prepare` did not write"):
        run(path, tmp_path)
    with pytest.raises(UserError, match="which `prepare` did not write"):
        run(path, demo_folder, overwrite=True)
