"""Extraction: right numbers in the right order, each with its origin, and nothing done twice."""

import csv
import random
import shutil
import warnings
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from convert import patchtst_torch
from convert.encoder import read_source
from minsae_jax import UserError
from minsae_jax.activations import writer
from minsae_jax.activations.store import open_store
from minsae_jax.eeg.recordings import open_windows
from minsae_jax.encoder import plan
from minsae_jax.encoder.patchtst.encoder import PatchTSTEncoder
from minsae_jax.locks import lock_folder
from tests.conftest import FIXTURES
from tests.encoder.extraction import contents, extract


@pytest.mark.parametrize("layer", [-1, 0])
def test_store_contains_the_activations_of_every_window(encoder, settings, tmp_path, layer):
    settings = replace(settings, cache_layer=(layer,))
    (extracted,) = extract(encoder, settings, "train")
    folder = tmp_path / "store" / f"l{layer}"
    windows = open_windows(settings.root_path, "train", 42, 1000, 100, 19)
    assert len(windows) % 4 != 0  # the last batch is short
    assert (extracted.split, extracted.n_windows) == ("train", len(windows))
    patients = {name.split("_")[0] for name in windows.files}
    assert (extracted.n_recordings, extracted.n_patients) == (len(windows.files), len(patients))
    assert len(repr(extracted)) < 300
    assert extracted.total_tokens == len(windows) * 19 * 11
    assert not extracted.was_complete
    store = open_store(folder)
    assert (extracted.folder, extracted.fingerprint) == (folder, store.fingerprint)
    assert len(store.shards) == -(-len(windows) // 4)
    x = windows.read(0, len(windows))
    expected = np.concatenate(
        [encoder.activations(x[i : i + 4], layer) for i in range(0, len(x), 4)]
    )
    got = np.concatenate([np.load(shard.path) for shard in store.shards])
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected.reshape(-1, 11, 128), atol=1e-5, rtol=0)
    origin = np.load(folder / "provenance.npz")
    assert len(got) == len(origin["recording"]) == len(origin["window"]) == len(origin["channel"])
    for i in (0, 20, 100, len(got) - 1):
        recording = np.load(windows.folder / str(origin["recordings"][origin["recording"][i]]))
        start = int(origin["window"][i]) * 1000
        window = recording[None, start : start + 1000]
        np.testing.assert_allclose(
            encoder.activations(window, layer)[0, origin["channel"][i]], got[i], atol=1e-5
        )
    assert store.manifest.encoder == encoder.fingerprint
    assert (store.manifest.layer, store.manifest.layer_index) == (layer, layer % 3)
    assert store.manifest.layer_from_end == layer % 3 - 3


def test_shards_of_the_tuh_layout_are_those_of_a_pytorch_loop(encoder, settings, tmp_path):
    """Splits, files, windows, rows and numbers, from the .npy files and plain torch alone."""
    extract(encoder, settings, "train")
    windows = tuh_windows(Path(settings.root_path))
    tensors = read_source(FIXTURES / "tuhab_patch_100/checkpoint.pth").checkpoint.tensors
    state = {key: torch.tensor(tensor) for key, tensor in tensors.items()}
    starts = range(0, len(windows), settings.batch_size)
    shards = sorted((tmp_path / "store" / "l-1").glob("b*.npy"))
    assert [path.name for path in shards] == [f"b{i:04d}.npy" for i in range(len(starts))]
    for path, start in zip(shards, starts, strict=True):
        batch = torch.from_numpy(windows[start : start + settings.batch_size])
        with torch.inference_mode():
            hidden, _ = patchtst_torch.forward(encoder.architecture, state, batch)
        shard = np.load(path)
        assert shard.dtype == np.float32
        expected = hidden[-1].flatten(0, 1).numpy()
        np.testing.assert_allclose(shard, expected, atol=1e-4, rtol=0, err_msg=path.name)


def tuh_windows(folder):
    """Return the training windows of 1,000 samples, in the order of gPatchTST's data set."""
    with (folder / "file_lengths_map.csv").open(newline="") as file:
        lengths = {row["filename"]: int(row["time_len"]) for row in csv.DictReader(file)}
    patients = list(dict.fromkeys(name.split("_")[0] for name in sorted(lengths)))
    random.Random(42).shuffle(patients)
    windows = []
    for patient in patients[: int(len(patients) * 0.7)]:
        for name in sorted(name for name in lengths if name.startswith(f"{patient}_")):
            recording = np.load(folder / name)
            # Each window reserves the samples of a patch, which a prediction head would need.
            count = lengths[name] // (1000 + 100)
            windows.append(recording[: count * 1000].reshape(count, 1000, 19))
    return np.concatenate(windows)


def test_interrupted_store_is_completed_with_the_same_bytes(
    encoder, settings, tmp_path, monkeypatch
):
    folder = tmp_path / "store" / "l-1"
    extract(encoder, settings, "train")
    before, times = contents(folder), {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    (again,) = extract(encoder, settings, "train")
    assert again.was_complete
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == times

    other = replace(settings, out=str(tmp_path / "broken"))
    with (
        failing_write(monkeypatch, after=1),
        pytest.raises(UserError, match=r"could not be written \(disk full\)"),
    ):
        extract(encoder, other, "train")
    extract(encoder, other, "train")
    assert contents(tmp_path / "broken" / "l-1") == before


@contextmanager
def failing_write(monkeypatch, after):
    """Simulate a disk that is full in the middle of a shard."""
    write_all, count = writer._write_all, [0]

    def failing(file, block):
        if file.name.endswith(f"b{after:04d}.npy.tmp"):
            count[0] += 1
            if count[0] == 2:  # after the header
                raise OSError("disk full")
        write_all(file, block)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "_write_all", failing)
        yield
    assert count == [2]


def test_several_layers_in_one_pass(encoder, settings, tmp_path, monkeypatch):
    for layer in (0, 2):
        extract(
            encoder, replace(settings, cache_layer=(layer,), out=str(tmp_path / "alone")), "train"
        )
    stores = extract(encoder, replace(settings, cache_layer=(2, 0)), "train")
    assert [store.folder.name for store in stores] == ["l2", "l0"]
    for layer in ("l0", "l2"):
        assert contents(tmp_path / "store" / layer) == contents(tmp_path / "alone" / layer)
    every = replace(settings, cache_layer=("all",), out=str(tmp_path / "every"))
    with (
        failing_write(monkeypatch, after=1),
        pytest.raises(UserError, match=r"could not be written \(disk full\)"),
    ):
        extract(encoder, every, "train")
    extract(encoder, every, "train")  # one layer is a shard ahead of the others
    assert sorted(p.name for p in (tmp_path / "every").iterdir()) == ["l0", "l1", "l2"]
    for layer in ("l0", "l2"):
        assert contents(tmp_path / "every" / layer) == contents(tmp_path / "alone" / layer)
    assert all(store.was_complete for store in extract(encoder, every, "train"))


@pytest.mark.parametrize(
    ("layers", "message"), [((0, -3), "duplicate layers: 0 -3"), ((3,), "there is no layer 3")]
)
def test_wrong_layers_are_refused(encoder, settings, layers, message):
    with pytest.raises(UserError, match=message):
        extract(encoder, replace(settings, cache_layer=layers), "train")


def test_full_disk_is_reported_before_anything_is_written(encoder, settings, tmp_path, monkeypatch):
    windows = len(open_windows(settings.root_path, "train", 42, 1000, 100, 19))
    needed = 2 * windows * 19 * 11 * 128 * 2
    both = replace(settings, cache_layer=(0, 1), dtype="float16")

    def free(bytes_free):
        monkeypatch.setattr(plan.shutil, "disk_usage", lambda _: SimpleNamespace(free=bytes_free))

    free(needed - 1)
    with pytest.raises(
        UserError, match=rf"need {needed / 1e6:.1f} MB, but .* has {needed / 1e6:.1f} MB free"
    ):
        extract(encoder, both, "train")
    assert list(tmp_path.iterdir()) == []
    free(needed)
    extract(encoder, both, "train")
    free(1)  # files that exist need no space
    assert all(store.was_complete for store in extract(encoder, both, "train"))


def test_bfloat16_products_make_another_store(encoder, settings, tmp_path):
    extract(encoder, settings, "val")
    extract(encoder, replace(settings, precision="bfloat16", out=str(tmp_path / "half")), "val")
    exact, half = (open_store(tmp_path / name, -1).read(0) for name in ("store", "half"))
    assert 1e-4 < np.abs(half - exact).mean() / exact.std() < 1e-2
    with pytest.raises(UserError, match="other settings: precision"):
        extract(encoder, replace(settings, precision="bfloat16"), "val")
    with pytest.raises(UserError, match="other settings: precision"):
        extract(encoder, replace(settings, out=str(tmp_path / "half")), "val")


def test_overwriting_is_refused_before_anything_changes(encoder, settings, tmp_path):
    both = replace(settings, cache_layer=(0, 1))
    extract(encoder, both, "train", "val")
    before = contents(tmp_path / "store" / "l0")
    (tmp_path / "store_val/l1/notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"notes\.txt"):
        extract(encoder, replace(both, overwrite=True), "train", "val")
    (tmp_path / "store_val/l1/notes.txt").unlink()
    with (
        lock_folder(tmp_path / "store_val/l1"),
        pytest.raises(UserError, match="by another process"),
    ):
        extract(encoder, replace(both, overwrite=True), "train", "val")
    assert contents(tmp_path / "store" / "l0") == before


def test_empty_out_is_refused(settings):
    with pytest.raises(UserError, match="--out must be the name of a folder"):
        replace(settings, out="")
    assert str(replace(settings, out="/").store("train", -1)) == "/l-1"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cache_layer": ("all", 1)}, "--cache_layer all cannot be combined"),
        ({"cache_layer": ()}, "--cache_layer requires"),
        ({"split": ()}, "--split requires"),
        ({"split": ("val", "val")}, "--split contains duplicate values"),
        ({"split_seed": -1}, "--split_seed must be"),
    ],
)
def test_wrong_settings_are_refused(settings, change, message):
    with pytest.raises(UserError, match=message):
        replace(settings, **change)


def test_max_batches_limits_the_shards(encoder, settings, tmp_path):
    extract(encoder, replace(settings, max_batches=2), "train")
    folder = tmp_path / "store" / "l-1"
    assert len(open_store(folder).shards) == 2
    assert len(np.load(folder / "provenance.npz")["window"]) == 2 * 4 * 19


def test_another_store_is_never_overwritten(encoder, settings, tmp_path):
    extract(encoder, settings, "val")
    before = contents(tmp_path / "store" / "l-1")
    other = PatchTSTEncoder(replace(encoder.architecture, activation="gelu"), encoder.params)
    with pytest.raises(UserError, match=r"other settings: encoder \("):
        extract(other, settings, "val")
    for change, split in ((replace(settings, batch_size=5), "val"), (settings, "test")):
        with pytest.raises(UserError, match="other settings"):
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
def test_half_precision_store_is_close(encoder, settings, tmp_path, dtype):
    extract(encoder, settings, "val")
    extract(encoder, replace(settings, dtype=dtype, out=str(tmp_path / dtype)), "val")
    exact, half = (
        open_store(tmp_path / "store", -1).read(0),
        open_store(tmp_path / dtype, -1).read(0),
    )
    half = half.astype(np.float32)
    error = np.abs(half - exact).max() / np.abs(exact).max()
    assert 0 < error < {"float16": 5e-4, "bfloat16": 4e-3}[dtype]


def test_forced_revin_normalises_the_windows(encoder, settings, tmp_path):
    extract(encoder, settings, "val")
    extract(encoder, replace(settings, force_revin=True, out=str(tmp_path / "forced")), "val")
    plain, forced = (open_store(tmp_path / name, -1).read(0) for name in ("store", "forced"))
    assert np.abs(plain - forced).max() > 0.1
    windows = (
        open_windows(settings.root_path, "val", 42, 1000, 100, 19).read(0, 1).astype(np.float64)
    )
    by_hand = (windows - windows.mean(1, keepdims=True)) / np.sqrt(
        windows.var(1, keepdims=True) + 1e-5
    )
    expected = np.asarray(encoder.activations(by_hand.astype(np.float32))).reshape(-1, 128)
    np.testing.assert_allclose(forced[: len(expected)], expected, atol=1e-4)


def test_folders_of_stores(settings):
    assert str(replace(settings, out="x", split=("val",)).store("val", -1)) == "x/l-1"
    several = replace(settings, out="x/y/", split=("train", "val"))
    assert [str(several.store(s, -1)) for s in several.split] == ["x/y/l-1", "x/y_val/l-1"]
    default = replace(settings, out=None, split=("train", "val", "test", "all"))
    assert [str(default.store(s, 2)) for s in default.split] == [
        "embeddings/store/l2",
        "embeddings/store_val/l2",
        "embeddings/store_test/l2",
        "embeddings/store_all/l2",
    ]


def test_good_recordings_make_no_warnings(encoder, settings):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        extract(encoder, settings, "val")
