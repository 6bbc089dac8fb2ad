"""dataset.json: read as written, the TUH corpus without it, one line for each invalid file."""

import json

import numpy as np
import pytest

from minsae_jax import UserError
from minsae_jax.eeg.description import (
    TUH,
    Description,
    Preparation,
    RecordingDescription,
    read_description,
    write_description,
)

NAME = "a_s001_t000_preprocessed.npy"
DESCRIBED = Description(
    sampling_rate=200.0,
    channels=("Cz", "X1"),
    positions=((0.0, 0.01, 0.14), None),
    unit="SD",
    preparation=Preparation({"notch": [50.0]}, {"mne": "1.10"}),
    recordings={
        NAME: RecordingDescription("a.edf", (0.1, -2.0), (12.5, 30.0), ("X1",), (), 256.0, 61.5)
    },
)


def test_written_description_is_read_back(tmp_path):
    write_description(tmp_path, DESCRIBED)
    assert read_description(tmp_path) == DESCRIBED
    text = (tmp_path / "dataset.json").read_bytes()
    write_description(tmp_path, read_description(tmp_path))
    assert (tmp_path / "dataset.json").read_bytes() == text


def test_without_the_file_it_is_the_tuh_corpus(tmp_path):
    described = read_description(tmp_path)
    assert described == TUH
    assert described.sampling_rate == 100
    assert described.unit == "SD"
    assert described.channels[:3] == ("FP1", "FP2", "F7")
    assert described.uv_per_unit(NAME) is None


def test_units_in_microvolts():
    np.testing.assert_array_equal(DESCRIBED.uv_per_unit(NAME), [12.5, 30])
    assert DESCRIBED.uv_per_unit("other.npy") is None
    hundreds = Description(200.0, ("Cz",), (None,), "100 uV")
    np.testing.assert_array_equal(hundreds.uv_per_unit(NAME), [100])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("channels", ["Cz", "Cz"], "channels must be different names"),
        ("channels", "Cz", "channels must be a list of names"),
        ("channels", ["Cz"], "there are 2 positions for 1 channels"),
        ("positions", [[0, 0], None], "not enough values"),
        ("positions", [["x", 0, 0], None], "positions must be numbers, got 'x'"),
        ("sampling_rate", 0, "sampling_rate is 0.0"),
        ("sampling_rate", None, "sampling_rate must be numbers, got None"),
        ("unit", "volts", "unit must be one of SD, uV, 100 uV, mV, got 'volts'"),
        ("format_version", 9, "format_version is 9"),
        ("recordings", {NAME: {"source": "x"}}, "it lacks 'mean_uv'"),
        ("preparation", 3, "not subscriptable"),
    ],
)
def test_invalid_value_is_one_line(tmp_path, key, value, message):
    write_description(tmp_path, DESCRIBED)
    path = tmp_path / "dataset.json"
    content = json.loads(path.read_text()) | {key: value}
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as e:
        read_description(tmp_path)
    assert str(path) in str(e.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00", '{"format_version": 1}', "[" * 100_000])
def test_damaged_file_is_one_line(tmp_path, text):
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(UserError, match=r"dataset\.json"):
        read_description(tmp_path)
