"""CBraMod in Flax computes what Braindecode's does, and its tokens lie where the grid says."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from convert import cbramod_torch
from convert.cbramod import to_flax
from convert.encoder import read_source
from minsae_jax import UserError
from minsae_jax.encoder.base import ComputeOptions
from minsae_jax.encoder.cbramod.architecture import Architecture
from minsae_jax.encoder.cbramod.encoder import CBraModEncoder
from minsae_jax.encoder.cbramod.model import CBraMod, patches
from minsae_jax.encoder.native import bind
from tests.encoder.cbramod.conftest import SOURCE

TOLERANCE = 1e-4


def assert_close(actual, expected):
    np.testing.assert_allclose(np.asarray(actual), expected, atol=TOLERANCE, rtol=0)


@pytest.fixture(scope="module")
def embedding(encoder):
    """embedding(windows, masked=None) -> tokens before the first layer."""
    a = encoder.architecture

    @jax.jit
    def run(params, x, masked):
        return bind(CBraMod, a, params).embedding(patches(a, x), masked)

    return lambda x, masked=None: np.asarray(run(encoder.params, x, masked))


def test_embedding_every_layer_and_head_equal_braindecode(encoder, expected, embedding):
    x = expected["past_values"]
    assert_close(embedding(x), expected["embedding"])
    layers = encoder.spec.layers
    outputs = jax.jit(encoder.function(layers))(encoder.params, x)
    for layer in layers:
        assert 0.1 < expected[f"layer_{layer}"].std() < 10
        assert_close(outputs[layer], expected[f"layer_{layer}"])
    assert_close(encoder.activations(x), expected["layer_2"])
    assert_close(encoder(x), expected["output"])


@pytest.mark.parametrize(("n_vars", "n_patches"), [(1, 1), (30, 9)])
def test_weights_fit_any_number_of_channels_and_patches(n_vars, n_patches):
    flags = {"n_vars": n_vars, "seq_len": 200 * n_patches}
    source = read_source(SOURCE, flags=flags)
    tensors = source.checkpoint.tensors
    encoder = CBraModEncoder(source.architecture, to_flax(source.architecture, tensors))
    x = np.random.default_rng(0).normal(size=(2, 200 * n_patches, n_vars)).astype(np.float32)
    state = {key: torch.tensor(tensor) for key, tensor in tensors.items()}
    _, output = cbramod_torch.forward(source.architecture, state, torch.from_numpy(x))
    assert_close(encoder(x), output.numpy())


PUBLISHED = Architecture(
    n_vars=3,
    seq_len=800,
    patch_len=200,
    stem_width=25,
    stem_kernel=49,
    n_layers=12,
    d_model=200,
    n_heads=8,
    d_ff=800,
    has_head=True,
)


def test_published_size_has_the_published_number_of_parameters():
    """Counted with PyTorch in the authors' model."""
    leaves = jax.tree.leaves(CBraModEncoder.abstract_params(PUBLISHED))
    assert sum(leaf.size for leaf in leaves) == 4_924_000


def test_two_layers_of_published_width_equal_plain_torch():
    a = replace(PUBLISHED, n_layers=2)
    state = random_state_dict(a)
    encoder = CBraModEncoder(a, to_flax(a, {key: t.numpy() for key, t in state.items()}))
    x = np.random.default_rng(0).normal(size=(2, 800, 3)).astype(np.float32)
    hidden, _ = cbramod_torch.forward(a, state, torch.from_numpy(x))
    outputs = jax.jit(encoder.function(encoder.spec.layers))(encoder.params, x)
    for actual, layer in zip(outputs, hidden, strict=True):
        assert 0.1 < layer.std() < 10
        assert_close(actual, layer.numpy())


def random_state_dict(a: Architecture) -> dict[str, torch.Tensor]:
    """Return every tensor of a CBraMod under its published name, none of them trivial."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 0.2) -> torch.Tensor:
        return scale * torch.randn(*shape, generator=g)

    half = a.d_model // 2
    state = {
        "patch_embedding.mask_encoding": normal(a.patch_len),
        "patch_embedding.positional_encoding.0.weight": normal(a.d_model, 1, 19, 7, scale=0.1),
        "patch_embedding.positional_encoding.0.bias": normal(a.d_model),
    }
    shapes = {"patch_embedding.spectral_proj.0": (a.d_model, 101), "proj_out.0": (200, a.d_model)}
    shapes["patch_embedding.proj_in.0"] = (a.stem_width, 1, 1, a.stem_kernel)
    shapes["patch_embedding.proj_in.3"] = (a.stem_width, a.stem_width, 1, 3)
    shapes["patch_embedding.proj_in.6"] = (a.stem_width, a.stem_width, 1, 3)
    norms = {f"patch_embedding.proj_in.{i}": a.stem_width for i in (1, 4, 7)}
    for i in range(a.n_layers):
        layer = f"encoder.layers.{i}"
        shapes[f"{layer}.linear1"] = (a.d_ff, a.d_model)
        shapes[f"{layer}.linear2"] = (a.d_model, a.d_ff)
        norms |= {f"{layer}.norm1": a.d_model, f"{layer}.norm2": a.d_model}
        for letter in "st":
            attention = f"{layer}.self_attn_{letter}"
            shapes[f"{attention}.out_proj"] = (half, half)
            state[f"{attention}.in_proj_weight"] = normal(3 * half, half, scale=half**-0.5)
            state[f"{attention}.in_proj_bias"] = normal(3 * half)
    for name, shape in shapes.items():
        n_inputs = int(np.prod(shape[1:]))
        state[f"{name}.weight"] = normal(*shape, scale=n_inputs**-0.5)
        state[f"{name}.bias"] = normal(shape[0])
    for name, width in norms.items():
        state[f"{name}.weight"] = 1 + normal(width)
        state[f"{name}.bias"] = normal(width)
    return state


def test_each_patch_moves_its_own_token_most(encoder, expected, embedding):
    """The grid: a change of one patch of one channel is largest in the token that lies there.

    Other tokens move too: norms share statistics in a window, and neighbours give a token its
    place.
    """
    x = expected["past_values"][:1]
    tokens = encoder.spec.tokens
    assert tokens.n_tokens == 12
    before = embedding(x).reshape(12, -1)
    for token in range(12):
        first, last = tokens.first[token], tokens.last[token]
        changed = x.copy()
        changed[:, first : last + 1, tokens.channel[token]] *= -1.0
        after = embedding(changed).reshape(12, -1)
        assert np.linalg.norm(after - before, axis=1).argmax() == token


def test_layers_mix_channels_and_time(encoder, expected):
    """One layer carries a change along its channel and its time, two layers to every token."""

    @partial(jax.jit, static_argnums=2)
    def run(params, z, n_layers):
        return bind(CBraMod, encoder.architecture, params).run_from(z, 0, n_layers)[0]

    z = expected["embedding"]
    changed = z.copy()
    changed[0, 1, 2, :20] += np.linspace(-1, 1, 20)
    changed[0, 1, 2, 20:] += np.linspace(-1, 1, 20)
    cross = np.zeros((4, 3), bool)
    cross[1, :] = True
    cross[:, 2] = True
    for n_layers, reached in ((1, cross), (2, np.ones((4, 3), bool))):
        before, after = (np.asarray(run(encoder.params, x, n_layers)) for x in (z, changed))
        np.testing.assert_array_equal(np.abs(after - before)[0].max(-1) > 1e-6, reached)


def test_windows_do_not_influence_each_other(encoder, expected):
    x = expected["past_values"]
    assert_close(encoder.activations(x[1:]), encoder.activations(x)[1:])


def test_bfloat16_is_close_and_float32_outside(encoder, expected):
    function = encoder.function((2,), ComputeOptions(precision="bfloat16"))
    (z,) = jax.jit(function)(encoder.params, expected["past_values"])
    assert z.dtype == np.float32
    error = np.abs(np.asarray(z) - expected["layer_2"])
    assert 1e-4 < error.max() < 0.1 * expected["layer_2"].std()


def test_waveform_is_what_the_head_adds(encoder, expected):
    model = bind(CBraMod, encoder.architecture, encoder.params)
    z = expected["layer_2"]
    direction = np.random.default_rng(0).normal(size=40).astype(np.float32)
    after, before = (model.reconstruct(jnp.asarray(x)) for x in (z + direction, z))
    added = np.asarray(after - before)
    assert_close(added, np.broadcast_to(encoder.waveform(direction), added.shape))


def test_wrong_windows_layers_and_options_are_refused(encoder):
    with pytest.raises(UserError, match=r"\[batch, 600 samples, 4 channels\].*\[1, 600, 5\]"):
        encoder.activations(np.zeros((1, 600, 5), np.float32))
    with pytest.raises(UserError, match="no layer 3: this encoder has 3 layers"):
        encoder.activations(np.zeros((1, 600, 4), np.float32), layer=3)
    with pytest.raises(UserError, match="--force_revin requires a PatchTST"):
        encoder.check_options(ComputeOptions(force_revin=True))
