"""Parity with the reference's outputs on fixtures, and with plain torch on every variant."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from convert.encoder import convert_encoder
from convert.patchtst.weights import to_flax
from convert.patchtst_torch import forward
from minsae_jax import UserError
from minsae_jax.encoder.base import ComputeOptions
from minsae_jax.encoder.converted import load_encoder, save_encoder
from minsae_jax.encoder.patchtst.encoder import PatchTSTEncoder
from minsae_jax.encoder.patchtst.model import patches
from minsae_jax.encoder.patchtst.reduction import fits_reduction
from minsae_jax.encoder.patchtst.revin import RevIN
from tests.conftest import ENCODERS, FIXTURES
from tests.random_encoder import BASE, all_layers, random_state_dict

TOLERANCE = 1e-4


@pytest.mark.parametrize("name", ENCODERS)
def test_layers_and_head_equal_the_reference(name):
    folder = FIXTURES / name
    encoder, _ = convert_encoder(folder / "checkpoint.pth", folder / "config.yaml")
    expected = np.load(folder / "expected.npz")
    x, a = expected["past_values"], encoder.architecture
    k = expected["layer_0"].shape[1]
    for layer in range(a.n_layers):
        got = encoder.activations(x, layer)
        assert got.shape == (len(x), a.n_vars, a.n_tokens, a.d_model)
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got[:, :k], expected[f"layer_{layer}"], atol=TOLERANCE, rtol=0)
    np.testing.assert_array_equal(encoder.activations(x), encoder.activations(x, a.n_layers - 1))
    np.testing.assert_allclose(encoder(x)[:, :, :k], expected["output"], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ENCODERS)
def test_revin_and_patches_equal_the_reference(name):
    folder = FIXTURES / name
    encoder, _ = convert_encoder(folder / "checkpoint.pth", folder / "config.yaml")
    expected = np.load(folder / "expected.npz")
    a, x = encoder.architecture, jnp.asarray(expected["past_values"])
    if "normalized" in expected:
        revin = RevIN(a.n_vars, a.revin_eps, a.revin_affine)
        if a.revin_affine:
            revin.affine_weight[...] = encoder.params["revin"]["affine_weight"]
            revin.affine_bias[...] = encoder.params["revin"]["affine_bias"]
        x = revin(x)
        np.testing.assert_allclose(x, expected["normalized"], atol=1e-5, rtol=0)
    else:
        assert not a.revin
    got = patches(a, x)
    k = expected["patches"].shape[2]
    np.testing.assert_allclose(got[:, :, :k], expected["patches"], atol=1e-5, rtol=0)


VARIANTS = {
    "base": {},
    "layernorm": {"norm": "LayerNorm"},
    "pre_norm": {"pre_norm": True},
    "pre_layernorm_gelu": {"pre_norm": True, "norm": "LayerNorm", "activation": "gelu"},
    "plain_attention": {"res_attention": False},
    "individual_embedding": {"shared_embedding": False, "use_cls_token": False},
    "scalar_positions": {"pos_dim": 1},
    "revin": {"revin": True},
    "prediction": {"head_type": "prediction", "target_dim": 5, "use_cls_token": False},
    "prediction_individual": {
        "head_type": "prediction", "target_dim": 5, "use_cls_token": False, "individual_head": True,
    },
    "prediction_cls": {"head_type": "prediction", "target_dim": 5},
    "regression": {"head_type": "regression", "target_dim": 2},
    "regression_last_token": {"head_type": "regression", "target_dim": 2, "use_cls_token": False},
    "classification": {"head_type": "classification", "target_dim": 4},
}  # fmt: skip


def make_variant(a):
    """Return a random encoder, windows, and layers and output of plain torch in float64.

    So that the difference is Flax's rounding alone.
    """
    state = random_state_dict(a)
    x = torch.randn(2, a.seq_len, a.n_vars, generator=torch.Generator().manual_seed(1)) + 0.5
    hidden, output = forward(a, {k: v.double() for k, v in state.items()}, x.double())
    encoder = PatchTSTEncoder(a, to_flax(a, {k: v.numpy() for k, v in state.items()}))
    return encoder, x.numpy(), hidden, output


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_equals_plain_torch(name):
    encoder, x, hidden, output = make_variant(replace(BASE, **VARIANTS[name]))
    for got, expected in zip(all_layers(encoder, x), hidden, strict=True):
        assert 0.1 < expected.std() < 5
        np.testing.assert_allclose(got, expected, atol=TOLERANCE, rtol=0)
    got = encoder(x)
    assert got.shape == tuple(output.shape)
    np.testing.assert_allclose(got, output, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["base", "pre_norm", "pre_layernorm_gelu", "plain_attention"])
# A GPU attends by a reduction over keys in narrow heads, and by matrix products in wide ones.
@pytest.mark.parametrize("n_heads", [4, 1], ids=["narrow", "wide"])
def test_variant_as_on_gpu_equals_plain_torch(as_on_gpu, n_heads, name):
    a = replace(BASE, n_layers=3, d_model=32, pos_dim=32, n_heads=n_heads, **VARIANTS[name])
    n_summed = a.n_layers if a.res_attention else 1
    fits = fits_reduction(jnp.float32, a.n_vars, a.n_tokens, 32 // n_heads, n_summed)
    assert fits == (n_heads == 4)
    encoder, x, hidden, _ = make_variant(a)
    np.testing.assert_allclose(encoder.activations(x), hidden[-1], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("precision", "dtype", "tolerance"),
    [("tf32", jnp.float16, 1e-3), ("bfloat16", jnp.bfloat16, 8e-3)],
)
@pytest.mark.parametrize("change", [{}, {"res_attention": False}], ids=["residual", "plain"])
def test_half_precision_as_on_gpu(as_on_gpu, monkeypatch, precision, dtype, tolerance, change):
    calls = []
    attention = jax.nn.dot_product_attention

    def stand_in_for_cudnn(queries, keys, values, *, scale, implementation):
        assert implementation == "cudnn"
        assert {queries.dtype, keys.dtype, values.dtype} == {jnp.dtype(dtype)}
        calls.append((queries.shape[-1], values.shape[-1]))
        exact = (a.astype(jnp.float32) for a in (queries, keys, values))
        return attention(*exact, scale=scale).astype(dtype)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in_for_cudnn)
    a = replace(BASE, d_model=32, pos_dim=32, **change)
    encoder, x, hidden, _ = make_variant(a)
    run = encoder.function(tuple(range(a.n_layers)), ComputeOptions(precision=precision))
    with jax.default_matmul_precision("default"):
        outputs = jax.jit(run)(encoder.params, x)
    # With residual scores, queries and keys of all layers so far are concatenated.
    n_concatenated = (1, 2) if a.res_attention else (1, 1)
    assert calls == [(8 * n, 8 * n) for n in n_concatenated]
    for got, expected in zip(outputs, hidden, strict=True):
        error = got - expected.numpy()
        assert 0 < np.sqrt(np.mean(np.square(error))) < tolerance * expected.std()


def test_variants_differ():
    """Otherwise the tests above would not test a variant."""
    x = np.random.default_rng(0).normal(size=(1, 50, 3)).astype(np.float32)
    tensors = {k: v.numpy() for k, v in random_state_dict(BASE).items()}
    params = to_flax(BASE, tensors)
    outputs = [
        np.asarray(PatchTSTEncoder(replace(BASE, **change), params).activations(x))
        for change in (
            {},
            {"pre_norm": True},
            {"res_attention": False},
            {"activation": "gelu"},
            {"revin": True},
        )
    ]
    for i, one in enumerate(outputs):
        for other in outputs[:i]:
            assert np.abs(one - other).max() > 1e-2


def test_saved_encoder_is_loaded_unchanged(tmp_path):
    encoder, source = convert_encoder(FIXTURES / "layernorm_prenorm/checkpoint.pth")
    save_encoder(tmp_path / "encoder", encoder, source)
    loaded = load_encoder(tmp_path / "encoder")
    assert loaded.architecture == encoder.architecture
    assert loaded.fingerprint == encoder.fingerprint
    for a, b in zip(jax.tree.leaves(loaded.params), jax.tree.leaves(encoder.params), strict=True):
        np.testing.assert_array_equal(a, b)
    assert [p.name for p in tmp_path.iterdir()] == ["encoder"]


def test_fingerprint_depends_on_weights_and_architecture():
    encoder, _ = convert_encoder(FIXTURES / "layernorm_prenorm/checkpoint.pth")
    params = jax.tree.map(np.array, encoder.params)
    params["position"][0, 0] += 1e-3
    assert PatchTSTEncoder(encoder.architecture, params).fingerprint != encoder.fingerprint
    other = replace(encoder.architecture, revin=False)
    assert PatchTSTEncoder(other, encoder.params).fingerprint != encoder.fingerprint


def test_wrong_windows_layers_and_folders_are_refused(tmp_path):
    encoder, source = convert_encoder(FIXTURES / "layernorm_prenorm/checkpoint.pth")
    with pytest.raises(
        UserError, match=r"must be \[batch, 205 samples, 4 channels\].*\[1, 205, 5\]"
    ):
        encoder.activations(np.zeros((1, 205, 5), np.float32))
    with pytest.raises(UserError, match="no layer 3: this encoder has 3 layers"):
        encoder.activations(np.zeros((1, 205, 4), np.float32), layer=3)
    with pytest.raises(UserError, match="there is no encoder at"):
        load_encoder(tmp_path / "nowhere")
    save_encoder(tmp_path / "encoder", encoder, source)
    config = json.loads((tmp_path / "encoder/config.json").read_text())
    config["architecture"]["activation"] = "relu"
    (tmp_path / "encoder/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="fingerprint mismatch"):
        load_encoder(tmp_path / "encoder")
    for path in (tmp_path / "encoder" / "params").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(UserError, match="damaged"):
        load_encoder(tmp_path / "encoder")
