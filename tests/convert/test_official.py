"""Parity with both official PatchTST programs on small random models (fixtures/official)."""

import numpy as np
import pytest
import torch

from convert.encoder import convert, read_source
from minsae_jax import UserError
from tests.conftest import FIXTURES
from tests.random_encoder import all_layers

OFFICIAL = FIXTURES / "official"
SIZES = {"n_vars": 4, "seq_len": 53, "stride": 5}
SELF_SUPERVISED = {**SIZES, "revin": False, "revin_eps": 1e-5}
FLAGS = {
    "supervised": SIZES,
    "supervised_individual": {**SIZES, "revin": True, "subtract_last": True},
    "supervised_plain": {**SIZES, "revin": False},
    "self_supervised": {**SELF_SUPERVISED, "activation": "relu", "res_attention": False},
    "self_supervised_finetuned": {**SELF_SUPERVISED, "activation": "relu", "res_attention": False},
    "self_supervised_regression": {
        **SELF_SUPERVISED,
        "activation": "gelu",
        "res_attention": True,
        "head_type": "regression",
    },
}


@pytest.mark.parametrize("name", FLAGS)
def test_every_layer_and_the_head(name):
    encoder, source = convert(read_source(OFFICIAL / name / "checkpoint.pth", flags=FLAGS[name]))
    assert source.source_program == ("supervised" if name.startswith("supervised") else "gpatchtst")
    expected = np.load(OFFICIAL / name / "expected.npz")
    x = expected["past_values"]
    for layer, got in enumerate(all_layers(encoder, x)):
        np.testing.assert_allclose(got, expected[f"layer_{layer}"], atol=1e-4, rtol=0)
    output = expected["output"]
    got = encoder(x)
    assert got.shape == output.shape
    np.testing.assert_allclose(got, output, atol=1e-4, rtol=0)


def test_every_required_flag_changes_the_output():
    path = OFFICIAL / "supervised_individual/checkpoint.pth"
    x = np.load(OFFICIAL / "supervised_individual/expected.npz")["past_values"]
    flags = FLAGS["supervised_individual"]
    base = convert(read_source(path, flags=flags))[0]
    for change in (
        {"subtract_last": False},
        {"revin": False},
        {"activation": "relu"},
        {"res_attention": False},
    ):
        other = convert(read_source(path, flags=flags | change))[0]
        assert np.abs(np.asarray(other(x)) - np.asarray(base(x))).max() > 1e-2


def test_programs_differ_in_patches_and_denormalisation():
    path = OFFICIAL / "supervised_individual/checkpoint.pth"
    flags = {
        **FLAGS["supervised_individual"],
        "activation": "gelu",
        "res_attention": True,
        "revin_eps": 1e-5,
    }
    supervised = read_source(path, flags=flags).architecture
    gpatchtst = read_source(path, flags=flags, program="gpatchtst").architecture
    assert (supervised.first_sample, supervised.denormalize, supervised.scaler) == (
        0,
        True,
        "last_sd",
    )
    assert (gpatchtst.first_sample, gpatchtst.denormalize, gpatchtst.leftover) == (
        0 + (53 - 8) % 5,
        False,
        "start",
    )


def test_flags_precede_the_yaml(tmp_path):
    (tmp_path / "x.yaml").write_text(
        "model: {seq_len: 53, stride: 5, revin: 1, affine: 1, enc_in: 4, activation: relu}"
    )
    source = read_source(
        OFFICIAL / "supervised/checkpoint.pth", tmp_path / "x.yaml", {"activation": "gelu"}
    )
    assert source.architecture.activation == "gelu"
    assert source.sources["activation"] == "flags"
    assert source.sources["seq_len"] == "YAML"


def test_wrong_sizes_are_refused():
    with pytest.raises(UserError, match="make 8 patches, but the state dict has positions for 11"):
        read_source(OFFICIAL / "supervised/checkpoint.pth", flags=SIZES | {"seq_len": 43})
    with pytest.raises(UserError, match="n_vars is 5 in the flags, but 4 in the state dict"):
        read_source(OFFICIAL / "supervised/checkpoint.pth", flags=SIZES | {"n_vars": 5})
    with pytest.raises(
        UserError, match="contains seq_len, stride, revin; pass --seq_len and so on"
    ):
        read_source(OFFICIAL / "supervised_individual/checkpoint.pth")


def test_decomposition_is_refused(tmp_path):
    state = torch.load(OFFICIAL / "supervised/checkpoint.pth", weights_only=True)
    both = {
        k.replace("model.", f"{part}.", 1): v
        for part in ("model_trend", "model_res")
        for k, v in state.items()
    }
    torch.save(both, tmp_path / "x.pth")
    with pytest.raises(UserError, match="two PatchTSTs"):
        read_source(tmp_path / "x.pth", flags=SIZES)


def test_without_head():
    path, flags = OFFICIAL / "supervised/checkpoint.pth", FLAGS["supervised"]
    whole = convert(read_source(path, flags=flags))[0]
    encoder = convert(read_source(path, flags=flags, without_head=True))[0]
    x = np.load(OFFICIAL / "supervised/expected.npz")["past_values"]
    assert encoder.architecture.head_type == "none"
    np.testing.assert_array_equal(encoder.activations(x), whole.activations(x))
    np.testing.assert_array_equal(encoder(x), whole.activations(x))


def test_contradictions_with_the_program_are_refused():
    path = OFFICIAL / "supervised/checkpoint.pth"
    for change, message in (
        (
            {"revin": False},
            "revin is False in the flags, but True in a model of the official supervised program",
        ),
        ({"head_type": "regression"}, "head_type is regression|fit prediction"),
    ):
        with pytest.raises(UserError, match=message):
            read_source(path, flags=FLAGS["supervised"] | change)


def test_error_suggests_the_supervised_program(tmp_path):
    state = torch.load(OFFICIAL / "supervised_plain/checkpoint.pth", weights_only=True)
    torch.save({"state_dict": state}, tmp_path / "x.pth")
    flags = {
        **FLAGS["supervised_plain"],
        "activation": "gelu",
        "res_attention": True,
        "revin_eps": 1e-5,
    }
    with pytest.raises(UserError, match="use --program supervised"):
        read_source(tmp_path / "x.pth", flags=flags)
    assert (
        read_source(tmp_path / "x.pth", flags=flags, program="supervised").architecture.end_padding
        == 5
    )
