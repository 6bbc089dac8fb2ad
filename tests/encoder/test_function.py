"""A PyTorch function with a CLS token and a token for each channel and patch."""

import inspect
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

import minsae_jax as ms
from minsae_jax.activations.stream import shuffled_tokens
from minsae_jax.eeg.recordings import load_recording
from minsae_jax.encoder.live import open_live
from minsae_jax.evaluation.dataset import open_dataset
from minsae_jax.evaluation.events import Span, event_share, read_events, tokens_of
from minsae_jax.report.context import Context
from minsae_jax.report.describe import describe
from minsae_jax.report.examples import collect
from tests.described import BURST, HZ, N_CHANNELS, RATE

WINDOW = 800
PATCH = 100
N_PATCHES = 8
BINS = [2, 6, 12]  # of 2 Hz
GRID = ms.TokenGrid.patches(N_PATCHES, PATCH, n_channels=N_CHANNELS, n_cls=1)


@torch.inference_mode()
def amplitudes(windows):
    """Return amplitudes above 15 at three frequencies, [batch, 1 + channels * patches, 3]."""
    x = torch.from_numpy(windows).transpose(1, 2).reshape(len(windows), -1, PATCH)
    tokens = torch.relu(torch.fft.rfft(x).abs()[:, :, BINS] - 15)
    return torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1)


def make_encoder(f=amplitudes, **changes):
    settings = {
        "name": "amplitudes",
        "seq_len": WINDOW,
        "channels": N_CHANNELS,
        "tokens": GRID,
        "backend": "host",
    }
    return ms.from_function(f, **(settings | changes))


@pytest.fixture(scope="module")
def encoder():
    return make_encoder()


@pytest.fixture(scope="module")
def dataset(encoder, described, tmp_path_factory):
    settings = ms.ExtractConfig(
        root_path=str(described.folder),
        out=str(tmp_path_factory.mktemp("function") / "store"),
        split=("test",),
        batch_size=8,
    )
    (store,) = ms.extract(encoder, settings)
    (again,) = ms.extract(encoder, settings)
    assert (store.was_complete, again.was_complete) == (False, True)
    return open_dataset(store.folder, -1, None, described.folder)


def test_store_contains_the_function_s_output(described, dataset):
    assert len(dataset.recording) == 2 * 10
    for sequence in (0, 13):
        eeg = np.load(described.folder / dataset.recordings[dataset.recording[sequence]])
        start = WINDOW * dataset.window[sequence]
        expected = amplitudes(eeg[None, start : start + WINDOW])
        np.testing.assert_array_equal(dataset.read(sequence, sequence + 1), expected)


def test_live_activations_are_those_of_the_store(encoder, described, dataset):
    config = ms.ExtractConfig(root_path=str(described.folder), split=("test",), batch_size=8)
    live = open_live(encoder, config)
    assert live.d_model == 3
    tokens = np.concatenate([live.read(shard) for shard in range(3)])
    np.testing.assert_array_equal(tokens, dataset.read(0, 20).reshape(-1, 3))


def test_live_training_calls_a_host_function_in_one_thread_at_a_time(described):
    """PyTorch's hooks, by which layers are read, are those of the model, not of a thread."""
    running = 0
    most_running = 0

    def slow(windows):
        nonlocal running, most_running
        running += 1
        most_running = max(most_running, running)
        time.sleep(0.05)
        running -= 1
        return amplitudes(windows)

    config = ms.ExtractConfig(root_path=str(described.folder), batch_size=8)
    live = open_live(make_encoder(slow), config)
    stream = shuffled_tokens(live, batch_size=sum(live.tokens_per_shard), shuffle_seed=0)
    for _ in range(3):
        next(stream)
    assert most_running == 1


def test_tokens_of_a_span_are_on_its_channels(dataset):
    sequences, tokens = tokens_of(dataset, Span(1, 1550, 1710, (3, 7), True))
    expected = {
        (10 + window, 1 + N_PATCHES * channel + patch)
        for channel in (3, 7)
        for window, patch in ((1, 7), (2, 0), (2, 1))
    }
    assert set(zip(sequences.tolist(), tokens.tolist(), strict=True)) == expected


def test_covered_tokens_match_a_search(described, dataset):
    events = read_events(described.folder)["burst"]
    covered = event_share(dataset, events) >= 0.5
    assert covered.shape == (20, N_CHANNELS * N_PATCHES)
    for sequence in range(20):
        name = dataset.recordings[dataset.recording[sequence]]
        inside = np.zeros((40 * RATE, N_CHANNELS))
        for event in events:
            if event.recording == name:
                inside[event.start : event.stop, list(event.channels)] = 1
        start = WINDOW * dataset.window[sequence]
        share = inside[start : start + WINDOW].reshape(N_PATCHES, PATCH, -1).mean(1)
        np.testing.assert_array_equal(covered[sequence], (share.T >= 0.5).ravel())
    assert covered.any()


def test_card_of_a_feature_is_of_its_channels(described, dataset):
    """An autoencoder whose features are the three amplitudes."""
    eye = np.eye(3)
    params = {"W_enc": eye, "b_enc": np.zeros(3), "W_dec": eye, "b_dec": np.zeros(3)}
    sae = ms.SparseAutoencoder(params)
    activity = collect(dataset, sae)
    by_channel = dataset.read(0, 20)[:, 1:].reshape(20, N_CHANNELS, N_PATCHES, 3)
    np.testing.assert_allclose(
        activity.by_channel, by_channel.sum((0, 2), dtype=np.float64).T, rtol=1e-5
    )
    assert activity.channel_tokens.tolist() == [20 * N_PATCHES] * N_CHANNELS

    card = describe(Context(dataset, sae, activity, None, w=1), 1)
    is_planted = np.isin(described.names, described.planted)
    assert card.channel_ratio[is_planted].min() > 2 * card.channel_ratio[~is_planted].max()
    assert card.channel in described.planted
    assert card.suggestion == "posterior alpha, 8–13 Hz"
    assert card.spectrum.hz[np.argmax(card.spectrum.ratio)] == pytest.approx(HZ, abs=0.7)
    assert card.position.sum() + card.cls == pytest.approx(1)
    assert card.cls > 0
    assert card.waveform is None
    top = [example for example in card.examples if example.group == "top"]
    assert len(top) == 6
    for example in top:
        assert example.channel in described.planted
        assert example.trace_channel is None
        start, stop = (round(RATE * second) for second in example.patch)
        bursts = described.bursts[example.recording]
        assert any(start < burst + BURST and stop > burst for burst in bursts)
        eeg = load_recording(described.folder / example.recording)
        at = round(RATE * example.start)
        column = described.names.index(example.channel)
        expected = eeg[at : at + len(example.trace), column]
        np.testing.assert_allclose(example.trace / 10, expected, atol=0.051)
        # The strip is of the patches on the example's channel, inside its window.
        first = round(RATE * (example.strip_start - example.start))
        in_window = expected[first : first + len(example.strip) * PATCH]
        spectrum = np.abs(np.fft.rfft(in_window.reshape(-1, PATCH)))[:, 6]
        np.testing.assert_allclose(example.strip, np.maximum(spectrum - 15, 0), atol=0.01)


@pytest.mark.parametrize(("unit", "uv"), [("uV", 1.0), ("100 uV", 100.0)])
def test_recordings_in_microvolts_are_shown_in_sd(dataset, tmp_path, unit, uv):
    rng = np.random.default_rng(0)
    sd = rng.uniform(5, 20, N_CHANNELS) / uv
    sd[7] = 0
    noise = rng.normal(size=(40 * RATE, N_CHANNELS))
    z = (noise - noise.mean(0)) / noise.std(0)
    np.save(tmp_path / dataset.recordings[0], (z * sd + 3).astype(np.float32))
    changed = replace(dataset, folder=tmp_path, description=replace(dataset.description, unit=unit))
    shown = changed.eeg_of(2)
    z[:, 7] = 0
    np.testing.assert_allclose(shown, z[2 * WINDOW : 3 * WINDOW], atol=1e-4)
    is_flat = np.arange(N_CHANNELS) == 7
    np.testing.assert_allclose(changed.uv_per_sd(0)[~is_flat], uv * sd[~is_flat], rtol=1e-5)


def test_activations_and_fingerprint(encoder):
    x = np.random.default_rng(0).normal(size=(2, WINDOW, N_CHANNELS)).astype(np.float32)
    np.testing.assert_array_equal(encoder.activations(x), amplitudes(x))
    assert encoder.fingerprint == make_encoder().fingerprint
    assert encoder.fingerprint != make_encoder(name="other weights").fingerprint
    with pytest.raises(ms.UserError, match=r"must be \[batch, 800 samples, 30 channels\]"):
        encoder.activations(x[:, :100])


def test_integers_of_numpy_make_the_same_encoder(encoder):
    # Annotations are checked in tests only.
    from_function = inspect.unwrap(ms.from_function)
    same = from_function(
        amplitudes,
        name="amplitudes",
        seq_len=np.int64(WINDOW),
        channels=np.int32(N_CHANNELS),
        tokens=GRID,
        backend="host",
    )
    assert same.fingerprint == encoder.fingerprint
    assert repr(same.spec.window_shape) == repr(encoder.spec.window_shape)


@pytest.mark.parametrize(
    ("f", "changes", "message"),
    [
        (lambda x: x, {}, r"shape \[1, 800, 30\], but the 241 tokens require \[1, 241, 30\]"),
        (
            lambda x: np.float32(0),
            {},
            r"shape \[\], but the 241 tokens require \[1, 241, d_model\]",
        ),
        (lambda x: {"a": x}, {}, "layers by numbers from 0, but has 'a'"),
        (lambda x: {}, {}, "but has nothing"),
        # As models that return logits and a tuple of hidden states
        (lambda x: (x[:, 0], (x, x)), {}, "layer 1 .* must be an array or a tensor, got tuple"),
        (lambda x: x.tolist(), {}, "layer 0 .* must be an array or a tensor, got list"),
        (amplitudes, {"seq_len": 700}, "reach to sample 799 .* windows have 700 samples"),
        (amplitudes, {"channels": 19}, "channel 29, but windows .* 19 channels"),
    ],
)
def test_output_must_fit_the_tokens(f, changes, message):
    with pytest.raises(ms.UserError, match=message):
        make_encoder(f, **changes)


def test_function_of_pytorch_requires_the_host_backend():
    with pytest.raises(ms.UserError, match=r'cannot trace .* set backend="host" if it calls Py'):
        make_encoder(amplitudes, backend="jax")


def test_unit_of_the_recordings_must_be_that_of_the_function(described, tmp_path):
    """Those of the fixture are z-scored."""
    settings = ms.ExtractConfig(root_path=str(described.folder), out=str(tmp_path / "store"))
    with pytest.raises(ms.UserError, match="expects EEG in uV, but the recordings are in SD"):
        ms.extract(make_encoder(unit="uV"), settings)
    encoder = make_encoder(unit="SD")
    ms.extract(encoder, settings)
    # A store that was extracted before the unit was given stays valid.
    assert encoder.fingerprint == make_encoder().fingerprint
    # Annotations are checked in tests only.
    with pytest.raises(ms.UserError, match="unit must be one of SD, uV, 100 uV, mV, got 'V'"):
        inspect.unwrap(ms.from_function)(
            amplitudes,
            name="amplitudes",
            seq_len=WINDOW,
            channels=N_CHANNELS,
            tokens=GRID,
            unit="V",
            backend="host",
        )


def patches_of(x: np.ndarray) -> torch.Tensor:
    """Return [batch, channels, patches, samples]."""
    return torch.from_numpy(x).transpose(1, 2).reshape(len(x), N_CHANNELS, N_PATCHES, PATCH)


def test_transposed_output_is_refused():
    """It has as many numbers as the tokens require, which would be of other channels and times."""
    grid = ms.TokenGrid.patches(N_PATCHES, PATCH, n_channels=N_CHANNELS)
    make_encoder(patches_of, tokens=grid)
    with pytest.raises(ms.UserError, match=r"\[1, 8, 30, 100\], but .* return \[1, 240, 100\]"):
        make_encoder(lambda x: patches_of(x).transpose(1, 2), tokens=grid)
    by_time = ms.TokenGrid(
        channel=np.tile(np.arange(N_CHANNELS), N_PATCHES),
        first=np.repeat(PATCH * np.arange(N_PATCHES), N_CHANNELS),
        last=np.repeat(PATCH * np.arange(1, N_PATCHES + 1) - 1, N_CHANNELS),
    )
    make_encoder(lambda x: patches_of(x).transpose(1, 2), tokens=by_time)


def test_list_of_layers_is_numbered_from_0():
    """As the hidden states of transformers, which are tensors with a gradient in a tuple."""
    weight = torch.nn.Parameter(torch.tensor(2.0))
    grid = ms.TokenGrid.patches(N_PATCHES, PATCH, n_channels=N_CHANNELS)

    def layers(x):
        return patches_of(x) * weight, patches_of(x) * weight**2

    encoder = make_encoder(layers, tokens=grid)
    assert encoder.spec.layers == (0, 1)
    x = np.random.default_rng(0).normal(size=(2, WINDOW, N_CHANNELS)).astype(np.float32)
    np.testing.assert_array_equal(encoder.activations(x, 1), 4 * patches_of(x).numpy())


@pytest.mark.parametrize("part", [torch.nn.Dropout(0.01), torch.nn.BatchNorm1d(PATCH)])
def test_model_in_training_mode_is_reported(part):
    grid = ms.TokenGrid.patches(N_PATCHES, PATCH, n_channels=N_CHANNELS)

    def layer(x):
        return part(patches_of(x).flatten(0, 2)).reshape(len(x), -1, PATCH)

    with pytest.warns(UserWarning, match=r"layer 0 .* differs each time, or depends on other"):
        make_encoder(layer, tokens=grid)
    part.eval()
    make_encoder(layer, tokens=grid)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_weights_of_the_same_name_are_refused(dtype, described, tmp_path):
    """As after a model was loaded again, for stores that are complete and for interrupted ones."""
    settings = ms.ExtractConfig(
        root_path=str(described.folder),
        out=str(tmp_path / "store"),
        split=("test",),
        batch_size=8,
        dtype=dtype,
    )
    (store,) = ms.extract(make_encoder(), settings)
    assert ms.extract(make_encoder(), settings)[0].was_complete
    changed = make_encoder(lambda x: amplitudes(x) + 1)
    with pytest.raises(ms.UserError, match="contains other activations than the function returns"):
        ms.extract(changed, settings)
    store.shards[-1].path.unlink()
    with pytest.raises(ms.UserError, match="choose another name and --out, or use --overwrite"):
        ms.extract(changed, settings)
    assert not ms.extract(make_encoder(), settings)[0].was_complete
    before = store.read(0)
    (replaced,) = ms.extract(changed, replace(settings, overwrite=True))
    np.testing.assert_allclose(
        replaced.read(0).astype(np.float32), before.astype(np.float32) + 1, rtol=0.01
    )


def test_function_must_return_all_windows(described, tmp_path):
    encoder = make_encoder(lambda x: amplitudes(x[:1]))
    settings = ms.ExtractConfig(
        root_path=str(described.folder), out=str(tmp_path / "store"), batch_size=8
    )
    with pytest.raises(ms.UserError, match="returned 1 windows for 8"):
        ms.extract(encoder, settings)


@pytest.mark.usefixtures("eight_devices")
def test_function_on_devices_must_return_all_windows(described, tmp_path):
    """As one that averages over the batch, which has the right shape for a single window."""
    grid = ms.TokenGrid.patches(N_PATCHES, PATCH)

    def mean_window(x):
        return x.reshape(len(x), N_PATCHES, -1).mean(0, keepdims=True)

    encoder = make_encoder(mean_window, tokens=grid, backend="jax")
    settings = ms.ExtractConfig(
        root_path=str(described.folder), out=str(tmp_path / "store"), batch_size=16
    )
    # One from each of the eight devices.
    with pytest.raises(ms.UserError, match="returned 8 windows for 16"):
        ms.extract(encoder, settings)


@pytest.mark.parametrize("change", [torch.Tensor.bfloat16, torch.Tensor.requires_grad_])
def test_tensors_that_numpy_cannot_read(change):
    def double(x):
        return change(torch.from_numpy(x).reshape(len(x), N_PATCHES, -1)[:, :, :4] * 2)

    encoder = make_encoder(double, tokens=ms.TokenGrid.patches(N_PATCHES, PATCH))
    x = np.random.default_rng(0).integers(-9, 9, (2, WINDOW, N_CHANNELS)).astype(np.float32)
    # These numbers have few digits.
    expected = 2 * x.reshape(2, N_PATCHES, -1)[:, :, :4]
    np.testing.assert_array_equal(encoder.activations(x), expected)


def test_jax_function_without_parameters(described, tmp_path):
    """Weights in a closure; all devices compute, and the last batch is padded."""
    weights = np.random.default_rng(0).normal(size=(PATCH, 4)).astype(np.float32)

    def project(x):
        patches = x.swapaxes(1, 2).reshape(len(x), N_CHANNELS, N_PATCHES, PATCH)
        return patches @ weights

    grid = ms.TokenGrid.patches(N_PATCHES, PATCH, n_channels=N_CHANNELS)
    encoder = make_encoder(project, tokens=grid, backend="jax")
    settings = ms.ExtractConfig(
        root_path=str(described.folder), out=str(tmp_path / "store"), split=("val",), batch_size=7
    )
    (store,) = ms.extract(encoder, settings)
    dataset = open_dataset(store.folder, -1, None, described.folder)
    x = np.stack([dataset.window_of(0, window) for window in range(10)])
    expected = project(x).reshape(10, -1, 4)
    np.testing.assert_allclose(dataset.read(0, 10), expected, rtol=1e-4, atol=1e-4)


def test_options_of_patchtst_are_refused(encoder, described, tmp_path):
    settings = ms.ExtractConfig(root_path=str(described.folder), out=str(tmp_path / "store"))
    for change, message in (
        ({"precision": "bfloat16"}, "--precision bfloat16"),
        ({"force_revin": True}, "--force_revin requires a PatchTST"),
        ({"cache_layer": (1,)}, "this encoder has 1 layers, -1 to 0"),
    ):
        with pytest.raises(ms.UserError, match=message):
            ms.extract(encoder, replace(settings, **change))
