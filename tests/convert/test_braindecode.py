"""Models of Braindecode with random weights: where their tokens lie, and what extraction gets."""

import json
import socket
import sys
import time
import warnings
from typing import get_args
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from convert.__main__ import main as convert
from convert.braindecode import BraindecodeEncoder, load_braindecode
from minsae_jax import UserError, load_sae
from minsae_jax.__main__ import main
from minsae_jax.activations.tokens import read_tokens
from minsae_jax.eeg.description import Description, Unit
from minsae_jax.encoder.base import check_recordings
from tests.conftest import FIXTURES
from tests.eeg_200hz import write_recordings

# They need the extra `braindecode`, which `make test-all` installs.
pytestmark = pytest.mark.slow
RUNS = ("live", "stored")
SAVED = FIXTURES / "cbramod"

CHANNELS = ("Fp1", "C3", "Cz", "O2")
N_TIMES = 600
SMALL = {
    "Labram": {"num_layers": 2},
    "CBraMod": {"n_layer": 2, "return_encoder_output": True},
    "BIOT": {"num_layers": 2, "embed_dim": 32, "num_heads": 4},
    "EEGPT": {"depth": 2, "embed_dim": 32, "num_heads": 4, "chan_proj_type": "none"},
    "REVE": {"depth": 2, "embed_dim": 32, "heads": 2, "head_dim": 16},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The library, with places for REVE's channels, which it would download."""
    places = {"Fp1": [-0.3, 0.9, 0.0], "C3": [-0.7, 0, 0.7], "Cz": [0, 0, 1], "O2": [0.3, -0.9, 0]}
    folder = tmp_path_factory.mktemp("reve")
    (folder / "reve_positions.json").write_text(json.dumps(places))
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setenv("REVE_POSITIONS_PATH", str(folder))
        # PyPI's torchaudio needs CUDA, so that it cannot be imported beside a torch for CPUs. The
        # library imports it for filters and resampling, which none of these models uses.
        for name in ("torchaudio", "torchaudio.functional", "torchaudio.transforms"):
            patch.setitem(sys.modules, name, MagicMock())
        from braindecode import models

        yield models


@pytest.fixture(scope="module")
def make(models):
    """make(class name, **settings) -> a small model with random weights."""

    def run(name, **settings):
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = {"n_chans": 4, "n_times": N_TIMES, "sfreq": 200, "n_outputs": 2}
            return getattr(models, name)(**data | SMALL[name] | settings)

    return run


@pytest.fixture(scope="module", params=SMALL)
def encoder(request, make):
    return BraindecodeEncoder(make(request.param), CHANNELS)


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(0).normal(size=(1, N_TIMES, 4)).astype(np.float32)


def test_one_sample_moves_the_tokens_that_contain_it(encoder, x):
    """The grid, from the model itself: before the first layer, no token has seen another's patch.

    Norms over the whole window (LaBraM, CBraMod) and places from neighbours (CBraMod) move the
    other tokens a little; the largest change is then that of the token that contains the sample.
    """
    grid = encoder.spec.tokens
    assert encoder.embedding(x).shape == (1, grid.n_tokens, encoder.spec.d_model)
    shares_statistics = type(encoder.model).__name__ in ("Labram", "CBraMod")
    for channel in range(4):
        for sample in (0, 30, 150, 199, 200, 399, 410, 570):
            # Both values are above the quantile that BIOT's windows are divided by.
            original, changed = x.copy(), x.copy()
            original[0, sample, channel] = 4
            changed[0, sample, channel] = 7
            before = encoder.embedding(original)[0]
            change = np.abs(encoder.embedding(changed)[0] - before).max(1)
            contains = (grid.first <= sample) & (sample <= grid.last) & (grid.channel == channel)
            if shares_statistics:
                assert contains.sum() == 1
                assert contains[change.argmax()]
            else:
                np.testing.assert_array_equal(change > 1e-6, contains)


def test_layers_are_those_of_the_model(encoder, x):
    """The last layer is what the library's own forward gives to its head."""
    spec = encoder.spec
    assert spec.layers == (0, 1)
    first, last = encoder.function((0, 1))((), np.concatenate([x, 2 * x]))
    assert first.shape == last.shape == (2, spec.tokens.n_tokens, spec.d_model)
    assert first.dtype == np.float32
    assert np.abs(first - last).max() > 1e-5
    np.testing.assert_allclose(encoder.activations(x), last[:1], atol=1e-5)
    features = own_features(encoder, last[:1])
    given = x
    if type(encoder.model).__name__ == "BIOT":
        given = x / np.quantile(np.abs(x), 0.95, axis=1, keepdims=True)
    with torch.inference_mode():
        output = encoder.model(
            torch.from_numpy(given.swapaxes(1, 2).copy()),
            return_features=True,
            **encoder.layout.arguments,
        )
    expected = output["features"]
    np.testing.assert_allclose(features, expected.numpy().reshape(features.shape), atol=1e-4)


@pytest.mark.parametrize("unit", get_args(Unit))
def test_recordings_in_another_unit_are_refused(encoder, unit):
    """With both values; BIOT, which divides by each window's amplitude, reads any unit."""
    spec = encoder.spec
    expected = {"Labram": "100 uV", "CBraMod": "100 uV", "EEGPT": "mV", "REVE": "SD", "BIOT": None}
    assert spec.unit == expected[type(encoder.model).__name__]
    recordings = Description(200.0, CHANNELS, (None,) * 4, unit)
    if spec.unit in (None, unit):
        check_recordings(spec, recordings, allow_mismatch=False)
        return
    message = f"expects EEG in {spec.unit}, but the recordings are in {unit}"
    with pytest.raises(UserError, match=message):
        check_recordings(spec, recordings, allow_mismatch=False)


def test_activations_of_biot_do_not_depend_on_the_unit(make, x):
    encoder = BraindecodeEncoder(make("BIOT"), CHANNELS)
    np.testing.assert_allclose(encoder.activations(x), encoder.activations(100 * x), atol=1e-5)
    assert np.abs(encoder.activations(x) - encoder.activations(x**2)).max() > 1e-3


def own_features(encoder, last):
    """Return what the library calls features, computed from the last layer's tokens."""
    model = encoder.model
    tokens = torch.from_numpy(last)
    with torch.inference_mode():
        match type(model).__name__:
            case "Labram":
                return model.norm(tokens)[:, 1:].numpy()
            case "CBraMod":
                return model.proj_out(tokens).numpy()
            case "BIOT":
                return tokens.mean(1).numpy()
            case "EEGPT":
                per_patch = tokens.unflatten(1, (-1, 8))
                return model.target_encoder.norm(per_patch[:, :, 4:]).flatten(1).numpy()
    return last


def test_summary_tokens_of_eegpt_cover_all_channels_of_their_patch(make, x):
    encoder = BraindecodeEncoder(make("EEGPT"), CHANNELS)
    grid = encoder.spec.tokens
    before = encoder.activations(x, 0)[0]
    changed = x.copy()
    changed[0, 100, 2] += 3
    change = np.abs(encoder.activations(changed, 0)[0] - before).max(1)
    np.testing.assert_array_equal(change > 1e-7, (grid.first <= 100) & (grid.last >= 100))
    assert (grid.channel.reshape(-1, 8) == [0, 1, 2, 3, -1, -1, -1, -1]).all()


def test_projected_channels_of_eegpt_have_no_channel(make, x):
    encoder = BraindecodeEncoder(make("EEGPT", chan_proj_type="conv1d_constraint"))
    assert (encoder.spec.tokens.channel == -1).all()
    assert encoder.spec.tokens.n_tokens == 18 * (19 + 4)
    before = encoder.embedding(x)[0]
    changed = x.copy()
    changed[0, 100, 2] += 3
    change = np.abs(encoder.embedding(changed)[0] - before).max(1)
    grid = encoder.spec.tokens
    of_patch = np.flatnonzero((grid.first <= 100) & (grid.last >= 100))
    assert set(np.flatnonzero(change > 1e-6)) <= set(of_patch)
    assert (change[of_patch] > 1e-6).sum() > 10


def test_saved_folder_is_loaded_with_its_fingerprint(make, tmp_path):
    model = make("Labram")
    model.save_pretrained(tmp_path / "saved")
    loaded = load_braindecode("LaBraM", str(tmp_path / "saved"), CHANNELS)
    assert loaded.fingerprint == BraindecodeEncoder(model, CHANNELS).fingerprint
    assert loaded.fingerprint != BraindecodeEncoder(model, CHANNELS[::-1]).fingerprint
    with torch.no_grad():
        model.blocks[1].attn.proj.bias[0] += 1e-3
    assert loaded.fingerprint != BraindecodeEncoder(model, CHANNELS).fingerprint


def test_weights_that_the_layers_lack_are_refused(make, tmp_path):
    """The library would leave them random. Those of the head have no effect."""
    make("Labram").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)

    def load_without(prefix: str) -> BraindecodeEncoder:
        save_file({k: t for k, t in tensors.items() if not k.startswith(prefix)}, path)
        return load_braindecode("LaBraM", str(tmp_path), CHANNELS)

    message = (
        r"lacks weights of Braindecode's Labram, .* blocks.1.attn.k_norm.bias, .* and \d+ more"
    )
    with pytest.raises(UserError, match=message):
        load_without("blocks.1.")
    with pytest.raises(UserError, match=r"random: blocks.0.norm1.bias$"):
        load_without("blocks.0.norm1.bias")
    assert load_without("final_layer.").fingerprint == load_without("final_layer.").fingerprint
    with pytest.raises(UserError, match="lacks weights of Braindecode's CBraMod"):
        load_braindecode("CBraMod", str(tmp_path), CHANNELS)


@pytest.fixture
def no_network(monkeypatch):
    def fail(*_, **__):
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", fail)


def test_without_a_network_a_download_fails_without_retries(models, no_network, monkeypatch):
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    message = "labram-pretrained is not a folder and cannot be downloaded .*name resolution"
    with pytest.raises(UserError, match=message):
        load_braindecode("LaBraM", channels=CHANNELS)
    assert pauses == []


def test_downloaded_weights_are_loaded_without_a_network(make, no_network, tmp_path, monkeypatch):
    from huggingface_hub import constants

    model = make("Labram")
    revision = "0123456789abcdef0123456789abcdef01234567"
    saved = tmp_path / "models--someone--labram"
    model.save_pretrained(saved / "snapshots" / revision)
    (saved / "refs").mkdir()
    (saved / "refs" / "main").write_text(revision)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    loaded = load_braindecode("LaBraM", "someone/labram", CHANNELS)
    assert loaded.fingerprint == BraindecodeEncoder(model, CHANNELS).fingerprint


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_model_of_another_dtype_runs_in_float32(make, x, dtype):
    rounded = make("CBraMod").to(dtype).float()
    expected = BraindecodeEncoder(rounded).activations(x, -1)
    encoder = BraindecodeEncoder(make("CBraMod").to(dtype))
    np.testing.assert_array_equal(encoder.activations(x, -1), expected)


def test_windows_are_cut_to_whole_patches(make, models):
    """A model can be saved without its window, or with one that ends within a patch."""
    assert BraindecodeEncoder(make("CBraMod", n_times=750), CHANNELS).spec.seq_len == 600
    anywhere = models.CBraMod(n_layer=1, return_encoder_output=True, n_outputs=2)
    spec = BraindecodeEncoder(anywhere, CHANNELS).spec
    assert (spec.seq_len, spec.n_vars, spec.sampling_rate) == (6000, 4, 200)


def test_names_of_channels_matter_where_the_model_reads_them(make, x):
    labram = make("Labram")
    straight = BraindecodeEncoder(labram, CHANNELS)
    swapped = BraindecodeEncoder(labram, (CHANNELS[1], CHANNELS[0], *CHANNELS[2:]))
    assert np.abs(straight.embedding(x) - swapped.embedding(x)).max() > 1e-3
    assert straight.fingerprint != swapped.fingerprint
    assert straight.spec.channels == ("FP1", "C3", "CZ", "O2")
    assert BraindecodeEncoder(make("CBraMod"), CHANNELS).spec.channels is None


@pytest.mark.parametrize("name", ["Labram", "REVE"])
def test_another_spelling_of_channels_is_the_same_encoder(make, x, name):
    model = make(name)
    encoder = BraindecodeEncoder(model, CHANNELS)
    other = BraindecodeEncoder(model, ("EEG FP1-REF", "c3", "CZ", "o2"))
    np.testing.assert_array_equal(encoder.embedding(x), other.embedding(x))
    assert encoder.fingerprint == other.fingerprint


def test_command_extracts_what_the_native_encoder_extracts(models, tmp_path):
    """The folder that Braindecode saved, run by Braindecode and converted to Flax."""
    recordings = write_recordings(tmp_path / "recordings")
    paths = ["extract", "--root_path", str(recordings), "--checkpoint_path", str(SAVED)]
    for out, flags in (("host", ["--model", "braindecode:cbramod"]), ("native", [])):
        main([*paths, "--layer", "1", "--out", str(tmp_path / out), "--batch_size", "6", *flags])
    host, native = (tmp_path / name / "l1" for name in ("host", "native"))
    shards = sorted(path.name for path in native.glob("b*.npy"))
    assert len(shards) == 3
    for name in shards:
        np.testing.assert_allclose(np.load(host / name), np.load(native / name), atol=1e-4)
    grids = [read_tokens(folder) for folder in (host, native)]
    for name in ("channel", "first", "last"):
        np.testing.assert_array_equal(getattr(grids[0], name), getattr(grids[1], name))
    with pytest.raises(UserError, match="--model must be braindecode:NAME"):
        main([*paths, "--model", "LaBraM"])
    yaml = ["--config_path", "x.yaml"]
    with pytest.raises(UserError, match="--config_path cannot be combined with --model"):
        main([*paths, "--model", "braindecode:cbramod", *yaml])


@pytest.mark.parametrize("name", SMALL)
def test_random_weights_are_permutations_of_the_trained(make, models, tmp_path, capsys, name):
    recordings = write_recordings(tmp_path / "recordings", channels=CHANNELS)
    model = make(name)
    model.save_pretrained(tmp_path / "trained")
    out = tmp_path / "random"
    source = [f"braindecode:{name}", "--checkpoint_path", str(tmp_path / "trained")]
    command = ["randomize", *source, "--root_path", str(recordings), "--out", str(out)]
    convert([*command, "--seed", "1"])
    random = load_braindecode(name, str(out), CHANNELS)
    assert random.fingerprint[:12] in capsys.readouterr().out
    changed = 0
    for (key, before), after in zip(
        model.named_parameters(), random.model.parameters(), strict=True
    ):
        before, after = before.detach().flatten(), after.detach().flatten()
        assert torch.equal(before.sort().values, after.sort().values), key
        changed += not torch.equal(before, after)
    assert changed > 10
    trained = load_braindecode(name, str(tmp_path / "trained"), CHANNELS)
    assert random.fingerprint != trained.fingerprint
    saved = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(UserError, match="random must be empty or new"):
        convert(command)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == saved


def test_random_weights_without_recordings_or_for_a_folder_are_one_line(tmp_path):
    out = ["--out", str(tmp_path / "random")]
    with pytest.raises(UserError, match="require --root_path, for the names of the channels"):
        convert(["randomize", "braindecode:cbramod", *out])
    with pytest.raises(UserError, match="--checkpoint_path is for models of Braindecode"):
        convert(["randomize", "checkpoints/demo", "--checkpoint_path", str(SAVED), *out])


def test_live_training_on_a_model_equals_training_on_its_store(models, tmp_path):
    """And the run is evaluated from stores alone, without loading the model."""
    recordings = write_recordings(tmp_path / "recordings")
    encoder = ["--model", "braindecode:cbramod", "--checkpoint_path", str(SAVED)]
    batch = ["--batch_size", "6"]
    stored = str(tmp_path / "store")
    splits = ["--split", "train", "val", "test"]
    extract = ["extract", "--root_path", str(recordings), "--layer", "1", "--out", stored]
    main([*extract, *splits, *encoder, *batch])
    # This recipe reads whole shards in order, so that both runs see the same batches.
    train = ["train", "--recipe", "minsae", "--cache_layer", "1", "--num_steps", "4"]
    train += ["--feature_dim_factor", "2", "--lambda_sparsity", "0.01"]
    live = ["--live", "--root_path", str(recordings), "--live_batch_size", "6", *encoder]
    main([*train, "--run_dir", str(tmp_path / "live"), *live])
    main([*train, "--run_dir", str(tmp_path / "stored"), "--store", stored])
    (live_sae, stored_sae) = (load_sae(tmp_path / run / "members/lambda=0.01") for run in RUNS)
    tokens = np.random.default_rng(0).normal(size=(5, 40)).astype(np.float32)
    np.testing.assert_allclose(live_sae(tokens), stored_sae(tokens), atol=1e-5)
    evaluate = ["evaluate", "--run", str(tmp_path / "live"), "--root_path", str(recordings)]
    main([*evaluate, "--store", f"{stored}_test/l1", "--no_report"])
    assert (tmp_path / "live/evaluation.csv").exists()
    live_flags = ["--live", "--root_path", str(recordings), "--model", "x"]
    with pytest.raises(UserError, match="--model must be braindecode:NAME"):
        main([*train, "--run_dir", str(tmp_path / "x"), *live_flags])
    with pytest.raises(UserError, match="--model requires --live"):
        main([*train, "--run_dir", str(tmp_path / "x"), "--store", stored, "--model", "x"])


def test_what_cannot_be_located_or_loaded_is_one_line(models, make, tmp_path):
    with pytest.raises(UserError, match="LaBraM does not know the channels EMG, EOG2"):
        BraindecodeEncoder(make("Labram"), ("Fp1", "EMG", "Cz", "EOG2"))
    with pytest.raises(UserError, match="REVE does not know the channels EMG"):
        BraindecodeEncoder(make("REVE"), ("Fp1", "EMG", "Cz", "O2"))
    with pytest.raises(UserError, match="LaBraM requires the channels' names"):
        BraindecodeEncoder(make("Labram"))
    with pytest.raises(UserError, match="only supported as a neural tokenizer"):
        BraindecodeEncoder(make("Labram", neural_tokenizer=False), CHANNELS)
    with pytest.raises(UserError, match=r"no supported model 'EEGNet' .* choose BIOT, CBraMod"):
        load_braindecode("EEGNet")
    other = models.Deep4Net(n_chans=4, n_times=N_TIMES, n_outputs=2)
    with pytest.raises(UserError, match="Deep4Net is not supported; choose one of BIOT"):
        BraindecodeEncoder(other)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be loaded as Braindecode's BIOT"):
        load_braindecode("biot", str(tmp_path))
