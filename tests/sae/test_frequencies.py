"""act_freqs.npy: rows against NumPy's own reader, kills between its writes, and resumed runs."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from minsae_jax import UserError
from minsae_jax.monitor import frequencies
from minsae_jax.monitor.frequencies import interval_stride, open_frequencies, open_table
from minsae_jax.sae.history import read_densities, read_histories
from minsae_jax.sae.trainer import train
from tests.interrupt import train_until

D_SAE = 5
COUNTS = np.random.default_rng(0).integers(0, 1000, (7, D_SAE)).astype(np.int32)


@pytest.fixture(autouse=True)
def no_csv(monkeypatch):
    monkeypatch.setattr(frequencies, "MAX_CSV_NUMBERS", 0)


def write(folder, intervals, tokens=0):
    """Write the rows of some log intervals of 1,000 tokens, after a checkpoint at `tokens`.

    The first one is written alone, the others at once.
    """
    log = open_frequencies(folder, D_SAE, len(COUNTS), tokens)
    for interval in intervals:
        log.add(interval, 1000 * (interval + 1), COUNTS[interval])
        if interval == intervals[0]:
            log.write()
    log.write()
    return log.path


def test_numpy_reads_the_rows(tmp_path):
    path = write(tmp_path, range(7))
    table = np.load(path)
    assert path.name == "act_freqs.npy"
    assert table["step"].tolist() == [1000 * (i + 1) for i in range(7)]
    np.testing.assert_array_equal(table["active"], COUNTS)


def test_resumed_file_has_the_same_bytes(tmp_path):
    """Rows after the checkpoint are cut off, and so is half a row of a killed process."""
    expected = write(tmp_path, range(7)).read_bytes()
    path = write(tmp_path, range(6))
    with path.open("ab") as file:
        file.write(b"half a row")
    assert write(tmp_path, range(4, 7), tokens=4000).read_bytes() == expected
    assert write(tmp_path, range(7)).read_bytes() == expected  # anew


class RecordedFile:
    """A file whose path's content is recorded after each write."""

    def __init__(self, file, path, states):
        self.file = file
        self.path = path
        self.states = states

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, content):
        self.file.write(content)
        self.file.flush()
        self.states.append(self.path.read_bytes())


def test_a_kill_between_any_two_writes_leaves_whole_rows(tmp_path, monkeypatch):
    states = []
    original = Path.open

    def recorded_open(path, mode="r", **kwargs):
        file = original(path, mode, **kwargs)
        return RecordedFile(file, path, states) if mode == "r+b" else file

    monkeypatch.setattr(Path, "open", recorded_open)
    path = write(tmp_path, range(3))
    monkeypatch.undo()
    assert len(states) == 1 + 2 * 2  # the header, then rows and header
    n_rows = []
    for state in states:
        # A row can also be cut short; the first header is renamed into place.
        is_cut_short = len(state) > len(states[0])
        for content in (state, state[:-3] if is_cut_short else state):
            path.write_bytes(content)
            table = open_table(tmp_path)
            n_rows.append(len(table.steps()))
            for row in range(n_rows[-1]):
                np.testing.assert_array_equal(table.read([row])[0], COUNTS[row])
    assert set(n_rows) == {0, 1, 2, 3}


def test_rows_are_thinned_out_beyond_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(frequencies, "MAX_NUMBERS", 2 * D_SAE)
    assert interval_stride(D_SAE, 7) == 4
    table = np.load(write(tmp_path, range(7)))
    assert table["step"].tolist() == [1000, 5000]
    np.testing.assert_array_equal(table["active"], COUNTS[[0, 4]])


@pytest.mark.parametrize("n_intervals", [1, 100, 512, 513, 10_000, 10**6])
def test_size_is_bounded(n_intervals):
    stride = interval_stride(131_072, n_intervals)
    assert -(-n_intervals // stride) * 131_072 <= frequencies.MAX_NUMBERS
    assert stride == 1 or -(-n_intervals // (stride // 2)) * 131_072 > frequencies.MAX_NUMBERS


def test_csv_of_an_earlier_version_is_continued(tmp_path):
    (tmp_path / "act_freqs.csv").write_text("step,feat_0\r\n1000,3\r\n2000,4\r\n", newline="")
    log = open_frequencies(tmp_path, 1, 10**9, 1000)
    log.add(1, 2000, np.array([7]))
    log.write()
    assert (tmp_path / "act_freqs.csv").read_bytes() == b"step,feat_0\r\n1000,3\r\n2000,7\r\n"
    assert not (tmp_path / "act_freqs.npy").exists()


@pytest.mark.parametrize("damage", ["short", "other", "magic"])
def test_damaged_file_is_one_line(tmp_path, damage):
    path = write(tmp_path, range(3))
    content = path.read_bytes()
    if damage == "other":
        np.save(path, np.zeros((3, 4)))
    else:
        path.write_bytes(content[:20] if damage == "short" else b"x" + content[1:])
    with pytest.raises(UserError, match=r"act_freqs\.npy is damaged"):
        open_table(tmp_path)
    with pytest.raises(UserError, match=r"act_freqs\.npy is damaged"):
        write(tmp_path, range(2, 3), tokens=2000)


def test_run_has_the_numbers_of_the_csv(settings, tmp_path, monkeypatch):
    """A resumed run too; densities of both are the same."""
    binary = replace(settings, run_dir=str(tmp_path / "binary"))
    train_until(binary, 27)
    train(binary)
    monkeypatch.setattr(frequencies, "MAX_CSV_NUMBERS", 10**9)
    train(settings)
    csvs = sorted((tmp_path / "run").glob("members/*/act_freqs.csv"))
    assert len(csvs) == 4
    for path in csvs:
        rows = np.loadtxt(path, delimiter=",", skiprows=1)
        table = np.load(tmp_path / "binary/members" / path.parent.name / "act_freqs.npy")
        np.testing.assert_array_equal(table["step"], rows[:, 0])
        np.testing.assert_array_equal(table["active"], rows[:, 1:])
    first, second = (read_densities(read_histories(tmp_path / name)) for name in ("run", "binary"))
    np.testing.assert_array_equal(first.intervals, second.intervals)
    np.testing.assert_array_equal(first.percent, second.percent)
    np.testing.assert_array_equal(first.silent, second.silent)


@pytest.fixture
def binary_run(plain_run, monkeypatch):
    """The run of two members, with act_freqs.npy of every second log interval for the larger."""
    csv = plain_run / "members/lambda=10,d_sae=16/act_freqs.csv"
    rows = np.loadtxt(csv, delimiter=",", skiprows=1).astype(int)
    monkeypatch.setattr(frequencies, "MAX_NUMBERS", 16 * 40)
    log = open_frequencies(csv.parent, 16, len(rows), 0)
    for interval, row in enumerate(rows):
        log.add(interval, int(row[0]), row[1:])
    log.write()
    csv.unlink()
    return plain_run


def test_densities_of_thinned_rows(binary_run):
    """Members of both formats have frames of the same log intervals."""
    densities = read_densities(read_histories(binary_run))
    assert densities.intervals.tolist() == list(range(0, 70, 2))
    assert (densities.silent == 3).all()
    np.testing.assert_allclose(densities.percent[..., :].sum(2)[:, 1], 100 * 13 / 16)


def test_rows_that_do_not_match_are_damage(binary_run):
    path = binary_run / "members/lambda=10,d_sae=16/act_freqs.npy"
    original = np.load(path)
    wrong = original.copy()
    wrong["step"][3] += 1
    negative = original.copy()
    negative["active"][3, 0] = -1
    for table in (wrong, negative, original[:20], original[1:]):
        np.save(path, table)
        with pytest.raises(UserError, match=r"act_freqs\.npy is damaged"):
            read_densities(read_histories(binary_run))
