"""Settings of an architecture: sources, precedence, contradictions."""

import warnings
from dataclasses import replace

import pytest
import torch

from convert.__main__ import main
from convert.encoder import read_source
from convert.patchtst.weights import settings_of
from minsae_jax import UserError
from tests.conftest import FIXTURES
from tests.random_encoder import BASE, random_state_dict

SOURCE = FIXTURES / "layernorm_prenorm"


def test_checkpoints_config_resolves_like_the_yaml(through_files, checkpoint, settings):
    with_yaml, source = through_files(checkpoint, settings)
    alone, source_alone = through_files(checkpoint)
    assert with_yaml.fingerprint == alone.fingerprint
    assert source.sources["seq_len"] == "YAML"
    assert source_alone.sources["seq_len"] == "checkpoint's config"


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("model", "num_layers", 4, "num_layers is 4 in the YAML x.yaml, but 3 in the state dict"),
        ("model", "d_model", 64, "d_model is 64 in the YAML x.yaml, but 48 in the state dict"),
        ("model", "d_ff", 100, "d_ff is 100 in the YAML x.yaml, but 96 in the state dict"),
        ("model", "num_heads", 8, "num_heads is 8 in the YAML x.yaml, but 6 in the state dict"),
        (
            "model",
            "patch_length",
            10,
            "patch_length is 10 in the YAML x.yaml, but 20 in the state dict",
        ),
        (
            "model",
            "shared_embedding",
            False,
            "shared_embedding is False in the YAML x.yaml, but True in the state dict",
        ),
        ("model", "stride", 20, "make 10 patches, but the state dict has positions for 16"),
        ("model", "seq_len", 1000, "make 82 patches, but the state dict has positions for 16"),
        (
            "model",
            "head_type",
            "regression",
            "the head is 'regression' in the YAML x.yaml, but its weights",
        ),
        (
            "model",
            "activation",
            "swish",
            "activation must be relu or gelu, but the YAML x.yaml contains 'swish'",
        ),
        (
            "model",
            "stride",
            0,
            "stride must be a whole number above 0 and below 2^31, but the YAML x.yaml contains 0",
        ),
        (
            "model",
            "revin",
            "maybe",
            "revin must be true or false, but the YAML x.yaml contains 'maybe'",
        ),
    ],
)
def test_setting_that_contradicts_the_state_dict_is_refused(
    through_files, checkpoint, settings, section, key, value, message, tmp_path
):
    settings[section][key] = value
    with pytest.raises(UserError) as e:
        through_files(checkpoint, settings)
    assert message in str(e.value).replace(f"{tmp_path}/", "")


def test_individual_embeddings_must_match_the_channels(through_files):
    source = FIXTURES / "revin_affine_gelu_overlap"
    checkpoint = torch.load(source / "checkpoint.pth", weights_only=True)
    checkpoint["config"]["data"]["n_vars"] = 6
    with pytest.raises(
        UserError, match="n_vars is 6 in the checkpoint's config, but 5 in the state dict"
    ):
        through_files(checkpoint)


@pytest.mark.parametrize(
    "key", ["activation", "res_attention", "stride", "seq_len", "revin", "revin_eps", "n_vars"]
)
def test_missing_setting_is_named(through_files, checkpoint, settings, key):
    for config in (settings, checkpoint["config"]):
        for section in ("data", "model"):
            config[section].pop(key, None)
    with pytest.raises(
        UserError, match=rf"neither the YAML .*x\.yaml nor the config in x.pth contains {key}"
    ):
        through_files(checkpoint, settings)


def test_pre_norm_has_a_default(through_files, checkpoint, settings):
    for config in (settings, checkpoint["config"]):
        config["model"].pop("pre_norm", None)
        config["model"]["pe"] = None
    encoder, source = through_files(checkpoint, settings)
    assert encoder.architecture.pre_norm is False
    assert source.sources["pre_norm"] == "program's default"


def test_settings_that_the_reference_ignores_make_one_warning(through_files, checkpoint, settings):
    settings["model"] |= {
        "norm": "BatchNorm",
        "use_cls_token": False,
    }  # the checkpoint's own config is right
    with pytest.warns(UserWarning, match="the state dict decides") as seen:
        encoder, _ = through_files(checkpoint, settings)
    assert len(seen) == 1
    assert "x.yaml, but LayerNorm in the state dict" in str(seen[0].message)
    assert (encoder.architecture.norm, encoder.architecture.use_cls_token) == ("LayerNorm", True)


def test_other_spellings_of_equal_settings_agree(through_files, checkpoint, settings):
    checkpoint["config"]["model"] |= {
        "revin_eps": "1e-05",
        "activation": "GELU",
    }  # as PyYAML reads 1e-05
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        through_files(checkpoint, settings)


def test_yaml_precedes_the_checkpoints_config_with_one_warning(through_files, checkpoint, settings):
    settings["model"] |= {"activation": "relu", "res_attention": False}
    with pytest.warns(UserWarning, match="precedes") as seen:
        encoder, _ = through_files(checkpoint, settings)
    assert len(seen) == 1
    assert "activation ('relu', not 'gelu'), res_attention (False, not True)" in str(
        seen[0].message
    )
    assert (encoder.architecture.activation, encoder.architecture.res_attention) == ("relu", False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_number_of_heads_is_inferred_from_half_precision(dtype, tmp_path):
    a = replace(BASE, d_model=128, n_heads=16, pos_dim=128)
    state = {
        k: v.to(dtype) if v.is_floating_point() else v for k, v in random_state_dict(a).items()
    }
    torch.save(state, tmp_path / "x.pth")
    flags = {
        "n_vars": 3,
        "seq_len": 50,
        "stride": 6,
        "activation": "relu",
        "res_attention": True,
        "revin": False,
    }
    flags |= {"revin_eps": 1e-5, "head_type": "pretrain"}
    assert read_source(tmp_path / "x.pth", flags=flags).architecture == a


def test_flag_in_the_error_exists(tmp_path):
    state = random_state_dict(BASE)
    for key in state:
        if key.endswith("scale"):
            state[key] = torch.tensor(0.123)  # trained
    torch.save({"model_state_dict": state, "config": settings_of(BASE)["data"]}, tmp_path / "x.pth")
    with pytest.raises(
        UserError, match=r"contains seq_len, stride, num_heads, .*; pass --seq_len and so on"
    ):
        read_source(tmp_path / "x.pth")
    settings = settings_of(BASE)
    del settings["model"]["num_heads"]
    torch.save({"model_state_dict": state, "config": settings}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="contains num_heads; pass --n_heads"):
        main(["encoder", str(tmp_path / "x.pth"), "--out", str(tmp_path / "e")])
    main(["encoder", str(tmp_path / "x.pth"), "--out", str(tmp_path / "e"), "--n_heads", "4"])


@pytest.mark.parametrize(
    "head", [{"head_type": "none"}, {"head_type": "regression", "target_dim": 2}]
)
def test_wrapped_gpatchtst_is_not_the_official_program(head, tmp_path):
    a = replace(BASE, use_cls_token=False, seq_len=52, **head)
    state = random_state_dict(a)
    if a.head_type == "none":
        state = {k: v for k, v in state.items() if not k.startswith("head.")}
    torch.save({f"model.{k}": v for k, v in state.items()}, tmp_path / "x.pth")
    flags = {"n_vars": 3, "seq_len": 52, "stride": 6, "revin": False, "revin_eps": 1e-5}
    with pytest.raises(UserError, match="contains activation, res_attention"):
        read_source(tmp_path / "x.pth", flags=flags)
    flags |= {"activation": "relu", "res_attention": True}
    if a.head_type != "none":
        flags["head_type"] = a.head_type
    source = read_source(tmp_path / "x.pth", flags=flags)
    assert source.checkpoint.program == "gpatchtst"
    assert source.architecture.first_sample == 2
