"""The store's format: its files, resuming after a break, and errors."""

import hashlib
import json
import os
import resource
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from minsae_jax import UserError
from minsae_jax.activations.manifest import StoreIdentity
from minsae_jax.activations.store import open_store, sibling_store, store_folder
from minsae_jax.activations.tokens import TokenGrid
from minsae_jax.activations.writer import StoreWriter
from minsae_jax.parallel.processes import Share

IDENTITY = StoreIdentity(
    layer=-1,
    layer_index=2,
    dtype="float32",
    n_tokens=3,
    d_model=4,
    encoder="e" * 64,
    data={"split": "train", "batch_size": 2},
)


def arrays(dtype=np.float32):
    rng = np.random.default_rng(0)
    return [rng.normal(size=(sequences, 3, 4)).astype(dtype) for sequences in (4, 4, 2)]


@contextmanager
def begun(folder, identity=IDENTITY, overwrite=False, layer_from_end=None):
    with StoreWriter(folder, identity, overwrite, layer_from_end) as writer:
        writer.begin()
        yield writer


def write(folder, xs, layer_from_end=None, **changes):
    identity = replace(IDENTITY, **changes)
    with begun(folder, identity, layer_from_end=layer_from_end) as writer:
        for i, x in enumerate(xs):
            if i not in writer.done:
                writer.write(i, [x])
        recording = np.arange(sum(map(len, xs)))
        writer.finish({"recording": recording}, TokenGrid.patches(IDENTITY.n_tokens, 10))
    return folder


def opened(folder, identity=IDENTITY, overwrite=False):
    """Begin to write; return whether the store is finished, and the numbers of its shards."""
    with begun(folder, identity, overwrite) as writer:
        return writer.finished, writer.done


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "store" / "l-1", arrays())


def test_writer_writes_shards_manifest_and_provenance(folder):
    assert sorted(p.name for p in folder.iterdir()) == [
        "SHA256SUMS", "b0000.npy", "b0001.npy", "b0002.npy", "manifest.json", "provenance.npz",
        "tokens.npz",
    ]  # fmt: skip
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["complete"]
    assert manifest | dict(IDENTITY.to_json()) == manifest
    assert [(s["file"], s["shape"], s["rows"]) for s in manifest["shards"]] == [
        ("b0000.npy", [4, 3, 4], 12), ("b0001.npy", [4, 3, 4], 12), ("b0002.npy", [2, 3, 4], 6),
    ]  # fmt: skip
    for shard, x in zip(manifest["shards"], arrays(), strict=True):
        assert shard["sha256"] == hashlib.sha256((folder / shard["file"]).read_bytes()).hexdigest()
        np.testing.assert_array_equal(np.load(folder / shard["file"]), x)


@pytest.mark.parametrize("path", ["store", "store/l-1"])
def test_read_returns_the_written_tokens(folder, tmp_path, path):
    store = open_store(tmp_path / path, -1)
    store.verify()
    assert (store.total_tokens, store.d_model, len(store.shards)) == (30, 4, 3)
    np.testing.assert_array_equal(store.read(1, 2, 7), arrays()[1].reshape(-1, 4)[2:7])


def test_no_tokens_can_be_read(folder):
    store = open_store(folder)
    assert store.read(1, 5, 5).shape == (0, 4)
    assert store.read_rows(7, 7).shape == (0, 4)


def test_layer_may_count_from_the_start_or_the_end(folder):
    assert open_store(folder, 2).total_tokens == 30  # of three layers
    assert open_store(folder, -1).total_tokens == 30


def test_more_shards_than_file_descriptors(tmp_path):
    for i in range(100):
        np.save(tmp_path / f"b{i:04d}.npy", np.full((1, 2, 4), i, np.float32))
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 20, before[1]))
    try:
        store = open_store(tmp_path, -1)
        assert [int(store.read(i)[0, 0]) for i in range(100)] == list(range(100))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_preserved(tmp_path, dtype):
    kind = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[dtype]
    folder = write(tmp_path / "l0", arrays(kind), dtype=dtype)
    store = open_store(folder)
    assert store.dtype == store.read(0).dtype == kind
    np.testing.assert_array_equal(store.read(0), arrays(kind)[0].reshape(-1, 4))
    assert np.load(folder / "b0000.npy").dtype == (np.uint16 if dtype == "bfloat16" else np.float16)


def test_shards_without_manifest_are_sorted_by_number(tmp_path):
    for i in (2, 10000, 9999, 0):
        np.save(tmp_path / f"b{i:04d}.npy", np.full((1, 2, 4), i, np.float32))
    store = open_store(tmp_path, -1)
    assert [int(store.read(i)[0, 0]) for i in range(4)] == [0, 2, 9999, 10000]
    assert store.manifest is None
    before = store.fingerprint
    np.save(tmp_path / "b0003.npy", np.zeros((5, 2, 4), np.float32))
    assert open_store(tmp_path, -1).fingerprint != before


def test_interrupted_store_is_resumed(tmp_path, folder):
    undisturbed = {p.name: p.read_bytes() for p in folder.iterdir()}
    broken = tmp_path / "broken"
    with begun(broken) as writer:
        writer.write(2, np.array_split(arrays()[2], 2))
        writer.write(0, [arrays()[0]])
    (broken / "b0001.npy.tmp").write_bytes(b"half")
    (broken / "b0001.npy").write_bytes(b"renamed, but not in the manifest yet")
    with pytest.raises(UserError, match="is incomplete"):
        open_store(broken)
    assert opened(broken) == (False, {0, 2})
    (broken / "b0000.npy").write_bytes((broken / "b0000.npy").read_bytes()[:-1] + b"x")
    assert opened(broken) == (False, {2})
    write(broken, arrays())
    assert {p.name: p.read_bytes() for p in broken.iterdir()} == undisturbed


def test_finished_store_is_not_changed(folder):
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert opened(folder)[0]
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == before
    (folder / "b0001.npy").unlink()
    assert opened(folder) == (False, {0, 2})


def test_store_of_other_settings_requires_overwrite(folder):
    with pytest.raises(
        UserError, match=r"other settings: encoder \(eeee.*, now ffff.*\), split \(train, now val\)"
    ):
        opened(folder, replace(IDENTITY, encoder="f" * 64, data={"split": "val", "batch_size": 2}))
    assert open_store(folder).total_tokens == 30
    assert opened(folder, replace(IDENTITY, encoder="f" * 64), overwrite=True) == (False, set())
    assert sorted(p.name for p in folder.iterdir()) == ["manifest.json"]


@pytest.mark.parametrize("name", ["thesis.tex", "b1-thesis.npy", "backup.npy"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_files_of_others_are_never_removed(tmp_path, name, overwrite):
    (tmp_path / name).write_text("years of work")
    with pytest.raises(UserError, match=name):
        opened(tmp_path, overwrite=overwrite)
    assert (tmp_path / name).exists()


def test_shards_without_manifest_require_overwrite(tmp_path):
    np.save(tmp_path / "b0000.npy", np.zeros((1, 2, 4), np.float32))
    with pytest.raises(UserError, match=r"b0000.npy.*--overwrite"):
        opened(tmp_path)
    assert opened(tmp_path, overwrite=True) == (False, set())


def fails(folder, share):
    """Return whether a file that this process of a cluster reads differs from its checksum."""
    try:
        open_store(folder).verify(share)
    except UserError:
        return True
    return False


def test_damage_is_reported(folder):
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
    shares = [Share(i, 3) for i in range(3)]
    assert [share for share in shares if fails(folder, share)] == [shares[1]]
    (folder / "b0001.npy").unlink()
    with pytest.raises(UserError, match=r"b0001.npy is missing"):
        open_store(folder)
    write(folder, arrays())  # rewrites the missing shard, as the messages say
    open_store(folder).verify()
    (folder / "provenance.npz").unlink()
    with pytest.raises(UserError, match=r"provenance.npz is missing"):
        open_store(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest.json is damaged"):
        open_store(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"shards": []},
        {"shards": None},
        {"shards": [{}]},
        {"shards": [1]},
        {"format_version": "1"},
        {"data": None},
        {"d_model": None},
        {"dtype": "float17"},
        {"layer": None},
        {"complete": 1},
        {"n_tokens": 5},
        {"rows": 5},
        {"rows": "5"},
        {"sha256": "x"},
        {"file": 3},
        {"bytes": None},
        {"shape": [4, 3]},
    ],
)
def test_invalid_manifests_are_refused(folder, change):
    manifest = json.loads((folder / "manifest.json").read_text())
    ((key, _),) = change.items()
    (manifest if key in manifest else manifest["shards"][0]).update(change)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for attempt in (lambda: open_store(folder), lambda: opened(folder)):
        with pytest.raises(UserError, match=r"manifest.json is damaged.*--overwrite"):
            attempt()


def test_headers_must_match_the_manifest(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"dtype": "bfloat16"}))
    with pytest.raises(UserError, match=r"b0000.npy is float32\[4, 3, 4\], not bfloat16"):
        open_store(folder)


def test_second_writer_is_refused(tmp_path):
    with (
        StoreWriter(tmp_path / "l-1", IDENTITY),
        pytest.raises(UserError, match="by another process"),
    ):
        opened(tmp_path / "l-1")
    assert opened(tmp_path / "l-1") == (False, set())


def test_store_interrupted_at_its_first_file_is_resumed(tmp_path):
    (tmp_path / "manifest.json.tmp").write_text("{")
    assert opened(tmp_path) == (False, set())


def test_only_layer_of_a_folder_is_opened(folder):
    assert open_store(folder.parent).folder == folder
    (folder.parent / "l0").mkdir()
    with pytest.raises(UserError, match=r"no store in .*: it contains l-1, l0"):
        open_store(folder.parent)


def test_layer_of_a_folder_is_opened_by_either_number(folder):
    write(folder.parent / "l0", arrays(), layer=0, layer_index=0)
    assert open_store(folder.parent, -1).folder == folder
    assert open_store(folder.parent, 2).folder == folder
    assert open_store(folder.parent, 0).folder == folder.parent / "l0"
    with pytest.raises(UserError, match="no store of layer 1"):
        open_store(folder.parent, 1)


def test_last_layer_is_opened_as_minus_1_although_it_was_extracted_by_its_number(tmp_path):
    for layer in range(3):
        write(tmp_path / f"l{layer}", arrays(), layer - 3, layer=layer, layer_index=layer)
    assert open_store(tmp_path, -1).folder == tmp_path / "l2"
    assert open_store(tmp_path, -3).folder == tmp_path / "l0"
    assert open_store(tmp_path / "l1", -2).folder == tmp_path / "l1"
    with pytest.raises(UserError, match=r"is of layer 1, not -1"):
        open_store(tmp_path / "l1", -1)
    with pytest.raises(UserError, match="no store of layer -4"):
        open_store(tmp_path, -4)


def test_missing_stores_and_layers_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match="there is no store"):
        open_store(tmp_path / "nowhere", -1)
    with pytest.raises(
        UserError,
        match=r"no store of layer 0 in .*: it contains l-1; choose one of these with "
        r"`train --cache_layer`, or write it with `extract --cache_layer 0`$",
    ):
        open_store(tmp_path / "store", 0)
    with pytest.raises(UserError, match=r"is of layer -1, not 0"):
        open_store(folder, 0)


def test_invalid_shards_without_manifest_are_refused(tmp_path):
    np.save(tmp_path / "b0000.npy", np.zeros((2, 3, 4), np.float32))
    (tmp_path / "b0001.npy").write_bytes((tmp_path / "b0000.npy").read_bytes()[:-8])
    with pytest.raises(UserError, match=r"b0001.npy is not a .npy array, or is damaged"):
        open_store(tmp_path, -1)
    np.save(tmp_path / "b0001.npy", np.zeros((2, 3, 5), np.float32))
    with pytest.raises(UserError, match=r"b0001.npy has d_model 5 and dtype float32, but b0000"):
        open_store(tmp_path, -1)
    np.save(tmp_path / "b0001.npy", np.zeros((2, 3, 4), int))
    with pytest.raises(UserError, match=r"b0001.npy must be"):
        open_store(tmp_path, -1)


def of_two_processes(folder, monkeypatch):
    """Write a store with two processes that are killed before they finish."""
    for process, numbers in ((0, (0, 2)), (1, (1,))):
        monkeypatch.setattr(jax, "process_index", lambda p=process: p)
        with begun(folder) as writer:
            for i in numbers:
                writer.write(i, [arrays()[i]])
    monkeypatch.undo()
    assert (folder / "manifest.1.json").exists()
    return folder


def dies_at(monkeypatch, name):
    def unlink(self, missing_ok=False, real=Path.unlink):
        if self.name == name:
            raise KeyboardInterrupt
        real(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)


def test_partial_manifests_are_merged_once(folder, tmp_path, monkeypatch):
    undisturbed = {p.name: p.read_bytes() for p in folder.iterdir()}
    two = of_two_processes(tmp_path / "two", monkeypatch)
    for _ in range(2):  # dies after the manifest was merged
        dies_at(monkeypatch, "manifest.1.json")
        with pytest.raises(KeyboardInterrupt):
            opened(two)
        monkeypatch.undo()
    assert opened(two) == (False, {0, 1, 2})
    write(two, arrays())
    assert {p.name: p.read_bytes() for p in two.iterdir()} == undisturbed


def test_partial_manifests_of_another_store_are_ignored(folder, tmp_path, monkeypatch):
    two = of_two_processes(tmp_path / "two", monkeypatch)
    other = replace(IDENTITY, encoder="another")
    dies_at(monkeypatch, "manifest.1.json")
    with pytest.raises(KeyboardInterrupt):
        opened(two, other, overwrite=True)
    monkeypatch.undo()
    assert opened(two) == (False, {0, 1, 2})  # nothing was touched
    assert not (two / "manifest.1.json").exists()
    of_two_processes(tmp_path / "three", monkeypatch)
    path = tmp_path / "three/manifest.json"
    manifest = json.loads(path.read_text()) | {"encoder": "another", "shards": []}
    path.write_text(json.dumps(manifest))
    assert opened(tmp_path / "three", other) == (False, set())


def test_damaged_partial_manifests_are_ignored(tmp_path, monkeypatch):
    two = of_two_processes(tmp_path / "two", monkeypatch)
    (two / "manifest.1.json").write_text('{"sha')
    assert opened(two) == (False, {0, 2})


def test_partial_manifests_of_a_finished_store_are_removed(folder):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    (folder / "manifest.1.json").write_text("{}")
    assert opened(folder) == (True, {0, 1, 2})
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_damaged_provenance_is_written_again(folder):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    for content in (b"junk", b""):
        (folder / "provenance.npz").write_bytes(content)
        with pytest.raises(UserError, match=r"provenance\.npz is damaged"):
            open_store(folder)
        write(folder, arrays())
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    np.savez(folder / "provenance.npz", recording=np.zeros(3))
    with pytest.raises(UserError, match="is of another store"):
        open_store(folder)


def test_stores_of_the_first_version_have_float32_precision(folder):
    data = dict(IDENTITY.data) | {"precision": "float32", "skipped": {}}
    assert opened(folder, replace(IDENTITY, data=data))[0]
    with pytest.raises(UserError, match=r"other settings: precision \(float32, now bfloat16\)"):
        opened(folder, replace(IDENTITY, data=data | {"precision": "bfloat16"}))


@pytest.mark.parametrize("dtype", [">f4", ">f8", "<f8", np.longdouble, ">f2"])
def test_any_float_dtype_is_read_without_manifest(tmp_path, dtype):
    x = np.random.default_rng(0).normal(size=(3, 5, 4))
    np.save(tmp_path / "b0000.npy", x.astype(dtype))
    tokens = open_store(tmp_path).read(0)
    assert tokens.dtype in (np.float32, np.float16)
    np.testing.assert_allclose(tokens, x.reshape(-1, 4), rtol=1e-3)


def test_unknown_keys_of_a_manifest_are_preserved(folder):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text()) | {"sampling_rate": 100}
    path.write_text(json.dumps(manifest))
    fingerprint = open_store(folder).fingerprint
    content = json.dumps(manifest, sort_keys=True).encode()
    assert fingerprint == hashlib.sha256(content).hexdigest()
    (folder / "b0001.npy").unlink()
    write(folder, arrays())
    assert json.loads(path.read_text())["sampling_rate"] == 100


def test_shard_that_became_shorter_is_reported(folder):
    store = open_store(folder)
    np.testing.assert_array_equal(store.read(1, 2, 7), arrays()[1].reshape(-1, 4)[2:7])
    path = folder / "b0001.npy"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"b0001.npy has become shorter"):
        store.read(1)


def test_store_folder_adds_the_split_and_the_layer():
    assert store_folder("a/mine", "train", 2) == Path("a/mine/l2")
    assert store_folder("a/mine", "test", -1) == Path("a/mine_test/l-1")
    assert store_folder("a/mine/", "test", -1) == Path("a/mine_test/l-1")


@pytest.mark.parametrize(
    ("store", "sibling"),
    [
        ("embeddings/store", "embeddings/store_val"),
        ("a/mine/", "a/mine_val"),
        ("a/mine/l-1", "a/mine_val/l-1"),
        ("a/l2/l0", "a/l2_val/l0"),
        ("a/layers", "a/layers_val"),
    ],
)
def test_sibling_store_is_named_after_the_split(tmp_path, monkeypatch, store, sibling):
    monkeypatch.chdir(tmp_path)
    assert sibling_store(Path(store)) == tmp_path / sibling
    assert sibling_store(tmp_path / store) == tmp_path / sibling


def test_root_folder_has_no_sibling():
    assert sibling_store(Path("/")) is None
