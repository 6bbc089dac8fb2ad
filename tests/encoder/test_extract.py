"""Recordings to a store: right numbers in the right order, each with its origin, and nothing done twice."""

import shutil
import warnings
from dataclasses import replace

import numpy as np
import pytest

from convert.encoder import convert_encoder
from minsae_jax import UserError
from minsae_jax.activations.shards import open_store
from minsae_jax.activations.writer import StoreWriter
from minsae_jax.config import Extract
from minsae_jax.eeg.recordings import open_windows
from minsae_jax.encoder import extract as extraction
from minsae_jax.encoder.converted import Encoder
from tests.conftest import FIXTURES


@pytest.fixture(scope="module")
def encoder():
    return convert_encoder(FIXTURES / "tuhab_patch_100/checkpoint.pth")[0]


@pytest.fixture
def settings(demo_folder, tmp_path):
    return Extract(root_path=str(demo_folder), batch_size=4, out=str(tmp_path / "store"))


def extract(encoder, settings, *splits):
    """All at once, and what was told."""
    return "\n".join(extraction.extract(encoder, replace(settings, split=splits)))


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("layer", [-1, 0])
def test_store(encoder, settings, tmp_path, layer, capsys):
    settings = replace(settings, cache_layer=(layer,))
    told = extract(encoder, settings, "train")
    folder = tmp_path / "store" / f"l{layer}"
    windows = open_windows(settings.root_path, "train", 42, 1000, 100, 19)
    assert len(windows) % 4 != 0  # the last batch is short
    assert f"{len(windows)} windows" in told
    store = open_store(folder)
    assert len(store.shards) == -(-len(windows) // 4)
    x = windows.read(0, len(windows))
    expected = np.concatenate([encoder.activations(x[i : i + 4], layer) for i in range(0, len(x), 4)])
    got = np.concatenate([np.load(shard.path) for shard in store.shards])
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected.reshape(-1, 11, 128), atol=1e-5, rtol=0)
    origin = np.load(folder / "provenance.npz")
    assert len(got) == len(origin["recording"]) == len(origin["window"]) == len(origin["channel"])
    for i in (0, 20, 100, len(got) - 1):
        recording = np.load(windows.folder / str(origin["recordings"][origin["recording"][i]]))
        start = int(origin["window"][i]) * 1000
        window = recording[None, start : start + 1000]
        np.testing.assert_allclose(encoder.activations(window, layer)[0, origin["channel"][i]], got[i], atol=1e-5)
    assert store.manifest["encoder"] == encoder.fingerprint
    assert (store.manifest["layer"], store.manifest["layer_index"]) == (layer, layer % 3)


def test_again_and_after_a_break(encoder, settings, tmp_path, monkeypatch):
    folder = tmp_path / "store" / "l-1"
    extract(encoder, settings, "train")
    before, times = contents(folder), {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert "finished already" in extract(encoder, settings, "train")
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == times

    other = replace(settings, out=str(tmp_path / "broken"))
    write, count = StoreWriter.write, [0]

    def failing(self, number, activations):
        if count[0] == 1:
            raise OSError("disk full")
        count[0] += 1
        write(self, number, activations)

    monkeypatch.setattr(StoreWriter, "write", failing)
    with pytest.raises(OSError, match="disk full"):
        extract(encoder, other, "train")
    monkeypatch.setattr(StoreWriter, "write", write)
    extract(encoder, other, "train")
    assert contents(tmp_path / "broken" / "l-1") == before


def test_max_batches(encoder, settings, tmp_path):
    extract(encoder, replace(settings, max_batches=2), "train")
    folder = tmp_path / "store" / "l-1"
    assert len(open_store(folder).shards) == 2
    assert len(np.load(folder / "provenance.npz")["window"]) == 2 * 4 * 19


def test_another_store_is_never_mixed_in(encoder, settings, tmp_path):
    extract(encoder, settings, "val")
    before = contents(tmp_path / "store" / "l-1")
    other = Encoder(replace(encoder.architecture, activation="gelu"), encoder.params)
    with pytest.raises(UserError, match=r"holds a store of other settings: encoder \("):
        extract(other, settings, "val")
    for change, split in ((replace(settings, batch_size=5), "val"), (settings, "test")):
        with pytest.raises(UserError, match="holds a store of other settings"):
            extract(encoder, change, split)
    changed = shutil.copytree(settings.root_path, tmp_path / "changed")
    name = open_windows(changed, "val", 42, 1000, 100, 19).files[0]
    eeg = np.load(changed / name)
    eeg[500, 7] += 1e-3  # somewhere in the middle
    np.save(changed / name, eeg)
    with pytest.raises(UserError, match="other settings: recordings_sha256"):
        extract(encoder, replace(settings, root_path=str(changed)), "val")
    assert contents(tmp_path / "store" / "l-1") == before
    extract(other, replace(settings, overwrite=True), "val")
    assert contents(tmp_path / "store" / "l-1").keys() == before.keys()
    assert contents(tmp_path / "store" / "l-1") != before


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(encoder, settings, tmp_path, dtype):
    extract(encoder, settings, "val")
    extract(encoder, replace(settings, dtype=dtype, out=str(tmp_path / dtype)), "val")
    exact, half = open_store(tmp_path / "store", -1).read(0), open_store(tmp_path / dtype, -1).read(0)
    error = np.abs(half - exact).max() / np.abs(exact).max()
    assert 0 < error < {"float16": 5e-4, "bfloat16": 4e-3}[dtype]


def test_forced_revin(encoder, settings, tmp_path):
    extract(encoder, settings, "val")
    extract(encoder, replace(settings, force_revin=True, out=str(tmp_path / "forced")), "val")
    plain, forced = (open_store(tmp_path / name, -1).read(0) for name in ("store", "forced"))
    assert np.abs(plain - forced).max() > 0.1
    windows = open_windows(settings.root_path, "val", 42, 1000, 100, 19).read(0, 1).astype(np.float64)
    by_hand = (windows - windows.mean(1, keepdims=True)) / np.sqrt(windows.var(1, keepdims=True) + 1e-5)
    expected = np.asarray(encoder.activations(by_hand.astype(np.float32))).reshape(-1, 128)
    np.testing.assert_allclose(forced[: len(expected)], expected, atol=1e-4)


def test_shifted_columns_are_told_and_marked(encoder, settings, demo_folder, tmp_path):
    root = shutil.copytree(demo_folder, tmp_path / "data")
    name = open_windows(root, "val", 42, 1000, 100, 19).files[0]
    eeg = np.load(root / name)
    eeg[:, -1] = 0
    np.save(root / name, eeg)
    with pytest.warns(UserWarning, match=f"all zero in {name}"):
        extract(encoder, replace(settings, root_path=str(root)), "val")
    origin = np.load(tmp_path / "store" / "l-1" / "provenance.npz")
    assert origin["recordings"][origin["shifted"]].tolist() == [name]


def test_default_folders():
    assert str(Extract(out="x", split=("val",)).store("val", -1)) == "x/l-1"
    several = Extract(out="x/y/", split=("train", "val"))
    assert [str(several.store(s, -1)) for s in several.split] == ["x/y/l-1", "x/y_val/l-1"]
    settings = Extract(split=("train", "val", "test", "all"))
    assert [str(settings.store(s, 2)) for s in settings.split] == [
        "embeddings/store/l2", "embeddings/store_val/l2", "embeddings/store_test/l2", "embeddings/store_all/l2",
    ]  # fmt: skip


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_nothing_is_written_before_all_recordings_are_seen(encoder, demo_folder, tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    root = shutil.copytree(demo_folder, tmp_path / "data")
    names = [open_windows(root, "test", 42, 1000, 100, 19).files[i] for i in (0, -1)]
    for name in names:
        eeg = np.load(root / name)
        eeg[5, 3] = value
        np.save(root / name, eeg)
    with pytest.raises(UserError) as e:
        extract(encoder, Extract(root_path=str(root)), "train", "test")
    for name in names:
        assert f"{name} holds NaN or infinity at sample 5" in str(e.value)
    assert not (tmp_path / "embeddings").exists()


def test_activations_that_are_not_finite_are_not_stored(encoder, demo_folder, tmp_path):
    root = shutil.copytree(demo_folder, tmp_path / "data")
    for name in open_windows(root, "val", 42, 1000, 100, 19).files:
        np.save(root / name, np.load(root / name) * 1e25)
    with pytest.raises(UserError, match="the encoder gives NaN or infinity in float32"):
        extract(encoder, Extract(root_path=str(root), out=str(tmp_path / "store")), "val")
    assert [p.name for p in (tmp_path / "store/l-1").iterdir()] == ["manifest.json"]


def test_no_warnings_otherwise(encoder, settings):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        extract(encoder, settings, "val")
