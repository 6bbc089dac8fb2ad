"""Recordings to a store: right numbers in the right order, each with its origin, and nothing done twice."""

import io
import json
import os
import shutil
import subprocess
import sys
import warnings
from contextlib import contextmanager
from dataclasses import replace
from socket import socket
from types import SimpleNamespace

import numpy as np
import pytest

from convert.encoder import convert_encoder
from minsae_jax import UserError
from minsae_jax.activations import writer
from minsae_jax.activations.shards import open_store
from minsae_jax.config import Extract
from minsae_jax.eeg.recordings import open_windows
from minsae_jax.encoder import extract as extraction
from minsae_jax.encoder.converted import Encoder
from minsae_jax.files import locked
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
    with (
        failing_write(monkeypatch, after=1),
        pytest.raises(UserError, match=r"could not be written \(disk full\): make room"),
    ):
        extract(encoder, other, "train")
    extract(encoder, other, "train")
    assert contents(tmp_path / "broken" / "l-1") == before


@contextmanager
def failing_write(monkeypatch, after):
    """The disk is full in the middle of a shard."""
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
        extract(encoder, replace(settings, cache_layer=(layer,), out=str(tmp_path / "alone")), "train")
    told = extract(encoder, replace(settings, cache_layer=(2, 0)), "train")
    assert told.endswith(f"written to {tmp_path}/store/l2 and {tmp_path}/store/l0")
    for layer in ("l0", "l2"):
        assert contents(tmp_path / "store" / layer) == contents(tmp_path / "alone" / layer)
    every = replace(settings, cache_layer=("all",), out=str(tmp_path / "every"))
    with (
        failing_write(monkeypatch, after=1),
        pytest.raises(UserError, match=r"could not be written \(disk full\): make room"),
    ):
        extract(encoder, every, "train")
    extract(encoder, every, "train")  # one layer is a shard ahead of the others
    assert sorted(p.name for p in (tmp_path / "every").iterdir()) == ["l0", "l1", "l2"]
    for layer in ("l0", "l2"):
        assert contents(tmp_path / "every" / layer) == contents(tmp_path / "alone" / layer)
    assert "l1 and" in extract(encoder, every, "train")  # finished already
    for layers, told in (((0, -3), "names a layer twice: 0 -3"), ((3,), "there is no layer 3")):
        with pytest.raises(UserError, match=told):
            extract(encoder, replace(settings, cache_layer=layers), "train")


def test_a_full_disk_is_seen_before_the_start(encoder, settings, tmp_path, monkeypatch):
    windows = len(open_windows(settings.root_path, "train", 42, 1000, 100, 19))
    needed = 2 * windows * 19 * 11 * 128 * 2
    both = replace(settings, cache_layer=(0, 1), dtype="float16")

    def free(bytes_free):
        monkeypatch.setattr(extraction.shutil, "disk_usage", lambda _: SimpleNamespace(free=bytes_free))

    free(needed - 1)
    with pytest.raises(UserError, match=rf"need {needed / 1e9:.1f} GB, but .* has {needed / 1e9:.1f} GB free"):
        extract(encoder, both, "train")
    assert list(tmp_path.iterdir()) == []
    free(needed)
    extract(encoder, both, "train")
    free(1)  # what is there needs no room
    assert "finished already" in extract(encoder, both, "train")


def spoil(root, names):
    """One recording of each kind that cannot be used; name to what is told of it."""
    told = {}

    def save(name, change, reason):
        np.save(root / name, change(np.load(root / name)))
        told[name] = reason

    def set_nan(x):
        x[70, 3] = np.nan
        return x

    save(names[0], lambda x: x[:, :18], "has 18 channels, but the encoder wants 19")
    save(names[1], set_nan, "holds NaN or infinity at sample 70")
    save(names[2], lambda x: x[:, 0], "has 1 channels")
    save(names[3], lambda x: (x * 100).astype(np.int16), "must be floating-point")
    save(names[4], lambda x: x[:-7], "file_lengths_map.csv says")
    (root / names[5]).write_bytes((root / names[5]).read_bytes()[:-40])
    (root / names[6]).write_bytes(b"")
    told |= {names[5]: "cannot be read", names[6]: "cannot be read"}
    lengths = (root / "file_lengths_map.csv").read_text().splitlines()
    kept = [line for line in lengths if not line.startswith(names[7])]
    (root / "file_lengths_map.csv").write_text("\n".join([*kept, "demo9999_s001_t000_preprocessed.npy,9000"]) + "\n")
    return told | {names[7]: "has no row for it", "demo9999_s001_t000_preprocessed.npy": "there is no such file"}


def test_bad_recordings_are_told_together_or_left_out(encoder, settings, demo_folder, tmp_path):
    root = shutil.copytree(demo_folder, tmp_path / "data")
    settings = replace(settings, root_path=str(root))
    names = open_windows(root, "all", 42, 1000, 100, 19).files
    told = spoil(root, names)
    with pytest.raises(UserError) as e:
        extract(encoder, settings, "train", "val", "test")
    for name, reason in told.items():
        (sentence,) = [one for one in str(e.value).split("; ") if name in one]
        assert reason in sentence
    assert "--on_bad_recording skip" in str(e.value)
    assert not (tmp_path / "store").exists()

    skipping = replace(settings, on_bad_recording="skip")
    with pytest.warns(UserWarning, match=r"left out of split all: .* and 6 more; the manifest names them all"):
        extract(encoder, skipping, "all")
    store = open_store(tmp_path / "store" / "l-1")
    assert store.manifest["data"]["skipped"].keys() == told.keys()
    origin = np.load(tmp_path / "store/l-1/provenance.npz")
    good = [n for n in names if n not in told]
    assert origin["recordings"].tolist() == good
    x = np.load(root / good[0])[None, :1000]
    np.testing.assert_allclose(store.read(0, 0, 11), np.asarray(encoder.activations(x))[0, 0], atol=1e-5)

    for name in good:
        (root / name).write_bytes(b"")
    with pytest.raises(UserError, match="split test is empty: none of its recordings can be used"):
        extract(encoder, replace(skipping, out=str(tmp_path / "other")), "test")


def test_bfloat16_products(encoder, settings, tmp_path):
    extract(encoder, settings, "val")
    extract(encoder, replace(settings, precision="bfloat16", out=str(tmp_path / "half")), "val")
    exact, half = (open_store(tmp_path / name, -1).read(0) for name in ("store", "half"))
    assert 1e-4 < np.abs(half - exact).mean() / exact.std() < 1e-2
    with pytest.raises(UserError, match="other settings: precision"):
        extract(encoder, replace(settings, precision="bfloat16"), "val")
    with pytest.raises(UserError, match="other settings: precision"):
        extract(encoder, replace(settings, out=str(tmp_path / "half")), "val")


def test_skipping_makes_room_for_others(encoder, settings, demo_folder, tmp_path):
    root = shutil.copytree(demo_folder, tmp_path / "data")
    first, *others = open_windows(root, "train", 42, 1000, 100, 19).files
    eeg = np.load(root / first)
    eeg[5] = np.nan
    np.save(root / first, eeg)
    few = replace(settings, root_path=str(root), on_bad_recording="skip", max_batches=1)
    with pytest.warns(UserWarning, match="left out of split train"):
        extract(encoder, few, "train")
    store = open_store(tmp_path / "store" / "l-1")
    assert store.manifest["data"]["n_windows"] == 4
    assert np.load(tmp_path / "store/l-1/provenance.npz")["recordings"][0] == others[0]


@pytest.mark.parametrize("change", [lambda x: 2 * x, lambda x: x[:1500]])
def test_a_recording_that_changes_on_the_way(encoder, settings, demo_folder, tmp_path, monkeypatch, change):
    root = shutil.copytree(demo_folder, tmp_path / "data")
    name = open_windows(root, "train", 42, 1000, 100, 19).files[-1]
    write = writer.StoreWriter.write

    def changing(self, number, pieces):
        if number == 0:
            np.save(root / name, change(np.load(root / name)))
        write(self, number, pieces)

    monkeypatch.setattr(writer.StoreWriter, "write", changing)
    with pytest.raises(UserError, match=f"recording {name} has changed since the start"):
        extract(encoder, replace(settings, root_path=str(root), batch_size=1), "train")
    assert not (tmp_path / "store/l-1/provenance.npz").exists()


def test_overwriting_is_refused_before_anything_is_touched(encoder, settings, tmp_path):
    both = replace(settings, cache_layer=(0, 1))
    extract(encoder, both, "train", "val")
    before = contents(tmp_path / "store" / "l0")
    (tmp_path / "store_val/l1/notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds notes\.txt"):
        extract(encoder, replace(both, overwrite=True), "train", "val")
    (tmp_path / "store_val/l1/notes.txt").unlink()
    with locked(tmp_path / "store_val/l1"), pytest.raises(UserError, match="by another process"):
        extract(encoder, replace(both, overwrite=True), "train", "val")
    assert contents(tmp_path / "store" / "l0") == before


def test_wrong_out():
    with pytest.raises(UserError, match="--out must name a folder"):
        Extract(out="")
    assert str(Extract(out="/").store("train", -1)) == "/l-1"


PROCESS = """
import os, sys
from minsae_jax import sharding
from minsae_jax.config import Extract
sharding.start(distributed=True)
from minsae_jax.__main__ import open_encoder
from minsae_jax.encoder.extract import extract
import jax
assert jax.process_count() == 2
checkpoint, root, out, batches = sys.argv[1:]
settings = Extract(root_path=root, out=out, batch_size=4, cache_layer=(0, -1), split=("train", "val"))
writes = []
if batches != "all" and jax.process_index() == 1:  # dies
    import os
    from minsae_jax.activations import writer
    StoreWriter = writer.StoreWriter
    write = StoreWriter.write
    def dying(self, number, pieces):
        write(self, number, pieces)
        writes.append(number)
        if len(writes) == int(batches):
            os._exit(9)
    StoreWriter.write = dying
from minsae_jax import cli
if "fails" in os.environ and jax.process_index() == 1:
    from minsae_jax.activations import writer
    def failing(file, block):
        raise OSError(28, "No space left on device")
    writer._write_all = failing
cli.run(lambda _: list(extract(open_encoder(checkpoint), settings)), [])
"""


def test_two_processes_write_the_store_of_one(encoder, settings, tmp_path, monkeypatch):
    extract(encoder, replace(settings, cache_layer=(0, -1)), "train", "val")
    checkpoint = FIXTURES / "tuhab_patch_100/checkpoint.pth"

    def run_both(batches):
        with socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
        environment |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-c", PROCESS, checkpoint, settings.root_path, tmp_path / "two", batches]
        both = [
            subprocess.Popen(list(map(str, command)), env=environment | {"JAX_PROCESS_ID": str(i)},
                             stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            for i in range(2)
        ]  # fmt: skip
        if batches != "all":  # the other would wait for the dead one until it is missed
            both[1].wait(100)
            both[0].kill()
        told = [process.communicate(timeout=100)[1] for process in both]
        return [process.returncode for process in both], told

    monkeypatch.setenv("fails", "1")
    codes, told = run_both("all")
    assert codes == [2, 2], told
    assert "could not be written (No space left on device)" in told[1]
    assert told[0].splitlines()[-1].startswith("error: another process failed")
    monkeypatch.delenv("fails")
    codes, told = run_both("3")
    assert codes[1] == 9, told
    assert not any((tmp_path / "two" / layer / "provenance.npz").exists() for layer in ("l0", "l-1"))
    assert list(tmp_path.glob("two/*/manifest.1.json"))
    codes, told = run_both("all")
    assert codes == [0, 0], told
    for name in ("store/l0", "store/l-1", "store_val/l0", "store_val/l-1"):
        one, two = (contents(tmp_path / name.replace("store", base, 1)) for base in ("store", "two"))
        assert one.keys() == two.keys()
        for file in one:
            if file.endswith("npy"):
                np.testing.assert_allclose(*(np.load(io.BytesIO(c[file])) for c in (one, two)), atol=1e-5, rtol=0)
        manifests = [json.loads(c["manifest.json"]) for c in (one, two)]
        for manifest in manifests:
            for entry in manifest["shards"]:
                entry.pop("sha256")  # another number of devices a process
        assert manifests[0] == manifests[1]
        assert one["provenance.npz"] == two["provenance.npz"]


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
