"""Parity with transformers on small random models, and errors for unsupported ones."""

import json
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from convert.__main__ import main
from convert.encoder import convert, convert_encoder, read_source
from minsae_jax import UserError, load_encoder
from tests.random_encoder import all_layers

BASE = {
    "num_input_channels": 3,
    "context_length": 50,
    "patch_length": 8,
    "patch_stride": 6,
    "num_hidden_layers": 2,
    "d_model": 16,
    "num_attention_heads": 4,
    "ffn_dim": 24,
    "prediction_length": 5,
    "num_targets": 2,
}
VARIANTS = {
    "default": ("PatchTSTModel", {}),
    "layernorm": ("PatchTSTModel", {"norm_type": "layernorm", "norm_eps": 1e-3}),
    "post_norm": ("PatchTSTModel", {"pre_norm": False, "norm_eps": 1e-2}),
    "post_layernorm_relu": (
        "PatchTSTModel",
        {"pre_norm": False, "norm_type": "layernorm", "activation_function": "relu"},
    ),
    "cls": ("PatchTSTModel", {"use_cls_token": True, "positional_encoding_type": "random"}),
    "no_bias": ("PatchTSTModel", {"bias": False}),
    "individual_embedding": ("PatchTSTModel", {"share_embedding": False}),
    "true_scaler": ("PatchTSTModel", {"scaling": True}),
    "small_scale": ("PatchTSTModel", {"minimum_scale": 0.5}),
    "pretraining": ("PatchTSTForPretraining", {"random_mask_ratio": 0.0}),
    "pretraining_cls": (
        "PatchTSTForPretraining",
        {"random_mask_ratio": 0.0, "use_cls_token": True},
    ),
    "prediction_mean": ("PatchTSTForPrediction", {}),
    "prediction_max": ("PatchTSTForPrediction", {"pooling_type": "max", "scaling": "mean"}),
    "prediction_all": ("PatchTSTForPrediction", {"pooling_type": None}),
    "prediction_cls": ("PatchTSTForPrediction", {"use_cls_token": True, "scaling": None}),
    "classification": ("PatchTSTForClassification", {"pooling_type": "max"}),
    "classification_cls": ("PatchTSTForClassification", {"use_cls_token": True}),
}
OUTPUTS = {
    "PatchTSTModel": "last_hidden_state",
    "PatchTSTForPretraining": "prediction_output",
    "PatchTSTForPrediction": "prediction_outputs",
    "PatchTSTForClassification": "prediction_logits",
}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own
        yield


def build(kind, changes):
    """A model none of whose tensors is trivial, in evaluation mode."""
    import transformers

    torch.manual_seed(0)
    config = transformers.PatchTSTConfig(**BASE | changes)
    model = getattr(transformers, kind)(config).eval()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.ndim < 3:
            tensor += (0.2 if tensor.ndim == 1 else 0.1) * torch.randn(tensor.shape)
        if "running_var" in name:
            tensor.abs_().add_(0.3)
        if "cls_token" in name:
            tensor.copy_(torch.randn(tensor.shape))
    return model


def forward(model, x):
    """Output of every layer, hooked, and what the model returns."""
    base, hidden = getattr(model, "model", model), []
    hooks = [
        layer.register_forward_hook(lambda _, __, output: hidden.append(output[0]))
        for layer in base.encoder.layers
    ]
    with torch.no_grad():
        output = model(past_values=torch.from_numpy(x), return_dict=True)
    for hook in hooks:
        hook.remove()
    return [h.numpy() for h in hidden], output[OUTPUTS[type(model).__name__]].numpy()


@pytest.fixture
def x():
    return (np.random.default_rng(0).normal(size=(4, 50, 3)) * [1, 2, 0.3] + [0, 1, -2]).astype(
        np.float32
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_every_layer_and_the_head(name, tmp_path, x):
    kind, changes = VARIANTS[name]
    model = build(kind, changes)
    model.save_pretrained(tmp_path)
    encoder, source = convert_encoder(tmp_path)
    hidden, output = forward(model, x)
    for got, expected in zip(all_layers(encoder, x), hidden, strict=True):
        assert expected.std() > 0.1
        np.testing.assert_allclose(got, expected, atol=1e-4, rtol=0)
    got = np.asarray(encoder(x))
    if kind == "PatchTSTForPretraining":
        got = got.swapaxes(1, 2)  # gPatchTST's order
    assert got.shape == output.shape
    np.testing.assert_allclose(got, output, atol=1e-4, rtol=0)
    assert source.source_program == "transformers"


def test_bin_and_half_precision(tmp_path, x):
    model = build("PatchTSTForPretraining", {}).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "safe")
    encoder, source = convert_encoder(tmp_path / "safe")
    assert source.source_dtypes["backbone.W_pos"] == "bfloat16"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/config.json").write_text((tmp_path / "safe/config.json").read_text())
    torch.save(model.state_dict(), tmp_path / "bin/pytorch_model.bin")
    assert convert_encoder(tmp_path / "bin")[0].fingerprint == encoder.fingerprint
    unmasked = build(
        "PatchTSTModel", {}
    )  # what was pretrained masks its input at random in evaluation too
    unmasked.load_state_dict(model.float().model.state_dict())
    expected, _ = forward(unmasked, x)
    np.testing.assert_allclose(encoder.activations(x), expected[-1], atol=1e-4, rtol=0)


def test_command_and_use_in_place(tmp_path, capsys):
    build("PatchTSTForPretraining", {}).save_pretrained(tmp_path / "hf")
    main(["encoder", str(tmp_path / "hf"), "--verify", "--out", str(tmp_path / "encoder")])
    printed = capsys.readouterr().out
    assert "PatchTST of transformers from model.safetensors" in printed
    assert "from the config.json: " in printed
    assert "layer 1" in printed
    loaded = load_encoder(tmp_path / "encoder")
    assert load_encoder(tmp_path / "hf").fingerprint == loaded.fingerprint


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("PatchTSTModel", {"channel_attention": True}, "channel_attention is on"),
        (
            "PatchTSTModel",
            {"activation_function": "silu"},
            "activation must be relu or gelu, but the config.json contains",
        ),
        ("PatchTSTForPrediction", {"loss": "nll"}, "predicts a distribution .*--without_head"),
        (
            "PatchTSTForPrediction",
            {"share_projection": False},
            "has a head for each channel .*--without_head",
        ),
        ("PatchTSTForRegression", {}, "is a 'PatchTSTForRegression'.*--without_head"),
    ],
)
def test_unsupported_models_are_refused(kind, changes, message, tmp_path):
    build(kind, changes).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=message):
        convert_encoder(tmp_path)


def test_transformers_itself_fails_with_individual_heads(x):
    """transformers fails, as the error message says."""
    with pytest.raises((IndexError, RuntimeError)):
        forward(build("PatchTSTForPrediction", {"share_projection": False}), x)


@pytest.mark.parametrize("changes", [{"loss": "nll"}, {"share_projection": False}])
def test_without_head(changes, tmp_path, x):
    model = build("PatchTSTForPrediction", changes)
    model.save_pretrained(tmp_path)
    encoder, _ = convert(read_source(tmp_path, without_head=True))
    expected, _ = forward(model.model, x)
    np.testing.assert_allclose(encoder.activations(x), expected[-1], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bert"}, "a model of type 'bert'"),
        ({"norm_type": "rmsnorm"}, "norm_type must be"),
        ({"scaling": "log"}, "scaling must be"),
        ({"scaling": 3}, "scaling must be"),
        ({"scaling_dim": 2}, "along another axis"),
        ({"num_hidden_layers": 3}, "num_layers is 3 in the config.json, but 2 in the state dict"),
        ({"num_attention_heads": None}, "must be whole numbers above 0.*got 16, None, 24"),
        ({"num_attention_heads": 3}, "the second dividing the first, got 16, 3, 24"),
        ({"patch_stride": 0}, "stride must be"),
        ({"context_length": 10**9}, "patches, but the state dict has positions for 8"),
        ({"positional_encoding_type": "rotary"}, "unknown positional_encoding_type"),
        ({"d_model": [[[]]]}, "must be whole numbers"),
    ],
)
def test_wrong_config_is_refused(change, message, tmp_path):
    build("PatchTSTModel", {}).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=message):
        convert_encoder(tmp_path)


def test_damaged_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"there is no config\.json in"):
        convert_encoder(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(UserError, match="does not contain a JSON mapping"):
        convert_encoder(tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="cannot be read as JSON"):
        convert_encoder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"neither model.safetensors nor pytorch_model.bin"):
        convert_encoder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(UserError, match="not a safetensors file, or it is damaged"):
        convert_encoder(tmp_path)
