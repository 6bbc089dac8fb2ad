"""Stores from arrays, and the examples of docs/activations.md."""

import inspect
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import minsae_jax as ms
from minsae_jax.activations import imported
from minsae_jax.evaluation.dataset import open_dataset

DOCS = Path(__file__).parents[2] / "docs/activations.md"
GRID = ms.TokenGrid.patches(3, 10)
X = np.random.default_rng(0).normal(size=(5, 3, 4)).astype(np.float32)
PLACES = {
    "recordings": ["a_s001_t000_preprocessed.npy", "b_s001_t000_preprocessed.npy"],
    "recording": [0, 0, 0, 1, 1],
    "window": [0, 1, 2, 0, 5],
}


def write(out, activations=X, **changes):
    settings = {"encoder": "mine", "tokens": GRID, "seq_len": 30} | PLACES | changes
    return ms.write_store(out / "store", activations, **settings)


def test_integers_of_numpy_are_numbers_of_the_manifest(tmp_path, monkeypatch):
    # jaxtyping checks annotations in tests only.
    integers = {"seq_len": np.int64(30), "layer": np.int32(2)}
    store = inspect.unwrap(ms.write_store)(
        tmp_path / "store", X, encoder="mine", tokens=GRID, **(PLACES | integers)
    )
    manifest = json.loads((store.folder / "manifest.json").read_text())
    assert (manifest["data"]["seq_len"], manifest["layer"], manifest["layer_index"]) == (30, 2, 2)


@pytest.mark.parametrize("in_parts", [False, True])
def test_store_contains_the_arrays(tmp_path, monkeypatch, in_parts):
    monkeypatch.setattr(imported, "SHARD_TOKENS", 8)
    store = write(tmp_path, (x[None] for x in X) if in_parts else X, layer=3, split="val")
    assert store.folder == tmp_path / "store_val/l3"
    assert store.tokens_per_shard == ([9, 6] if in_parts else [15])
    tokens = np.concatenate([store.read(i) for i in range(len(store.shards))])
    np.testing.assert_array_equal(tokens.reshape(X.shape), X)
    store.verify()
    provenance = np.load(store.folder / "provenance.npz")
    assert provenance["recordings"].tolist() == PLACES["recordings"]
    assert provenance["window"].tolist() == PLACES["window"]
    assert provenance["channel"].tolist() == [-1] * 5


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [(np.float16, "float16"), (np.float64, "float32"), (np.int32, "float32")],
)
def test_half_precision_stays(tmp_path, dtype, stored):
    store = write(tmp_path, (4 * X).astype(dtype))
    assert store.dtype == stored
    np.testing.assert_array_equal(store.read(0), (4 * X).astype(dtype).reshape(-1, 4))


@pytest.mark.parametrize("change", [torch.Tensor.bfloat16, torch.Tensor.requires_grad_])
def test_tensors_of_pytorch_become_float32(tmp_path, change):
    x = np.random.default_rng(0).integers(-9, 9, X.shape).astype(np.float32)  # of few digits
    store = write(tmp_path, change(torch.from_numpy(x)))
    assert store.dtype_on_disk == "float32"
    np.testing.assert_array_equal(store.read(0).reshape(X.shape), x)


def test_existing_store_is_replaced_on_request_only(tmp_path):
    write(tmp_path)
    with pytest.raises(ms.UserError, match=r"contains a store; .* overwrite=True"):
        write(tmp_path, 2 * X)
    store = write(tmp_path, 2 * X, overwrite=True)
    np.testing.assert_array_equal(store.read(0), 2 * X.reshape(-1, 4))


def test_interrupted_store_is_written_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(imported, "SHARD_TOKENS", 3)

    def killed():
        yield 2 * X[:2]
        yield 2 * X[2:4]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, killed())
    with pytest.raises(ms.UserError, match=r"a store of other settings: encoder"):
        write(tmp_path, encoder="theirs")
    # In fewer shards than were written
    store = write(tmp_path, X)
    assert len(store.shards) == 1
    store.verify()
    np.testing.assert_array_equal(store.read(0), X.reshape(-1, 4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "training"}, "split must be one of train, val, test, all, got 'training'"),
        ({"recordings": ["a.npy", "a.npy"]}, "recordings contains duplicate names"),
        ({"seq_len": 20}, "first of tokens is 0 to 20; expected -1 to 19"),
        (
            {"tokens": ms.TokenGrid.patches(1, 10, n_channels=3), "channels": ["Fz", "Cz"]},
            "channel of tokens is 0 to 2; expected -1 to 1",
        ),
        ({"activations": X[:, :2]}, r"must be \[sequences, 3 tokens, d_model\], got \[5, 2, 4\]"),
        ({"activations": [X[:2], X[2:, :, :3]]}, "one d_model and dtype, got 3, float32 after 4"),
        ({"activations": np.where(X > 1, np.nan, X)}, "contain NaN or infinity"),
        ({"activations": []}, "there are no activations"),
        ({"activations": X[:4]}, "there are 4 sequences, but 5 entries"),
        ({"window": [0, 1, 2, 0]}, "one entry for each sequence"),
        ({"window": [0, 2, 1, 0, 5]}, "sequence 2 comes before the one in front of it"),
        ({"recording": [0, 0, 0, 1, 2]}, "recording is 0 to 2; expected 0 to 1"),
        (
            {"window": np.array([0, 0.5, 1, 0, 5])},
            r"window must be a list of integers, got float64",
        ),
        ({"window": np.array([0, 1, 2, 0, 2**32])}, "window is 0 to 4294967296; expected"),
        ({"sampling_rate": float("nan")}, "sampling_rate must be positive and finite, got nan"),
        ({"recording": [-1, 0, 0, 1, 1]}, "recording is -1 to 1; expected 0 to 1"),
        ({"channel": [0, 0, 1, 0, 2], "channels": ["Cz", "Pz"]}, "channel is 0 to 2"),
    ],
)
def test_wrong_arrays_are_refused(tmp_path, changes, message):
    with pytest.raises(ms.UserError, match=message):
        write(tmp_path, **changes)
    with pytest.raises(ms.UserError, match=r"no store|incomplete"):
        ms.open_store(tmp_path / "store/l-1")


def test_examples_of_the_docs_write_equal_stores(described, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recordings").symlink_to(described.folder)
    names: dict = {}
    for code in re.findall(r"```python\n(.*?)```", DOCS.read_text(), flags=re.S):
        exec(code, names)
    assert [store.split for store in names["stores"]] == ["train", "val", "test"]
    for split, n_recordings in (("", 7), ("_val", 1), ("_test", 2)):
        datasets = []
        for store in ("store", "arrays"):
            dataset = open_dataset(f"embeddings/{store}{split}", -1, None, "recordings")
            datasets.append(dataset)
        extracted, written = datasets
        n_sequences = 10 * n_recordings
        np.testing.assert_allclose(
            extracted.read(0, n_sequences), written.read(0, n_sequences), atol=1e-6
        )
        for name in ("recording", "window", "channel"):
            np.testing.assert_array_equal(getattr(extracted, name), getattr(written, name))
        assert extracted.recordings == written.recordings


def test_grids_of_the_docs_are_of_their_windows():
    for code in re.findall(r"`(ms\.TokenGrid\.patches\(.*?\))` \|", DOCS.read_text()):
        grid = eval(code)
        assert grid.last.max() == 799


def test_store_of_other_recordings_is_refused(described, tmp_path):
    name = json.loads((described.folder / "dataset.json").read_text())["recordings"]
    places = {"recordings": list(name)[:1], "recording": [0], "window": [0]}
    write(tmp_path, X[:1], **places)
    with pytest.raises(ms.UserError, match="at 100 Hz, but those of --root_path are at 200 Hz"):
        open_dataset(tmp_path / "store", -1, None, described.folder)
    write(tmp_path, X[:1], **places, sampling_rate=200, channels=["Cz"], overwrite=True)
    with pytest.raises(ms.UserError, match="channels Cz, but those of --root_path have E1 E2"):
        open_dataset(tmp_path / "store", -1, None, described.folder)
