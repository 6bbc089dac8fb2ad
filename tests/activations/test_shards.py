"""The store's format: what is written, what goes on after a break, what is refused."""

import hashlib
import json

import ml_dtypes
import numpy as np
import pytest

from minsae_jax import UserError
from minsae_jax.activations.shards import StoreWriter, open_store

IDENTITY = {
    "layer": -1, "layer_index": 2, "dtype": "float32", "n_tokens": 3, "d_model": 4, "encoder": "e" * 64,
    "data": {"split": "train", "batch_size": 2},
}  # fmt: skip


def arrays(dtype=np.float32):
    rng = np.random.default_rng(0)
    return [rng.normal(size=(sequences, 3, 4)).astype(dtype) for sequences in (4, 4, 2)]


def write(folder, xs, **changes):
    writer = StoreWriter(folder, IDENTITY | changes)
    for i, x in enumerate(xs):
        if i not in writer.done:
            writer.write(i, x)
    writer.finish({"window": np.arange(10)})
    return folder


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "store" / "l-1", arrays())


def test_what_is_written(folder):
    assert sorted(p.name for p in folder.iterdir()) == [
        "b0000.npy", "b0001.npy", "b0002.npy", "manifest.json", "provenance.npz",
    ]  # fmt: skip
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["complete"]
    assert manifest | IDENTITY == manifest
    assert [(s["file"], s["shape"], s["rows"]) for s in manifest["shards"]] == [
        ("b0000.npy", [4, 3, 4], 12), ("b0001.npy", [4, 3, 4], 12), ("b0002.npy", [2, 3, 4], 6),
    ]  # fmt: skip
    for shard, x in zip(manifest["shards"], arrays(), strict=True):
        assert shard["sha256"] == hashlib.sha256((folder / shard["file"]).read_bytes()).hexdigest()
        np.testing.assert_array_equal(np.load(folder / shard["file"]), x)


@pytest.mark.parametrize("path", ["store", "store/l-1"])
def test_read(folder, tmp_path, path):
    store = open_store(tmp_path / path, -1)
    store.verify()
    assert (store.rows, store.d_model, len(store.shards)) == (30, 4, 3)
    np.testing.assert_array_equal(store.read(1, 2, 7), arrays()[1].reshape(-1, 4)[2:7])
    assert open_store(tmp_path / path, 2).rows == 30 if path.endswith("l-1") else True  # -1 of three layers is 2


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_reads_as_float32(tmp_path, dtype):
    kind = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[dtype]
    folder = write(tmp_path / "l0", arrays(kind), dtype=dtype)
    store = open_store(folder)
    assert store.read(0).dtype == np.float32
    np.testing.assert_array_equal(store.read(0), arrays(kind)[0].astype(np.float32).reshape(-1, 4))
    assert np.load(folder / "b0000.npy").dtype == (np.uint16 if dtype == "bfloat16" else np.float16)


def test_without_manifest_in_numerical_order(tmp_path):
    for i in (2, 10000, 9999, 0):
        np.save(tmp_path / f"b{i:04d}.npy", np.full((1, 2, 4), i, np.float32))
    store = open_store(tmp_path, -1)
    assert [int(store.read(i)[0, 0]) for i in range(4)] == [0, 2, 9999, 10000]
    assert store.manifest == {}
    before = store.fingerprint
    np.save(tmp_path / "b0003.npy", np.zeros((5, 2, 4), np.float32))
    assert open_store(tmp_path, -1).fingerprint != before


def test_an_interrupted_store_goes_on(tmp_path, folder):
    undisturbed = {p.name: p.read_bytes() for p in folder.iterdir()}
    broken = tmp_path / "broken"
    writer = StoreWriter(broken, IDENTITY)
    writer.write(2, arrays()[2])
    writer.write(0, arrays()[0])
    (broken / "b0001.npy.tmp").write_bytes(b"half")
    (broken / "b0001.npy").write_bytes(b"renamed, but not in the manifest yet")
    with pytest.raises(UserError, match="is unfinished"):
        open_store(broken)
    assert StoreWriter(broken, IDENTITY).done == {0, 2}
    (broken / "b0000.npy").write_bytes((broken / "b0000.npy").read_bytes()[:-1] + b"x")
    assert StoreWriter(broken, IDENTITY).done == {2}
    write(broken, arrays())
    assert {p.name: p.read_bytes() for p in broken.iterdir()} == undisturbed


def test_a_finished_store_is_left_alone(folder):
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert StoreWriter(folder, IDENTITY).finished
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == before
    (folder / "b0001.npy").unlink()
    writer = StoreWriter(folder, IDENTITY)
    assert not writer.finished
    assert writer.done == {0, 2}


def test_another_store_in_the_folder(folder):
    with pytest.raises(UserError, match=r"other settings: encoder \(eeee.*, now ffff.*\), split \(train, now val\)"):
        StoreWriter(folder, IDENTITY | {"encoder": "f" * 64, "data": {"split": "val", "batch_size": 2}})
    assert open_store(folder).rows == 30
    writer = StoreWriter(folder, IDENTITY | {"encoder": "f" * 64}, overwrite=True)
    assert writer.done == set()
    assert sorted(p.name for p in folder.iterdir()) == ["manifest.json"]


def test_files_of_others_are_never_removed(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"thesis.tex"):
            StoreWriter(tmp_path, IDENTITY, overwrite)
    assert (tmp_path / "thesis.tex").exists()


def test_minsae_files_need_overwrite(tmp_path):
    np.save(tmp_path / "b0000.npy", np.zeros((1, 2, 4), np.float32))
    with pytest.raises(UserError, match=r"b0000.npy.*--overwrite"):
        StoreWriter(tmp_path, IDENTITY)
    assert StoreWriter(tmp_path, IDENTITY, overwrite=True).done == set()


def test_damage_is_named(folder):
    np.save(folder / "b0007.npy", arrays()[0])
    with pytest.raises(UserError, match=r"b0007.npy is not in the manifest"):
        open_store(folder)
    (folder / "b0007.npy").unlink()
    good = (folder / "b0001.npy").read_bytes()
    (folder / "b0001.npy").write_bytes(good[:-4])
    with pytest.raises(UserError, match=r"b0001.npy has \d+ bytes instead of"):
        open_store(folder)
    (folder / "b0001.npy").write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(UserError, match=r"b0001.npy fails its checksum"):
        open_store(folder).verify()
    (folder / "b0001.npy").unlink()
    with pytest.raises(UserError, match=r"b0001.npy is missing"):
        open_store(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest.json is damaged"):
        open_store(folder)


def test_wrong_places(folder, tmp_path):
    with pytest.raises(UserError, match="there is no store"):
        open_store(tmp_path / "nowhere", -1)
    with pytest.raises(UserError, match=r"no store of layer 0 in .*: it holds l-1"):
        open_store(tmp_path / "store", 0)
    with pytest.raises(UserError, match=r"is of layer -1, not 0"):
        open_store(folder, 0)


def test_bad_files_without_manifest(tmp_path):
    np.save(tmp_path / "b0000.npy", np.zeros((2, 3, 4), np.float32))
    (tmp_path / "b0001.npy").write_bytes((tmp_path / "b0000.npy").read_bytes()[:-8])
    with pytest.raises(UserError, match=r"b0001.npy is no .npy array, or a damaged one"):
        open_store(tmp_path, -1)
    np.save(tmp_path / "b0001.npy", np.zeros((2, 3, 5), np.float32))
    with pytest.raises(UserError, match="do not belong together"):
        open_store(tmp_path, -1)
    np.save(tmp_path / "b0001.npy", np.zeros((2, 3, 4), int))
    with pytest.raises(UserError, match=r"b0001.npy must hold"):
        open_store(tmp_path, -1)
