"""`minsae view` and `encode_recording` against windows cut by hand and the SAE's formula."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import mne
import numpy as np
import pytest

import minsae_jax as ms
from minsae_jax.__main__ import main
from minsae_jax.activations.tokens import TokenGrid
from minsae_jax.encoder.converted import save_encoder
from minsae_jax.report.recording import FeatureTotals, open_places
from minsae_jax.report.view import Elsewhere, choose_shown, token_table
from minsae_jax.sae.member import SparseAutoencoder, save_member
from tests.cluster import ROOT
from tests.conftest import FIXTURES
from tests.eeg.eeg_files import run as prepare
from tests.report.viewing import encode_by_hand, read_view

MEMBER = "lambda=1"
N_WINDOWS = 17  # one more than are encoded at a time


@pytest.fixture(scope="module")
def place(trained, tmp_path_factory) -> Path:
    """A folder with events.csv and a recording that was never extracted, of 17.5 windows."""
    folder = tmp_path_factory.mktemp("mine")
    seq_len = trained.encoder.spec.seq_len
    source = sorted(trained.recordings.glob("*.npy"))[0]
    eeg = np.load(source)
    n_samples = N_WINDOWS * seq_len + seq_len // 2
    repeated = np.tile(eeg, (n_samples // len(eeg) + 1, 1))[:n_samples]
    # Other windows in each repetition.
    np.save(folder / "mine.npy", np.roll(repeated, 123, axis=0).astype(np.float32))
    with (folder / "events.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["recording", "event", "start", "stop", "channels"])
        writer.writerow(["mine.npy", "</script>", 50, 150, "O1 O2"])
        writer.writerow(["other.npy", "blink", 50, 150, "O1"])
    return folder


@pytest.fixture(scope="module")
def by_hand(trained, place):
    return encode_by_hand(trained.encoder, trained.sae(MEMBER), np.load(place / "mine.npy"))


def view(trained, place, out, *flags):
    member = trained.run / "members" / MEMBER
    main(["view", str(place / "mine.npy"), "--member", str(member), "--out", str(out), *flags])


@pytest.mark.slow
def test_page_does_not_depend_on_the_encoding_of_the_system(trained, place, tmp_path):
    """As on Windows, whose default is not UTF-8."""
    view(trained, place, tmp_path / "here.html")
    member = trained.run / "members" / MEMBER
    command = [sys.executable, "-X", "utf8=0", "-m", "minsae_jax", "view", str(place / "mine.npy")]
    command += ["--member", str(member), "--out", str(tmp_path / "there.html")]
    environment = os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run(command, check=True, env=environment, cwd=ROOT)
    assert (tmp_path / "there.html").read_bytes() == (tmp_path / "here.html").read_bytes()


def strongest_features(tokens, count):
    total = np.sum([token.features for token in tokens], axis=0)
    return np.argsort(-total)[:count].tolist()


def test_tokens_are_those_of_windows_cut_by_hand(trained, place, by_hand):
    encoded = ms.encode_recording(trained.encoder, trained.sae(MEMBER), place / "mine.npy")
    assert encoded.start.tolist() == [token.start for token in by_hand]
    assert encoded.stop.tolist() == [token.stop for token in by_hand]
    assert encoded.channel.tolist() == [token.channel for token in by_hand]
    assert (encoded.recording, encoded.sampling_rate) == ("mine.npy", 100)
    expected = np.stack([token.features for token in by_hand])
    assert (expected > 0).mean() > 0.01
    np.testing.assert_allclose(encoded.activations.toarray(), expected, rtol=1e-4, atol=1e-4)


def test_revin_is_applied_if_the_store_was_extracted_with_it(trained, place, tmp_path):
    settings = ms.ExtractConfig(
        root_path=str(trained.recordings),
        out=str(tmp_path / "store"),
        batch_size=4,
        max_batches=1,
        force_revin=True,
    )
    (store,) = ms.extract(trained.encoder, settings)
    sae = trained.sae(MEMBER)
    # Members of earlier versions have no `revin`.
    config = sae.config | {"store": str(store.folder), "revin": None}
    with_revin = SparseAutoencoder(sae.params, config)
    seq_len = trained.encoder.spec.seq_len
    eeg = np.load(place / "mine.npy").astype(np.float64)
    windows = eeg[: N_WINDOWS * seq_len].reshape(N_WINDOWS, seq_len, -1)
    mean = windows.mean(axis=1, keepdims=True)
    normalized = (windows - mean) / np.sqrt(windows.var(axis=1, keepdims=True) + 1e-5)
    by_hand = encode_by_hand(trained.encoder, sae, normalized.reshape(-1, eeg.shape[1]))
    expected = np.stack([token.features for token in by_hand])
    encoded = ms.encode_recording(trained.encoder, with_revin, place / "mine.npy")
    np.testing.assert_allclose(encoded.activations.toarray(), expected, rtol=1e-3, atol=1e-3)
    forced = ms.encode_recording(trained.encoder, sae, place / "mine.npy", force_revin=True)
    np.testing.assert_array_equal(forced.activations.toarray(), encoded.activations.toarray())
    # The store may have been moved since, and live activations have none.
    recorded = SparseAutoencoder(sae.params, sae.config | {"revin": True, "store": "moved"})
    without_store = ms.encode_recording(trained.encoder, recorded, place / "mine.npy")
    np.testing.assert_array_equal(without_store.activations.toarray(), forced.activations.toarray())


def test_only_requested_features_are_kept(trained, place, by_hand):
    features = strongest_features(by_hand, 2)
    encoded = ms.encode_recording(
        trained.encoder, trained.sae(MEMBER), place / "mine.npy", features
    )
    assert set(encoded.activations.nonzero()[1]) == set(features)
    expected = np.stack([token.features[features] for token in by_hand])
    found = encoded.activations[:, features].toarray()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_page_contains_features_eeg_and_events(trained, place, by_hand, tmp_path, capsys):
    features = strongest_features(by_hand, 3)
    view(trained, place, tmp_path, "--feature", *map(str, features))
    page = tmp_path / "mine.html"
    assert capsys.readouterr().out.startswith(f"open {page} (")
    data = read_view(page)
    eeg = np.load(place / "mine.npy")
    n_vars = eeg.shape[1]
    assert [feature["id"] for feature in data["features"]] == features
    assert data["samples"] == len(eeg)
    assert data["encoded_samples"] == N_WINDOWS * trained.encoder.spec.seq_len
    # Levels, from 0 to 255, of the largest activation.
    starts = np.array(data["starts"])
    levels = data["activations"].reshape(3, n_vars, -1)
    assert levels.shape[2] == N_WINDOWS * len(starts)
    for i, feature in enumerate(features):
        expected = np.zeros(levels.shape[1:])
        for token in by_hand:
            window, sample = divmod(token.start, data["seq_len"])
            slot = window * len(starts) + starts.tolist().index(sample)
            expected[token.channel, slot] = token.features[feature]
        about = data["features"][i]
        np.testing.assert_allclose(about["max"], expected.max(), rtol=1e-4)
        np.testing.assert_allclose(about["mean"], expected.mean(), rtol=1e-3)
        values = levels[i] / 255 * about["max"]
        # Half a level, and a whole one where the smallest level stands for less.
        np.testing.assert_allclose(values, expected, atol=1.01 * about["max"] / 255)
        is_clear = expected > 1e-3
        np.testing.assert_array_equal(levels[i][is_clear] > 0, True)
    # EEG: differences in units of 0.02 SD, as low bytes and high bytes.
    low, high = data["eeg"].reshape(2, n_vars, -1).astype(int)
    folded = low + 256 * high
    differences = np.where(folded % 2, -(folded + 1) // 2, folded // 2)
    drawn = np.cumsum(differences, axis=1) * data["eeg_step"]
    assert (data["eeg_rate"], data["uv_per_sd"]) == (100, None)
    np.testing.assert_allclose(drawn.T, eeg, atol=0.01001)
    assert data["events"] == [
        {"kind": "</script>", "start": 0.5, "stop": 1.5, "channels": ["O1", "O2"]}
    ]


def test_page_needs_no_other_file(trained, place, tmp_path):
    view(trained, place, tmp_path / "one.html", "--num_features", "1")
    text = (tmp_path / "one.html").read_text()
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", text)
    assert not re.search(r"url\((?!#)|@import", text)
    assert text.count("</script>") == 1
    assert len(read_view(tmp_path / "one.html")["features"]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["one.html"]


def test_feature_that_is_not_active_is_shown_as_such(trained, place, tmp_path):
    sae = trained.sae(MEMBER)
    silent = {**sae.params, "b_enc": sae.params["b_enc"].at[3].set(-1e6)}
    save_member(tmp_path / "run/members" / MEMBER, silent, sae.config)
    copy = replace(trained, run=tmp_path / "run")
    encoder = ("--checkpoint_path", str(trained.encoder_folder))
    view(copy, place, tmp_path, "--feature", "3", *encoder)
    data = read_view(tmp_path / "mine.html")
    assert not data["activations"].any()
    (feature,) = data["features"]
    assert (feature["max"], feature["mean"], feature["density"]) == (0, 0, 0)
    view(copy, place, tmp_path, "--num_features", "1000", *encoder)
    shown = [feature["id"] for feature in read_view(tmp_path / "mine.html")["features"]]
    assert len(shown) > 20
    assert 3 not in shown


def test_features_are_ordered_by_contribution_without_a_report(trained, place, by_hand, tmp_path):
    view(trained, place, tmp_path, "--num_features", "500")
    data = read_view(tmp_path / "mine.html")
    table = np.stack([token.features for token in by_hand])
    is_active = table.max(axis=0) > 1e-3
    norm = np.linalg.norm(trained.sae(MEMBER).decoder_directions, axis=1)
    is_dense = (table > 0).mean(axis=0) > 0.1
    order = sorted(
        np.flatnonzero(is_active), key=lambda f: (is_dense[f], -(table.mean(0) * norm)[f])
    )
    shown = [feature["id"] for feature in data["features"]]
    assert [f for f in shown if is_active[f]] == [int(f) for f in order]
    assert "mean activation × decoder norm; those on over 10 % of tokens last" in data["rule"]


def test_features_more_active_than_elsewhere_come_first():
    sae = SparseAutoencoder({
        "W_enc": np.zeros((2, 6)), "b_enc": np.zeros(6), "b_dec": np.zeros(2),
        "W_dec": np.array([[1, 0], [1, 0], [2, 0], [1, 0], [1, 0], [1, 0]]),
    })  # fmt: skip
    totals = FeatureTotals(
        n_tokens=10,
        active=np.array([1, 1, 1, 1, 0, 1]),
        total=np.array([8.0, 8.0, 8.0, 1.0, 0.0, 100.0]),
    )
    elsewhere = Elsewhere(
        # Feature 0 is as active elsewhere, 1 half as much, 2 too but longer; 3 is never active.
        mean={0: 0.8, 1: 0.4, 2: 0.4, 3: 0.0, 4: 0.1, 5: 0.001},
        density={0: 0.01, 1: 0.01, 2: 0.01, 3: 0.0, 4: 0.01, 5: 0.2},
        suggestions={},
    )
    chosen, rule = choose_shown(sae, totals, elsewhere, 6)
    # 2 · 0.8 · log2 2 = 1.6, 0.1 · log2 1024 = 1, 0.8 · log2 2 = 0.8, 0; 5 is dense elsewhere.
    assert chosen == [2, 3, 1, 0, 5]
    assert rule.startswith("5 of 5 active features")
    assert "mean of the report's test patients" in rule
    assert choose_shown(sae, totals, elsewhere, 2)[0] == [2, 3]


def test_names_are_those_of_the_report(trained, place, tmp_path):
    """Rows and labels.csv of a report; those of another member's are not used."""
    run = tmp_path / "run"
    shutil.copytree(trained.run, run)
    report = run / "report"
    report.mkdir()
    columns = ["id", "label", "suggestion", "density", "mean", "max", "pack"]
    rows = [[i, "", f"name {i}", 0.5, 2.0, 3.0, 0] for i in range(trained.sae(MEMBER).d_sae)]
    rows[1][3:5] = [0.0, None]
    index = {"meta": {"member": MEMBER}, "columns": columns, "rows": rows}
    (report / "index_data.js").write_text(f"receive({json.dumps(index)});\n")
    (report / "labels.csv").write_text("feature,label,note\n2,my label,my note\n")
    copy = replace(trained, run=run)
    view(copy, place, tmp_path, "--feature", "2", "1")
    two, one = read_view(tmp_path / "mine.html")["features"]
    assert (two["label"], two["note"], two["suggestion"]) == ("my label", "my note", "name 2")
    assert (two["mean_elsewhere"], one["mean_elsewhere"]) == (1.0, 0.0)
    index["meta"]["member"] = "lambda=0.1"
    (report / "index_data.js").write_text(f"receive({json.dumps(index)});\n")
    view(copy, place, tmp_path, "--feature", "2")
    (two,) = read_view(tmp_path / "mine.html")["features"]
    assert (two["suggestion"], two["mean_elsewhere"]) == ("", None)


def test_tokens_of_many_batches_keep_their_places(tmp_path):
    """Each of 700 samples is a token, so that the SAE encodes a batch of windows in parts."""
    encoder = ms.from_function(
        lambda windows: windows,
        name="samples",
        seq_len=700,
        channels=1,
        tokens=TokenGrid.patches(700, 1, n_channels=1),
    )
    one, zero = np.ones((1, 1)), np.zeros(1)
    sae = SparseAutoencoder({"W_enc": one, "b_enc": zero, "W_dec": one, "b_dec": zero})
    eeg = np.random.default_rng(0).normal(size=(40 * 700 + 1, 1)).astype(np.float32)
    np.save(tmp_path / "x.npy", eeg)
    encoded = ms.encode_recording(encoder, sae, tmp_path / "x.npy")
    np.testing.assert_array_equal(encoded.start, np.arange(40 * 700))
    np.testing.assert_array_equal(encoded.activations.toarray(), np.maximum(eeg[:-1], 0))


def test_tokens_of_different_lengths_and_channels_share_a_table(tmp_path):
    """Two tokens that start together, tokens over all channels, and a CLS token."""
    tokens = TokenGrid(
        channel=np.array([-1, 0, 0, 1, -1]),
        first=np.array([-1, 0, 0, 0, 50]),
        last=np.array([-1, 49, 99, 49, 99]),
    )

    def peaks(windows):
        spans = [(0, 0, 100), (0, 0, 50), (0, 0, 100), (1, 0, 50), (1, 50, 100)]
        found = [jnp.abs(windows[:, a:b, c]).max(axis=1) for c, a, b in spans]
        return jnp.stack(found, axis=1)[:, :, None]

    encoder = ms.from_function(peaks, name="peaks", seq_len=100, channels=2, tokens=tokens)
    one, zero = np.ones((1, 1)), np.zeros(1)
    sae = SparseAutoencoder({"W_enc": one, "b_enc": zero, "W_dec": one, "b_dec": zero})
    eeg = np.zeros((230, 2), np.float32)
    eeg[[10, 80, 110, 170], [0, 0, 1, 1]] = [1, 4, 2, 3]
    np.save(tmp_path / "x.npy", eeg)
    encoded = ms.encode_recording(encoder, sae, tmp_path / "x.npy")
    assert encoded.start.tolist() == [0, 0, 0, 50, 100, 100, 100, 150]
    assert encoded.stop.tolist() == [50, 100, 50, 100, 150, 200, 150, 200]
    assert encoded.channel.tolist() == [0, 0, 1, -1] * 2
    assert encoded.activations.toarray()[:, 0].tolist() == [1, 4, 0, 0, 0, 0, 2, 3]
    by_sample = np.zeros((200, 2))
    by_sample[:100, 0] = 4
    by_sample[150:, :] = 3
    by_sample[100:150, 1] = 2
    np.testing.assert_array_equal(encoded.at(0, np.arange(200) / 100), by_sample)
    at_ends = encoded.at(0, np.array([-0.01, 0.999, 1, 1.9999, 2]))
    assert at_ends.tolist() == [[0, 0], [4, 0], [0, 2], [3, 3], [0, 0]]
    places = open_places(encoder, tmp_path / "x.npy")
    table = token_table(places, encoded, [0])
    levels = np.rint(np.array([[4, 0, 0, 3], [0, 0, 2, 3]]) * 255 / 4)
    assert table[0].tolist() == levels.tolist()


def test_a_padded_patch_ends_with_its_window(tmp_path):
    """The last of three patches of 40 samples has 20 samples of a window of 100."""
    tokens = TokenGrid.patches(3, 40, n_channels=1)
    encoder = ms.from_function(
        lambda windows: jnp.abs(windows[:, [0, 40, 80]]),
        name="padded",
        seq_len=100,
        channels=1,
        tokens=replace(tokens, last=np.minimum(tokens.last, 99)),
    )
    # As of an official PatchTST, which repeats the last sample.
    encoder.spec = replace(encoder.spec, tokens=tokens)
    one, zero = np.ones((1, 1)), np.zeros(1)
    params = {"W_enc": one, "b_enc": zero, "W_dec": one, "b_dec": zero}
    save_member(tmp_path / "one", params, {})
    np.save(tmp_path / "x.npy", np.ones((230, 1), np.float32))
    settings = ms.ViewConfig(
        recording=(str(tmp_path / "x.npy"),), member=str(tmp_path / "one"), out=str(tmp_path)
    )
    ms.view(settings, encoder)
    page = read_view(tmp_path / "x.html")
    assert (page["starts"], page["lengths"]) == ([0, 40, 80], [40, 40, 20])


def with_nan(eeg):
    eeg[90, 3] = np.nan
    return eeg


@pytest.mark.parametrize(
    ("change", "flags", "message"),
    [
        (None, ["--feature", "100000"], "there is no feature 100000: lambda=1 has the features 0"),
        (lambda x: x[:50], [], "mine.npy has 50 samples, which is less than a window"),
        (lambda x: x[:, :18], [], "mine.npy has 18 channels, but the encoder expects 19"),
        (with_nan, [], "mine.npy contains NaN or infinity at sample 90"),
        (lambda x: (x * 100).astype(int), [], "must be floats"),
        (None, ["--layer", "0"], "the SAE was trained on layer -1, not on 0"),
        (None, ["--layer", "7"], "there is no layer 7"),
        (None, ["--feature", "1", "1"], "--feature contains duplicate values: 1 1"),
    ],
)  # fmt: skip
def test_unusable_input_is_one_line(trained, place, tmp_path, change, flags, message):
    eeg = np.load(place / "mine.npy")
    np.save(tmp_path / "mine.npy", eeg if change is None else change(eeg))
    with pytest.raises(ms.UserError, match=re.escape(message)):
        view(trained, tmp_path, tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_missing_and_other_files_are_one_line(trained, place, tmp_path):
    (tmp_path / "other.edf").write_text("EDF")
    (tmp_path / "text.npy").write_text("text")
    for name, message in (
        ("none.npy", "there is no recording"),
        ("other.edf", "is not a recording"),
        ("text.npy", "cannot be read"),
    ):
        settings = ms.ViewConfig(
            recording=(str(place / "mine.npy"), str(tmp_path / name)),
            member=str(trained.run / "members" / MEMBER),
            out=str(tmp_path / "out"),
        )
        with pytest.raises(ms.UserError, match=message):
            ms.view(settings, trained.encoder)
        assert not (tmp_path / "out").exists()


def test_missing_encoder_is_one_line(trained, place, tmp_path):
    """Of a function there is no folder that --checkpoint_path could name."""
    (tmp_path / "members").mkdir()
    shutil.copytree(trained.run / "members" / MEMBER, tmp_path / "members" / MEMBER)
    settings = ms.ViewConfig(
        recording=(str(place / "mine.npy"),),
        member=str(tmp_path / "members" / MEMBER),
        out=str(tmp_path / "out"),
    )
    with pytest.raises(
        ms.UserError, match=r"set --checkpoint_path, or in Python .* minsae_jax.view"
    ):
        ms.view(settings)
    assert not (tmp_path / "out").exists()


def test_another_encoder_is_refused(trained, place, tmp_path):
    from convert.encoder import convert_encoder

    other, _ = convert_encoder(FIXTURES / "tuhab_patch_10/checkpoint.pth")
    save_encoder(tmp_path / "other", other)
    with pytest.raises(ms.UserError, match="trained on another encoder"):
        view(trained, place, tmp_path / "out", "--checkpoint_path", str(tmp_path / "other"))


def test_only_pages_of_view_are_replaced(trained, place, tmp_path):
    recording = (place / "mine.npy").read_bytes()
    (tmp_path / "mine.html").write_text("<html>notes</html>")
    with pytest.raises(ms.UserError, match="is not a page of `view`"):
        view(trained, place, tmp_path)
    with pytest.raises(ms.UserError, match="is not a folder"):
        view(trained, place, place / "mine.npy")
    assert (tmp_path / "mine.html").read_text() == "<html>notes</html>"
    assert (place / "mine.npy").read_bytes() == recording
    (tmp_path / "mine.html").unlink()
    view(trained, place, tmp_path, "--feature", "1")
    view(trained, place, tmp_path, "--feature", "2")
    assert [f["id"] for f in read_view(tmp_path / "mine.html")["features"]] == [2]


def test_two_recordings_cannot_share_a_page(trained, place, tmp_path):
    member = str(trained.run / "members" / MEMBER)
    twice = (str(place / "mine.npy"), str(place / "mine.npy"))
    for out, message in (
        (tmp_path / "a.html", "is one page"),
        (tmp_path / "a", "several recordings"),
    ):
        settings = ms.ViewConfig(recording=twice, member=member, out=str(out))
        with pytest.raises(ms.UserError, match=message):
            ms.view(settings, trained.encoder)


def test_activation_of_a_cropped_recording_fits_the_times_of_its_file(tmp_path):
    """A step at 9.3 s of an EDF file of 256 Hz is a step of the channel that is added to it."""
    rate = 256
    step = round(9.3 * rate)
    signal = np.zeros((2, 20 * rate))
    signal[0, step:] = 5e-5
    signal[1] = np.random.default_rng(0).normal(size=20 * rate) * 1e-5
    raw = mne.io.RawArray(signal, mne.create_info(["Fz", "Pz"], rate, "eeg"), verbose="ERROR")
    mne.export.export_raw(tmp_path / "eeg.edf", raw, verbose="ERROR")
    settings = {"channels": ("Fz", "Pz"), "reference": ("none",), "normalize": "uV", "crop": 5.0}
    prepare(tmp_path / "eeg.edf", tmp_path / "out", **settings)
    encoder = ms.from_function(
        lambda windows: windows.transpose(0, 2, 1).reshape(len(windows), -1, 1),
        name="samples",
        seq_len=100,
        channels=2,
        sampling_rate=100,
        tokens=TokenGrid.patches(100, 1, n_channels=2),
    )
    one, zero = np.ones((1, 1)), np.zeros(1)
    sae = SparseAutoencoder({"W_enc": one, "b_enc": -25 * one[0], "W_dec": one, "b_dec": zero})
    (recording,) = (tmp_path / "out").glob("*.npy")
    encoded = ms.encode_recording(encoder, sae, recording)
    assert (encoded.source, encoded.channels) == ("eeg.edf", ("Fz", "Pz"))
    raw = mne.io.read_raw_edf(tmp_path / encoded.source, verbose="ERROR")
    of_fz = encoded.at(0, raw.times)[:, 0]
    onset = raw.times[np.flatnonzero(of_fz)[0]]
    assert abs(onset - 9.3) < 1 / 100 + 1 / rate
    end = raw.times[np.flatnonzero(of_fz)[-1]]
    assert 15 - 1 / 100 - 1 / rate < end < 15
