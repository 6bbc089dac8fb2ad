"""`--verify` passes for a correct conversion and fails for a wrong one."""

import jax
import numpy as np
import pytest

from convert import verify
from convert.__main__ import main
from convert.encoder import convert, read_source
from minsae_jax.encoder.patchtst.encoder import PatchTSTEncoder
from tests.conftest import ENCODERS, FIXTURES

SOURCE = FIXTURES / "layernorm_prenorm"


@pytest.mark.parametrize(
    "name", [SOURCE.name, *(pytest.param(name, marks=pytest.mark.slow) for name in ENCODERS[:-1])]
)
def test_table_lists_every_layer_and_the_head(name, tmp_path, capsys):
    expected = np.load(FIXTURES / name / "expected.npz")
    np.save(tmp_path / "recording.npy", np.concatenate(expected["past_values"]))
    main(
        [
            "encoder",
            str(FIXTURES / name / "checkpoint.pth"),
            "--config_path",
            str(FIXTURES / name / "config.yaml"),
            "--verify",
            str(tmp_path / "recording.npy"),
        ]
    )
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if "max difference" in line)
    rows = [line.split() for line in lines[start + 1 :]]
    assert [r[:-3] for r in rows] == [["layer", str(i)] for i in range(len(rows) - 1)] + [["head"]]
    assert all(0 < float(r[-3]) < 1e-4 and float(r[-2]) <= float(r[-3]) for r in rows)


def test_wrong_encoder_fails(tmp_path, capsys, monkeypatch):
    """A change of 0.001 in one bias of the last layer is seen in it and after it."""
    source = read_source(SOURCE / "checkpoint.pth")
    encoder, _ = convert(source)
    params = jax.tree.map(np.array, encoder.params)
    params["layers"][2]["ff_out"]["bias"][0] += 1e-3
    wrong = PatchTSTEncoder(source.architecture, params)
    differences = verify.verify(wrong, source.checkpoint.tensors, verify.read_windows(wrong, None))
    assert [d.passes for d in differences] == [True, True, False, False]
    assert differences[2].largest == pytest.approx(1e-3, rel=0.05)

    monkeypatch.setattr("convert.__main__.convert", lambda _: (wrong, {}))
    with pytest.raises(SystemExit) as e:
        main(["encoder", str(SOURCE / "checkpoint.pth"), "--verify", "--out", str(tmp_path / "e")])
    assert e.value.code == 1
    assert "nothing is written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_nan_never_passes():
    assert not verify.Difference("layer 0", float("nan"), 0.0, 1.0).passes


def test_recording_of_one_window_is_enough(tmp_path):
    encoder, _ = convert(read_source(SOURCE / "checkpoint.pth"))
    a = encoder.architecture
    np.save(tmp_path / "x.npy", np.ones((a.seq_len, a.n_vars), np.float64))
    windows = verify.read_windows(encoder, str(tmp_path / "x.npy"))
    assert windows.shape == (1, a.seq_len, a.n_vars)
    assert windows.dtype == np.float32
