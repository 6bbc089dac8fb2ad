"""The error on masked patches, with the output of a layer replaced."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from convert import cbramod_torch
from convert.encoder import read_source
from minsae_jax.encoder.base import ComputeOptions
from minsae_jax.parallel.mesh import make_mesh
from tests.encoder.cbramod.conftest import SOURCE


@pytest.fixture(scope="module")
def batch(expected):
    """Eight windows, for the eight simulated devices."""
    return np.tile(expected["past_values"], (4, 1, 1)), np.tile(expected["mask"], (4, 1, 1))


def untouched_zero_and_constant(constant, z):
    return jnp.stack([z, jnp.zeros_like(z), jnp.broadcast_to(constant, z.shape)])


def error_of(output, x, mask):
    """Return the mean over masked patches of (output - patch)²; all of one window."""
    patches = x.T.reshape(output.shape)
    return np.square(output - patches)[mask].mean()


@pytest.mark.parametrize("layer", [0, 2])
def test_untouched_error_is_that_of_braindecode(encoder, expected, batch, layer):
    errors = run(encoder, batch, layer, np.zeros(40, np.float32))
    for i in range(8):
        output = expected["masked_output"][i % 2]
        reference = error_of(output, batch[0][i], batch[1][i])
        assert errors[i, 0] == pytest.approx(float(reference), rel=1e-4)


def test_last_layer_replaced_leaves_the_head_alone(encoder, batch):
    """With all tokens equal after the last layer, every patch is the same map of them."""
    constant = np.random.default_rng(0).normal(size=40).astype(np.float32)
    errors = run(encoder, batch, 2, constant)
    kernel, bias = encoder.params["head"]["kernel"], encoder.params["head"]["bias"]
    for i, (x, mask) in enumerate(zip(*batch, strict=True)):
        for variant, tokens in ((1, np.zeros(40)), (2, constant)):
            output = np.broadcast_to(tokens @ kernel + bias, (4, 3, 200))
            reference = error_of(output, x, mask)
            assert errors[i, variant] == pytest.approx(float(reference), rel=1e-4)


def run(encoder, batch, layer, constant):
    masked_errors = encoder.reconstruction.masked_errors(
        make_mesh(), layer, ComputeOptions(), untouched_zero_and_constant
    )
    errors = np.asarray(masked_errors(encoder.params, constant, batch))
    assert errors.shape == (8, 3)
    return errors


def test_masks_have_the_requested_share(encoder):
    rng = np.random.default_rng(0)
    masks = np.stack([encoder.reconstruction.draw_mask(0.5, rng) for _ in range(200)])
    assert masks.shape == (200, 4, 3)
    assert (masks.sum((1, 2)) == 6).all()
    # Patches of every channel are masked on their own, about half of the time.
    assert (np.abs(masks.mean(0) - 0.5) < 0.15).all()
    assert encoder.reconstruction.draw_mask(0.01, rng).sum() == 1


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_rest_of_the_model_runs_on_substitutes_as_in_plain_torch(
    encoder, expected, layer, monkeypatch
):
    source = read_source(SOURCE)
    state = {name: torch.tensor(tensor) for name, tensor in source.checkpoint.tensors.items()}
    x = expected["past_values"]
    shift = np.random.default_rng(0).normal(size=40).astype(np.float32)
    function = encoder.function_from(layer, lambda shift, z: jnp.stack([z, z + shift[None]]))
    downstream = jax.jit(function)(encoder.params, shift, x)
    original = cbramod_torch._layer

    def shifted(a, state, name, z):
        z = original(a, state, name, z)
        return z + torch.tensor(shift) if name.endswith(f".{layer}") else z

    for variant, function in enumerate([original, shifted]):
        monkeypatch.setattr(cbramod_torch, "_layer", function)
        hidden, output = cbramod_torch.forward(source.architecture, state, torch.tensor(x))
        last = hidden[-1].flatten(1, 2)[:, None]
        np.testing.assert_allclose(downstream.last[:, variant], last, atol=1e-4)
        patches = output.flatten(1, 2)[:, None]
        np.testing.assert_allclose(downstream.patches[:, variant], patches, atol=1e-4)
    untouched = encoder.activations(x, layer).reshape(downstream.hidden.shape)
    np.testing.assert_allclose(downstream.hidden, untouched, atol=1e-5)
