"""Scaled features against plain PyTorch, the whole model and closed forms."""

import numpy as np
import pytest
import torch

from convert import patchtst_torch
from convert.encoder import read_source
from minsae_jax import TokenGrid, UserError, from_function
from minsae_jax.evaluation.steering.edit import Place, SteeredEncoder
from tests.conftest import FIXTURES

FEATURES = (3, 40)
SCALES = np.array([[0.0, 1.0], [0.0, 0.0], [3.0, 3.0], [1.0, 1.0]])


@pytest.fixture(scope="module")
def sae(trained):
    """A wide autoencoder of which half of the features are active on a token of any layer."""
    sae = trained.sae("lambda=1")
    rng = np.random.default_rng(0)
    sae.params |= {"b_enc": rng.normal(size=64).astype(np.float32)}
    return sae


@pytest.fixture(scope="module")
def places(trained):
    names = trained.dataset("test").recordings
    return [Place(names[0], 0), Place(names[0], 2), Place(names[-1], 1)]


def run(trained, sae, places, layer):
    steered = SteeredEncoder(trained.encoder, trained.dataset("test"), layer, sae)
    (windows,) = steered.run(places, FEATURES, SCALES)
    x = np.stack([steered.read_window(place) for place in places])
    return windows, x


def steered_torch(trained, sae, x, layer, scales, monkeypatch):
    """Return the last layer and the head's patches of a plain PyTorch model with an edit."""
    source = read_source(FIXTURES / "tuhab_patch_100/checkpoint.pth")
    state = {name: torch.tensor(tensor) for name, tensor in source.checkpoint.tensors.items()}
    w = {name: torch.tensor(np.array(p)) for name, p in sae.params.items()}
    original = patchtst_torch._layer

    def edited(a, state, name, z, earlier):
        z, scores = original(a, state, name, z, earlier)
        if name.endswith(f".{layer}"):
            features = torch.relu(z @ w["W_enc"] + w["b_enc"])
            error = z - (features @ w["W_dec"] + w["b_dec"])
            for feature, scale in zip(FEATURES, scales, strict=True):
                features[..., feature] *= scale
            z = features @ w["W_dec"] + w["b_dec"] + error
        return z, scores

    with monkeypatch.context() as patch:
        patch.setattr(patchtst_torch, "_layer", edited)
        hidden, output = patchtst_torch.forward(
            trained.encoder.architecture, state, torch.tensor(x)
        )
    return hidden[-1].numpy(), output.numpy().swapaxes(1, 2)


@pytest.mark.parametrize("layer", [0, pytest.param(1, marks=pytest.mark.slow), 2])
def test_scaled_and_ablated_features_equal_plain_torch(trained, sae, places, layer, monkeypatch):
    windows, x = run(trained, sae, places, layer)
    for variant, scales in enumerate([(1.0, 1.0), *SCALES], start=0):
        last, patches = steered_torch(trained, sae, x, layer, scales, monkeypatch)
        np.testing.assert_allclose(windows.last[:, variant], last, atol=1e-4)
        np.testing.assert_allclose(windows.patches[:, variant], patches, atol=1e-4)
    for variant in (1, 2, 3):
        assert np.abs(windows.patches[:, variant] - windows.patches[:, 0]).max() > 1e-3


@pytest.mark.parametrize("layer", [0, 2])
def test_scale_1_is_the_untouched_model_to_the_bit(trained, sae, places, layer):
    windows, x = run(trained, sae, places, layer)
    np.testing.assert_array_equal(windows.last[:, 4], windows.last[:, 0])
    np.testing.assert_array_equal(windows.patches[:, 4], windows.patches[:, 0])
    encoder = trained.encoder
    np.testing.assert_allclose(windows.hidden, encoder.activations(x, layer), atol=1e-5)
    np.testing.assert_allclose(windows.last[:, 0], encoder.activations(x), atol=1e-5)
    output = np.asarray(encoder(x)).swapaxes(1, 2)
    np.testing.assert_allclose(windows.patches[:, 0], output, atol=1e-5)


def test_after_the_last_layer_patches_change_by_the_waveform_of_each_feature(trained, sae, places):
    """change = Σ_i (scale_i - 1) f_i waveform(W_dec,i), since the head is linear."""
    windows, _ = run(trained, sae, places, 2)
    activations = np.asarray(sae.encode(windows.hidden))[
        ..., trained.dataset("test").tokens.located, :
    ]
    for variant, scales in enumerate(SCALES, start=1):
        expected = 0
        for feature, scale in zip(FEATURES, scales, strict=True):
            waveform = trained.encoder.waveform(sae.decoder_directions[feature])
            expected += (scale - 1) * activations[..., feature, None] * waveform
        change = windows.patches[:, variant] - windows.patches[:, 0]
        np.testing.assert_allclose(change, expected, atol=1e-5)


def test_batches_do_not_change_the_result(trained, sae, places):
    """Seventeen windows are two batches, the second padded."""
    steered = SteeredEncoder(trained.encoder, trained.dataset("test"), 1, sae)
    many = [places[i % 3] for i in range(17)]
    batches = list(steered.run(many, FEATURES, SCALES[:1]))
    assert [batch.start for batch in batches] == [0, 16]
    last = np.concatenate([batch.last for batch in batches])
    assert len(last) == 17
    for i in range(17):
        np.testing.assert_array_equal(last[i], last[i % 3])


def test_encoder_of_a_function_cannot_be_steered(trained, sae):
    tokens = TokenGrid.patches(5, 200)
    encoder = from_function(
        lambda x: x[:, :640].reshape(-1, 5, 128), name="f", seq_len=1000, channels=1, tokens=tokens
    )
    with pytest.raises(UserError, match="cannot be steered in this encoder"):
        SteeredEncoder(encoder, trained.dataset("test"), 0, sae)
