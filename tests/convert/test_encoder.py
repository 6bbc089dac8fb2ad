"""The converter: what it reads where, what it refuses, and that it runs nothing."""

import json
import os
import pickle
import shutil
import warnings

import pytest
import torch
import yaml

from convert.__main__ import main
from convert.encoder import convert_encoder
from minsae_jax import UserError, load_encoder
from tests.conftest import ENCODERS, FIXTURES

SOURCE = FIXTURES / "layernorm_prenorm"


@pytest.fixture
def checkpoint():
    return torch.load(SOURCE / "checkpoint.pth", weights_only=True)


@pytest.fixture
def settings():
    return yaml.safe_load((SOURCE / "config.yaml").read_text())


@pytest.fixture
def convert(tmp_path):
    """convert(checkpoint, settings) through files, as a user would."""

    def run(checkpoint, settings=None):
        torch.save(checkpoint, tmp_path / "x.pth")
        if settings is None:
            return convert_encoder(tmp_path / "x.pth")
        (tmp_path / "x.yaml").write_text(yaml.safe_dump(settings))
        return convert_encoder(tmp_path / "x.pth", tmp_path / "x.yaml")

    return run


@pytest.mark.parametrize("name", ENCODERS)
def test_command(name, tmp_path, capsys):
    out = tmp_path / "encoder"
    source = FIXTURES / name
    main(["encoder", str(source / "checkpoint.pth"), "--config_path", str(source / "config.yaml"), "--out", str(out)])
    told = capsys.readouterr().out
    encoder = load_encoder(out)
    assert encoder.fingerprint[:12] in told
    assert "from the state dict: " in told
    config = json.loads((out / "config.json").read_text())
    assert config["sources"]["d_model"] == "state dict"
    assert config["sources"]["stride"] == "YAML"
    assert len(config["source_sha256"]) == 64


def test_summary_counts_parameters(tmp_path, capsys, checkpoint):
    main(["encoder", str(SOURCE / "checkpoint.pth"), "--out", str(tmp_path / "e")])
    state = checkpoint["model_state_dict"]
    assert f"{sum(t.numel() for t in state.values()):,} parameters" in capsys.readouterr().out


def test_own_config_gives_the_same(convert, checkpoint, settings):
    with_yaml, notes = convert(checkpoint, settings)
    alone, notes_alone = convert(checkpoint)
    assert with_yaml.fingerprint == alone.fingerprint
    assert notes["sources"]["seq_len"] == "YAML"
    assert notes_alone["sources"]["seq_len"] == "checkpoint's config"


def test_bare_state_dict_and_prefixes(convert, checkpoint, settings):
    expected = convert(checkpoint, settings)[0].fingerprint
    state = checkpoint["model_state_dict"]
    assert convert(dict(state), settings)[0].fingerprint == expected
    for prefix in ("module.", "_orig_mod.", "_orig_mod.module.", "model.", "module.model."):
        prefixed = checkpoint | {"model_state_dict": {prefix + k: v for k, v in state.items()}}
        assert convert(prefixed, settings)[0].fingerprint == expected


def test_numpy_scalars_beside_the_weights(convert, checkpoint, settings):
    import numpy as np

    convert(checkpoint | {"train_loss": np.float64(0.5), "val_loss": np.float32(0.5)}, settings)


@pytest.mark.parametrize(
    ("section", "key", "value", "told"),
    [
        ("model", "num_layers", 4, "num_layers is 4 in the YAML, but 3 in the state dict"),
        ("model", "d_model", 64, "d_model is 64 in the YAML, but 48 in the state dict"),
        ("model", "d_ff", 100, "d_ff is 100 in the YAML, but 96 in the state dict"),
        ("model", "num_heads", 8, "num_heads is 8 in the YAML, but 6 in the state dict"),
        ("model", "patch_length", 10, "patch_length is 10 in the YAML, but 20 in the state dict"),
        ("model", "shared_embedding", False, "shared_embedding is False in the YAML, but True in the state dict"),
        ("model", "stride", 20, "make 10 patches, but the state dict has positions for 16"),
        ("model", "seq_len", 1000, "make 82 patches, but the state dict has positions for 16"),
        ("model", "head_type", "regression", "the head is 'regression' in the YAML, but its weights"),
        ("model", "activation", "swish", "activation must be relu or gelu, but the YAML says 'swish'"),
        ("model", "stride", 0, "stride must be a whole number above 0, but the YAML says 0"),
        ("model", "revin", "maybe", "revin must be true or false, but the YAML says 'maybe'"),
    ],
)  # fmt: skip
def test_contradictions(convert, checkpoint, settings, section, key, value, told):
    settings[section][key] = value
    with pytest.raises(UserError) as e:
        convert(checkpoint, settings)
    assert told in str(e.value)


def test_individual_embeddings_must_match_the_channels(convert):
    source = FIXTURES / "revin_affine_gelu_overlap"
    checkpoint = torch.load(source / "checkpoint.pth", weights_only=True)
    checkpoint["config"]["data"]["n_vars"] = 6
    with pytest.raises(UserError, match="n_vars is 6 in the checkpoint's config, but 5 in the state dict"):
        convert(checkpoint)


@pytest.mark.parametrize("key", ["activation", "res_attention", "stride", "seq_len", "revin", "revin_eps", "n_vars"])
def test_what_nothing_gives_is_named(convert, checkpoint, settings, key):
    for config in (settings, checkpoint["config"]):
        for section in ("data", "model"):
            config[section].pop(key, None)
    with pytest.raises(UserError, match=rf"neither the YAML nor the config in x.pth gives {key}"):
        convert(checkpoint, settings)


def test_defaults(convert, checkpoint, settings):
    for config in (settings, checkpoint["config"]):
        config["model"].pop("pre_norm", None)
        config["model"]["pe"] = None
    encoder, notes = convert(checkpoint, settings)
    assert encoder.architecture.pre_norm is False
    assert notes["sources"]["pre_norm"] == "default"


def test_ignored_settings_are_one_warning(convert, checkpoint, settings):
    settings["model"] |= {"norm": "BatchNorm", "use_cls_token": False}  # the checkpoint's own config is right
    with pytest.warns(UserWarning, match="the state dict decides") as seen:
        encoder, _ = convert(checkpoint, settings)
    assert len(seen) == 1
    assert "norm is BatchNorm in the YAML, but LayerNorm in the state dict" in str(seen[0].message)
    assert (encoder.architecture.norm, encoder.architecture.use_cls_token) == ("LayerNorm", True)


def test_equal_settings_in_other_spellings_are_no_disagreement(convert, checkpoint, settings):
    checkpoint["config"]["model"] |= {"revin_eps": "1e-05", "activation": "GELU"}  # as PyYAML reads 1e-05
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(checkpoint, settings)


def test_yaml_precedes_the_own_config_with_one_warning(convert, checkpoint, settings):
    settings["model"] |= {"activation": "relu", "res_attention": False}
    with pytest.warns(UserWarning, match="precedes") as seen:
        encoder, _ = convert(checkpoint, settings)
    assert len(seen) == 1
    assert "activation ('relu', not 'gelu'), res_attention (False, not True)" in str(seen[0].message)
    assert (encoder.architecture.activation, encoder.architecture.res_attention) == ("relu", False)


def test_keys_that_do_not_fit_are_told_together(convert, checkpoint, settings):
    state = checkpoint["model_state_dict"]
    del state["backbone.encoder.layers.1.ff.0.bias"]
    state["backbone.extra.weight"] = torch.zeros(3)
    state["backbone.encoder.layers.2.ff.3.bias"] = torch.zeros(5)
    state["backbone.encoder.layers.2.ff.0.bias"][0] = float("nan")
    with pytest.raises(UserError) as e:
        convert(checkpoint, settings)
    for told in (
        "nothing fills layers/1/ff_in/bias", "unknown key backbone.extra.weight", "layers.2.ff.3.bias is float32[5]",
        "layers.2.ff.0.bias holds NaN",
    ):  # fmt: skip
        assert told in str(e.value)


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hacked",)


def test_nothing_is_run(tmp_path, monkeypatch, checkpoint):
    monkeypatch.chdir(tmp_path)
    torch.save(checkpoint | {"config": Hostile()}, "x.pth")
    (tmp_path / "y.pth").write_bytes(pickle.dumps(Hostile()))
    for name in ("x.pth", "y.pth"):
        with pytest.raises(UserError, match=r"holds code or objects|is no PyTorch checkpoint"):
            convert_encoder(name)
    assert not (tmp_path / "hacked").exists()


def test_files_that_are_none(tmp_path):
    text, cut, other = tmp_path / "text.pth", tmp_path / "cut.pth", tmp_path / "other.pth"
    text.write_text("hello")
    cut.write_bytes((SOURCE / "checkpoint.pth").read_bytes()[:50_000])
    torch.save([1, 2], other)
    for path, told in ((text, "no PyTorch checkpoint"), (cut, "no PyTorch checkpoint"), (other, "holds a list")):
        with pytest.raises(UserError, match=told):
            convert_encoder(path)
    with pytest.raises(UserError, match="there is no checkpoint file"):
        convert_encoder(tmp_path / "nowhere.pth")
    torch.save({"a": torch.zeros(3)}, other)
    with pytest.raises(UserError, match=r"the state dict has no backbone.W_P.weight"):
        convert_encoder(other)


def test_a_failed_conversion_leaves_what_was_there(tmp_path, checkpoint):
    out = tmp_path / "encoder"
    main(["encoder", str(SOURCE / "checkpoint.pth"), "--out", str(out)])
    before = load_encoder(out).fingerprint
    shutil.copy(SOURCE / "config.yaml", tmp_path / "x.yaml")
    (tmp_path / "x.pth").write_text("nothing")
    with pytest.raises(UserError):
        main(["encoder", str(tmp_path / "x.pth"), "--out", str(out)])
    assert load_encoder(out).fingerprint == before


def test_folders_of_others_are_never_overwritten(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="is no converted encoder, and is not overwritten"):
        main(["encoder", str(SOURCE / "checkpoint.pth"), "--out", str(tmp_path)])
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
