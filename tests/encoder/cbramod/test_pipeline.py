"""CBraMod goes through extract, train, evaluate and report like PatchTST."""

import json

import numpy as np
import pytest
import yaml

from convert.__main__ import main as convert_main
from minsae_jax import UserError, load_encoder, open_store
from minsae_jax.__main__ import main
from minsae_jax.activations.tokens import read_tokens
from tests.eeg_200hz import CHANNELS, write_recordings
from tests.encoder.cbramod.conftest import SOURCE
from tests.report.viewing import read_view


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with recordings/ and the converted encoder/."""
    folder = tmp_path_factory.mktemp("cbramod")
    write_recordings(folder / "recordings")
    convert_main(["encoder", str(SOURCE), "--out", str(folder / "encoder")])
    return folder


def extract(recordings, encoder, out, *flags):
    paths = ["--root_path", str(recordings), "--checkpoint_path", str(encoder)]
    main(["extract", *paths, "--out", str(out), "--batch_size", "4", *flags])


def test_converted_folder_is_loaded_unchanged(folder, encoder, expected):
    loaded = load_encoder(folder / "encoder")
    assert loaded.fingerprint == encoder.fingerprint
    assert json.loads((folder / "encoder/config.json").read_text())["family"] == "cbramod"
    np.testing.assert_array_equal(
        loaded.activations(expected["past_values"]), encoder.activations(expected["past_values"])
    )


def test_store_contains_the_tokens_of_every_window(folder, encoder, tmp_path):
    extract(folder / "recordings", folder / "encoder", tmp_path / "store", "--cache_layer", "1")
    store = open_store(tmp_path / "store/l1")
    sequences = np.concatenate([np.load(path) for path in sorted(store.folder.glob("b*.npy"))])
    provenance = np.load(store.folder / "provenance.npz")
    # A window is one sequence of all channels.
    assert sequences.shape == (8 * 2, 12, 40)
    assert (provenance["channel"] == -1).all()
    for i in (0, 7, 15):
        name = str(provenance["recordings"][provenance["recording"][i]])
        start = 600 * int(provenance["window"][i])
        window = np.load(folder / "recordings" / name)[None, start : start + 600]
        alone = np.asarray(encoder.activations(window, 1)).reshape(12, 40)
        np.testing.assert_allclose(sequences[i], alone, atol=1e-5)
    grid = read_tokens(store.folder)
    assert grid.channel.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert grid.first.tolist() == [0, 200, 400] * 4
    assert grid.last.tolist() == [199, 399, 599] * 4
    assert tuple(store.require_manifest().data["channels"]) == CHANNELS


@pytest.mark.slow
def test_train_evaluate_and_report(folder, tmp_path, one_device):
    """Loss recovered runs through CBraMod's own head; the report needs no other encoder."""
    splits = ("--split", "train", "val", "test")
    extract(folder / "recordings", folder / "encoder", tmp_path / "store", *splits)
    settings = {
        "store": str(tmp_path / "store"),
        "checkpoint_path": str(folder / "encoder"),
        "run_dir": str(tmp_path / "run"),
        "lambda_sparsity": [0.003, 0.1],
        "feature_dim_factor": [2.0],
        "lr": [0.003],
        "num_steps": 200,
        "batch_size": 64,
        "mesh": "1x1",
    }
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"train": settings}))
    main(["train", "--config", str(config)])
    run = str(tmp_path / "run")
    root_path = str(folder / "recordings")
    main(["evaluate", "--run", run, "--root_path", root_path, "--substitution_windows", "4"])
    evaluation = json.loads((tmp_path / "run/evaluation.json").read_text())
    # The encoder is untrained, so that ablation need not raise the error; but it changes the error,
    # and most principal components together preserve it. 200 steps promise less of the members.
    errors = evaluation["substitution"]
    ablation = abs(errors["untouched"] - errors["mean_ablation"])
    assert ablation > 0.1
    components = evaluation["pca"][-1]["masked_error"]
    assert components == pytest.approx(errors["untouched"], abs=0.05 * ablation)
    is_raised = errors["mean_ablation"] > errors["untouched"]
    for member in evaluation["members"]:
        assert np.isfinite(member["masked_error"])
        assert (member["loss_recovered"] is not None) == is_raised
    assert (tmp_path / "run/report/index.html").exists()
    recording = sorted((folder / "recordings").glob("*.npy"))[0]
    member = evaluation["recommended"]
    main(["view", str(recording), "--member", f"{run}/members/{member}", "--out", str(tmp_path)])
    viewed = read_view(tmp_path / f"{recording.stem}.html")
    # Tokens of a second on each channel; features that are active elsewhere too have a ratio.
    grid = load_encoder(folder / "encoder").spec.tokens
    n_windows = len(np.load(recording)) // viewed["seq_len"]
    n_places = n_windows * len(grid.starts)
    n_features = len(viewed["features"])
    assert viewed["activations"].size == n_features * len(CHANNELS) * n_places
    assert viewed["lengths"] == [200] * len(grid.starts)
    assert any(feature["mean_elsewhere"] for feature in viewed["features"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampling_rate": 100.0}, "the encoder expects 200 Hz, but the recordings are at 100 Hz"),
        ({"unit": "SD"}, "the encoder expects EEG in 100 uV, but the recordings are in SD"),
    ],
)
def test_recordings_of_another_rate_or_unit_are_refused(folder, tmp_path, changes, message):
    recordings = write_recordings(tmp_path / "recordings", **changes)
    out = tmp_path / "store"
    with pytest.raises(UserError, match=message):
        extract(recordings, folder / "encoder", out)
    assert not out.exists()
    extract(recordings, folder / "encoder", out, "--allow_mismatch")


def test_other_numbers_of_channels_name_both(folder, tmp_path):
    three = {"channels": CHANNELS[:3], "positions": (None,) * 3}
    recordings = write_recordings(tmp_path / "recordings", **three)
    with pytest.raises(UserError, match="reads 4 channels, but the recordings have 3"):
        extract(recordings, folder / "encoder", tmp_path / "store")
