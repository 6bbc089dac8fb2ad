"""30 channels at 200 Hz, encoded by a function into tokens over all channels, up to the report."""

import base64
import json
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import minsae_jax as ms
from minsae_jax.activations.manifest import read_manifest
from minsae_jax.eeg.description import read_description
from minsae_jax.eeg.recordings import load_recording
from tests.described import BURST, HZ, N_CHANNELS, RATE
from tests.report.reading import read_cards, read_script

pytestmark = pytest.mark.slow

WINDOW = 800
PATCH = 100
N_PATCHES = WINDOW // PATCH
LAYER = 5
BINS = (2, 6, 12, 20)  # of 2 Hz


def amplitudes(weights, windows):
    """Large amplitudes of all channels at four frequencies, through a matrix, as layer 5."""
    patches = windows.reshape(len(windows), N_PATCHES, PATCH, N_CHANNELS)
    spectrum = jnp.abs(jnp.fft.rfft(patches, axis=2))[:, :, jnp.array(BINS)]
    # In white noise of 1 SD a tenth of the amplitudes is above 15.
    large = jnp.maximum(spectrum - 15, 0)
    tokens = large.reshape(len(windows), N_PATCHES, -1) @ weights
    return {LAYER: tokens, 2: 2 * tokens}


def make_encoder(names, **changes):
    rng = np.random.default_rng(1)
    settings = {
        "name": "amplitudes",
        "seq_len": WINDOW,
        "channels": names,
        "sampling_rate": RATE,
        "tokens": ms.TokenGrid.patches(N_PATCHES, PATCH),
        "params": rng.normal(size=(4 * N_CHANNELS, 32)).astype(np.float32) / 50,
    }
    return ms.from_function(amplitudes, **(settings | changes))


@pytest.fixture(scope="module")
def encoder(described):
    return make_encoder(described.names)


@pytest.fixture(scope="module")
def run(described, encoder, tmp_path_factory) -> Path:
    """A run with its stores, its evaluation and its report."""
    base = tmp_path_factory.mktemp("run")
    extract_settings = ms.ExtractConfig(
        root_path=str(described.folder),
        out=str(base / "store"),
        split=("train", "val", "test"),
        cache_layer=(LAYER,),
        batch_size=4,
    )
    ms.extract(encoder, extract_settings)
    train_settings = ms.TrainConfig(
        store=str(base / "store"),
        cache_layer=LAYER,
        run_dir=str(base / "run"),
        lambda_sparsity=(0.3,),
        lr=(3e-3,),
        feature_dim_factor=(1.0,),
        num_steps=100,
        batch_size=128,
        eval_every=0,
        mesh="1x1",
    )
    ms.train(train_settings, encoder)
    evaluate_settings = ms.EvaluateConfig(
        run=str(base / "run"), root_path=str(described.folder), w=1
    )
    ms.evaluate(evaluate_settings, encoder)
    return base / "run"


@pytest.fixture(scope="module")
def card(run):
    """The report's data of the feature that finds the bursts."""
    member = json.loads((run / "evaluation.json").read_text())["members"][0]
    feature = member["events"]["burst"]["feature"]
    return next(card for card in read_cards(run / "report") if card["id"] == feature)


def test_store_describes_recordings_and_tokens(described, encoder, run):
    folder = run.parent / f"store_test/l{LAYER}"
    manifest = read_manifest(folder)
    assert manifest.data["sampling_rate"] == RATE
    assert manifest.data["channels"] == list(described.names)
    provenance = np.load(folder / "provenance.npz")
    windows_per_recording = 40 * RATE // WINDOW
    assert provenance["window"].tolist() == 2 * list(range(windows_per_recording))
    assert (provenance["channel"] == -1).all()
    grid = np.load(folder / "tokens.npz")
    assert grid["first"].tolist() == list(range(0, WINDOW, PATCH))
    assert grid["last"].tolist() == list(range(PATCH - 1, WINDOW, PATCH))
    assert (grid["channel"] == -1).all()

    store = ms.open_store(folder)
    eeg = load_recording(described.folder / str(provenance["recordings"][1]))
    expected = amplitudes(encoder.params, np.asarray(eeg[WINDOW : 2 * WINDOW])[None])[LAYER][0]
    second = windows_per_recording + 1
    tokens = store.read(second // 4)[(second % 4) * N_PATCHES :][:N_PATCHES]
    np.testing.assert_allclose(tokens, expected, rtol=1e-4, atol=1e-5)


def test_evaluation_finds_the_planted_bursts(run):
    evaluation = json.loads((run / "evaluation.json").read_text())
    score = evaluation["members"][0]["events"]["burst"]
    assert score["auc"] > 0.95
    assert score["token_auc"] > 0.9
    reason = "not measured: the encoder has no reconstruction head"
    assert evaluation["substitution"] == reason


def test_examples_are_planted_bursts_at_their_times(described, card):
    top = [example for example in card["examples"] if example["group"] == "top"]
    assert len(top) == 6  # three of each of two recordings
    for example in top:
        start, stop = (round(RATE * second) for second in example["patch"])
        assert stop - start == PATCH
        assert start % PATCH == 0
        bursts = described.bursts[example["recording"]]
        assert any(start < burst + BURST and stop > burst for burst in bursts)


def below_25_hz(eeg):
    """Filter all channels sharply at half of the 50 samples per second of montages."""
    spectrum = np.fft.rfft(eeg, axis=0)
    spectrum[np.fft.rfftfreq(len(eeg), 1 / RATE) > 25] = 0
    return np.fft.irfft(spectrum, len(eeg), axis=0)


def test_traces_are_the_eeg_of_a_planted_channel(described, card):
    description = read_description(described.folder)
    for example in card["examples"]:
        assert example["channel"] == "all channels"
        assert example["trace_channel"] == card["channel"]
        column = described.names.index(example["trace_channel"])
        eeg = load_recording(described.folder / example["recording"])
        start = round(example["start"] * RATE)
        trace = np.frombuffer(base64.b64decode(example["trace"]), np.int8)
        expected = eeg[start : start + len(trace), column]
        np.testing.assert_allclose(trace / 10, expected, atol=0.051)
        sd_uv = description.recordings[example["recording"]].sd_uv
        assert example["uv_per_sd"] == pytest.approx(sd_uv[column], rel=1e-3)
        assert (example["others_uv"] is None) == (example["others"] is None)
        if example["others"] is not None:
            assert example["others_uv"] == pytest.approx(sd_uv, rel=1e-3)
            others = np.frombuffer(base64.b64decode(example["others"]), np.int8)
            slow = below_25_hz(eeg)[start : start + len(trace) : 4]
            for channel, of_channel in zip(slow.T, others.reshape(N_CHANNELS, -1), strict=True):
                assert np.corrcoef(channel, of_channel)[0, 1] > 0.95


def test_channels_and_spectrum_are_those_of_the_bursts(described, run, card):
    ratio = np.array(card["channel_ratio"])
    strongest = np.argsort(-ratio)[: len(described.planted)]
    assert {described.names[i] for i in strongest} == set(described.planted)
    assert card["channel"] in described.planted
    others = np.delete(ratio, strongest)
    np.testing.assert_allclose(others, 1, atol=0.15)
    assert ratio[strongest].min() > 1.5
    spectrum = card["spectrum"]
    assert spectrum["hz"][int(np.argmax(spectrum["ratio"]))] == pytest.approx(HZ, abs=1.1)
    assert card["suggestion"] == "posterior alpha, 8–13 Hz"
    meta = read_script(run / "report/index_data.js")["meta"]
    assert meta["view_in_python"]
    assert meta["sampling_rate"] == RATE
    assert meta["patch_seconds"] == PATCH / RATE
    assert meta["channels"] == list(described.names)
    x, y = np.array(meta["positions"])[described.names.index("E25")]
    assert (x, y) == (pytest.approx(0, abs=1e-6), pytest.approx(-90 / 95, abs=1e-3))


def test_evaluation_without_the_encoder_is_the_same(described, run):
    before = json.loads((run / "evaluation.json").read_text())
    settings = ms.EvaluateConfig(run=str(run), root_path=str(described.folder), report=False)
    with pytest.warns(UserWarning, match="no encoder is given"):
        ms.evaluate(settings)
    after = json.loads((run / "evaluation.json").read_text())
    assert after["substitution"] == "not measured: no encoder was given"
    assert after["members"] == before["members"]


def test_encoder_that_does_not_fit_the_recordings_is_refused(described, tmp_path):
    settings = ms.ExtractConfig(
        root_path=str(described.folder), out=str(tmp_path / "store"), max_batches=1
    )
    other_rate = make_encoder(described.names, sampling_rate=256)
    with pytest.raises(ms.UserError, match="expects 256 Hz, but the recordings are at 200 Hz"):
        ms.extract(other_rate, settings)
    renamed = ["EEG E1-REF", "Cz", *described.names[2:]]
    other_names = make_encoder(renamed)
    with pytest.raises(ms.UserError, match="expects channel Cz in column 2"):
        ms.extract(other_names, settings)
    assert list(tmp_path.iterdir()) == []
    allowed = replace(settings, allow_mismatch=True)
    ms.extract(other_names, allowed)


def test_number_of_channels_must_fit(described, tmp_path):
    grid = ms.TokenGrid.patches(N_PATCHES, PATCH)
    encoder = ms.from_function(
        lambda x: x.reshape(len(x), N_PATCHES, -1),
        name="patches",
        seq_len=WINDOW,
        channels=19,
        tokens=grid,
    )
    settings = ms.ExtractConfig(root_path=str(described.folder), out=str(tmp_path / "store"))
    with pytest.raises(ms.UserError, match="reads 19 channels, but the recordings have 30"):
        ms.extract(encoder, replace(settings, allow_mismatch=True))
