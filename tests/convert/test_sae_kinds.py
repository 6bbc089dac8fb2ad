"""Every kind in the formats of SAELens and dictionary_learning: the same numbers.

The arithmetic of each library is written out here in float64.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from convert.__main__ import main
from convert.sae import format_of
from minsae_jax import UserError, load_sae
from minsae_jax.sae.kinds import KINDS, Matryoshka
from minsae_jax.sae.member import save_member

D_MODEL, D_SAE, SCALE, K = 6, 12, 0.125, 3
KIND_NAMES = ("relu", "topk", "batchtopk", "matryoshka", "jumprelu", "gated")
DICT_CLASSES = {
    "relu": "AutoEncoder",
    "topk": "AutoEncoderTopK",
    "batchtopk": "BatchTopKSAE",
    "matryoshka": "MatryoshkaBatchTopKSAE",
    "jumprelu": "JumpReluAutoEncoder",
    "gated": "GatedAutoEncoder",
}


def convert(source, to, out):
    main(["sae", str(source), "--to", to, "--out", str(out)])
    return out


def relu(x):
    return np.maximum(x, 0)


def largest(z, k):
    """Return z with all but the k largest of each row set to 0."""
    kept = np.zeros_like(z)
    indices = np.argsort(z, axis=1)[:, len(z[0]) - k :]
    np.put_along_axis(kept, indices, np.take_along_axis(z, indices, 1), 1)
    return kept


def gated(product, b_gate, b_mag, r_mag):
    return np.where(product + b_gate > 0, relu(product * np.exp(r_mag) + b_mag), 0)


def trained_features(kind, params, x):
    """Return what a kind of ours computes, for scaled inputs."""
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    product = x @ p["W_enc"]
    if kind == "gated":
        return gated(product, p["b_gate"], p["b_mag"], p["r_mag"])
    z = product + p["b_enc"]
    if kind == "topk":
        return largest(relu(z), K)
    return relu(z) * (z > p.get("threshold", 0))


def read_saelens(folder):
    """Return (encode, decode) of a folder, as SAELens computes them."""
    cfg = json.loads((folder / "cfg.json").read_text())
    t = {n: a.astype(np.float64) for n, a in load_file(folder / "sae_weights.safetensors").items()}
    shift = t["b_dec"] if cfg.get("apply_b_dec_to_input", True) else 0
    rescales = cfg.get("rescale_acts_by_decoder_norm", False)
    norms = np.linalg.norm(t["W_dec"], axis=1) if rescales else 1.0

    def encode(x):
        product = (x - shift) @ t["W_enc"]
        if cfg["architecture"] == "gated":
            return gated(product, t["b_gate"], t["b_mag"], t["r_mag"])
        z = (product + t["b_enc"]) * norms
        if cfg["architecture"] == "topk":
            return relu(largest(z, cfg["k"]))
        threshold = t.get("threshold", t.get("topk_threshold", 0))
        return relu(z) * (z > threshold)

    return encode, lambda f: (f / norms) @ t["W_dec"] + t["b_dec"]


def read_dictionary_learning(folder):
    """Return (encode, decode) of a trainer's folder, as dictionary_learning computes them."""
    dict_class = json.loads((folder / "config.json").read_text())["trainer"]["dict_class"]
    state = torch.load(folder / "ae.pt", weights_only=True)
    t = {name: tensor.double().numpy() for name, tensor in state.items()}
    w_enc = t["encoder.weight"].T if "encoder.weight" in t else t["W_enc"]
    w_dec = t["decoder.weight"].T if "decoder.weight" in t else t["W_dec"]
    b_dec = next(t[name] for name in ("bias", "b_dec", "decoder_bias") if name in t)
    shift = 0 if dict_class == "JumpReluAutoEncoder" else b_dec

    def encode(x):
        product = (x - shift) @ w_enc
        if dict_class == "GatedAutoEncoder":
            return gated(product, t["gate_bias"], t["mag_bias"], t["r_mag"])
        z = product + t.get("encoder.bias", t.get("b_enc"))
        if dict_class == "AutoEncoderTopK":
            return largest(relu(z), int(t["k"]))
        return relu(z) * (z > t.get("threshold", 0))

    return encode, lambda f: f @ w_dec + b_dec


def read(to, out):
    return read_saelens(out) if to == "saelens" else read_dictionary_learning(out.parent)


@pytest.fixture(params=KIND_NAMES)
def kind(request):
    return request.param


@pytest.fixture
def trained(kind):
    """Parameters for scaled inputs; large biases reveal a wrong scale, sign or transposition."""
    rng = np.random.default_rng(0)
    shapes = KINDS[kind].shapes(D_MODEL, D_SAE)
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    if kind == "topk":
        params["k"] = np.array(K, np.float32)
    elif "threshold" in params:
        params["threshold"] = np.abs(params["threshold"], dtype=np.float32) + np.float32(0.1)
    return params


@pytest.fixture
def member(tmp_path, kind, trained):
    config = {
        "format_version": 1,
        "kind": kind,
        "layer": -1,
        "k": K,
        "shares": [0.25, 1.0],
        "d_model": D_MODEL,
        "d_sae": D_SAE,
    }
    save_member(tmp_path / "member", KINDS[kind].fold_scale(trained, SCALE), config)
    return tmp_path / "member"


@pytest.fixture
def x():
    return 8 * np.random.default_rng(1).normal(size=(50, D_MODEL))


OUTPUTS = {"saelens": "lens", "dictionary_learning": "trainer_0/ae.pt"}


@pytest.mark.parametrize("to", OUTPUTS)
def test_other_libraries_compute_the_same(kind, to, member, trained, x, tmp_path):
    """Compare training's parameters on scale * x with each library's arithmetic on x."""
    encode, decode = read(to, convert(member, to, tmp_path / OUTPUTS[to]))
    features = trained_features(kind, trained, SCALE * x)
    assert 0.05 < (features > 0).mean() < 0.8
    np.testing.assert_allclose(encode(x), features, atol=1e-5, rtol=1e-5)
    x_hat = (features @ trained["W_dec"] + trained["b_dec"]) / SCALE
    np.testing.assert_allclose(decode(features), x_hat, atol=1e-4, rtol=1e-5)
    sae = load_sae(member)
    np.testing.assert_allclose(sae.encode(x), encode(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("to", OUTPUTS)
def test_round_trip_keeps_parameters_and_config(kind, to, member, tmp_path):
    out = convert(member, to, tmp_path / OUTPUTS[to])
    before, after = load_sae(member), load_sae(convert(out, "member", tmp_path / "back"))
    assert after.config == before.config
    for name in before.params:
        is_shifted = to == "dictionary_learning" and name in ("b_enc", "b_gate", "b_mag")
        np.testing.assert_allclose(
            after.params[name], before.params[name], atol=2e-6 if is_shifted else 0, rtol=0
        )


def test_every_format_converts_to_the_other(kind, member, x, tmp_path):
    lens = convert(member, "saelens", tmp_path / "lens")
    trainer = convert(lens, "dictionary_learning", tmp_path / "trainer_0/ae.pt")
    again = convert(trainer, "saelens", tmp_path / "again")
    encode, decode = read("saelens", lens)
    other_encode, other_decode = read("saelens", again)
    np.testing.assert_allclose(other_encode(x), encode(x), atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(other_decode(encode(x)), decode(encode(x)), atol=1e-5, rtol=1e-5)


def test_names_and_shapes_are_the_documented_ones(kind, member, tmp_path):
    lens = convert(member, "saelens", tmp_path / "lens")
    cfg = json.loads((lens / "cfg.json").read_text())
    architectures = {"relu": "standard", "batchtopk": "jumprelu", "matryoshka": "jumprelu"}
    assert cfg["architecture"] == architectures.get(kind, kind)
    assert cfg["apply_b_dec_to_input"] is False
    assert (cfg["d_in"], cfg["d_sae"], cfg["dtype"]) == (D_MODEL, D_SAE, "float32")
    assert cfg["metadata"]["sae_lens_version"].startswith("6.")
    tensors = load_file(lens / "sae_weights.safetensors")
    shapes = KINDS[kind].shapes(D_MODEL, D_SAE)
    if kind == "topk":
        assert cfg["k"] == K
        assert cfg["rescale_acts_by_decoder_norm"] is False
        del shapes["k"]
    if cfg["architecture"] == "jumprelu":
        shapes["threshold"] = (D_SAE,)
    assert {name: tensor.shape for name, tensor in tensors.items()} == shapes

    trainer = convert(member, "dictionary_learning", tmp_path / "trainer_0/ae.pt")
    config = json.loads((trainer.parent / "config.json").read_text())["trainer"]
    assert config["dict_class"] == DICT_CLASSES[kind]
    assert (config["activation_dim"], config["dict_size"]) == (D_MODEL, D_SAE)
    state = torch.load(trainer, weights_only=True)
    assert all(tensor.is_contiguous() for tensor in state.values())
    if kind == "relu":
        assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
            "bias": (D_MODEL,),
            "encoder.weight": (D_SAE, D_MODEL),
            "encoder.bias": (D_SAE,),
            "decoder.weight": (D_MODEL, D_SAE),
        }
    dtypes = {name: tensor.dtype for name, tensor in state.items()}
    assert dtypes.pop("group_sizes", torch.int64) == torch.int64
    assert dtypes.pop("k", torch.int32) == torch.int32
    assert set(dtypes.values()) == {torch.float32}
    if kind in ("topk", "batchtopk", "matryoshka"):
        assert config["k"] == state["k"].item() == K
        assert state["threshold"].shape == ()
    if kind == "matryoshka":
        assert state["group_sizes"].tolist() == config["group_sizes"] == [3, 9]


def test_minsae_contains_relu_only(kind, member, tmp_path):
    if kind == "relu":
        return
    with pytest.raises(UserError, match=f"ReLU autoencoders only, got kind {kind}"):
        convert(member, "minsae", tmp_path / "x.pt")
    assert not (tmp_path / "x.pt").exists()


def write_saelens(folder, cfg, **tensors):
    """Write a folder of SAELens with random linear maps."""
    rng = np.random.default_rng(2)
    shapes = KINDS["relu"].shapes(D_MODEL, D_SAE)
    linear = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    folder.mkdir()
    (folder / "cfg.json").write_text(json.dumps(cfg))
    save_file(linear | tensors, folder / "sae_weights.safetensors")
    return folder


THRESHOLDS = {"threshold": np.linspace(0, 2, D_SAE, dtype=np.float32)}
TOPK_THRESHOLD = {"topk_threshold": np.array(1.1, np.float64)}


@pytest.mark.parametrize(
    ("cfg", "tensors", "kind"),
    [
        ({"architecture": "standard"}, {}, "relu"),
        ({"architecture": "topk", "k": 3, "apply_b_dec_to_input": True}, {}, "topk"),
        ({"architecture": "topk", "k": 3, "rescale_acts_by_decoder_norm": True}, {}, "topk"),
        ({"architecture": "jumprelu"}, THRESHOLDS, "jumprelu"),
        (
            {"architecture": "batchtopk", "k": 2.5, "rescale_acts_by_decoder_norm": True},
            TOPK_THRESHOLD,
            "batchtopk",
        ),
        (
            {
                "architecture": "matryoshka_batchtopk",
                "k": 2,
                "matryoshka_widths": [5],
                "rescale_acts_by_decoder_norm": False,
            },
            TOPK_THRESHOLD,
            "matryoshka",
        ),
    ],
)
def test_saelens_bias_and_norms_are_folded_in(cfg, tensors, kind, x, tmp_path):
    """The bias is subtracted first unless apply_b_dec_to_input is false."""
    folder = write_saelens(tmp_path / "lens", cfg, **tensors)
    sae = load_sae(convert(folder, "member", tmp_path / "back"))
    assert sae.kind.name == kind
    encode, decode = read_saelens(folder)
    np.testing.assert_allclose(sae.encode(x), encode(x), atol=2e-5, rtol=1e-5)
    np.testing.assert_allclose(sae.decode(encode(x)), decode(encode(x)), atol=2e-5, rtol=1e-5)
    if kind == "matryoshka":
        trainer = convert(tmp_path / "back", "dictionary_learning", tmp_path / "trainer/ae.pt")
        state = torch.load(trainer, weights_only=True)
        assert state["group_sizes"].tolist() == [5, 7]


def test_saelens_threshold_that_differs_is_jumprelu(tmp_path):
    exported = {"format_version": 1, "kind": "batchtopk", "k": 3}
    cfg = {"architecture": "jumprelu", "metadata": {"minsae_jax": exported}}
    folder = write_saelens(tmp_path / "lens", cfg, **THRESHOLDS)
    assert load_sae(convert(folder, "member", tmp_path / "back")).kind.name == "jumprelu"


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"architecture": "topk"}, "has k None, expected an integer above 0"),
        ({"architecture": "topk", "k": 2.5}, "has k 2.5"),
        ({"architecture": "topk", "k": True}, "has k True"),
        ({"architecture": "topk", "k": 2, "rescale_acts_by_decoder_norm": 1}, "true or false"),
        ({"architecture": "jumprelu"}, "must contain exactly"),
        ({"architecture": "batchtopk", "k": 2}, "must contain exactly"),
        ({"architecture": "gated"}, "must contain exactly"),
    ],
)
def test_invalid_saelens_is_refused(cfg, message, tmp_path):
    folder = write_saelens(tmp_path / "lens", cfg)
    with pytest.raises(UserError, match=message):
        convert(folder, "member", tmp_path / "back")


@pytest.fixture
def trainer(tmp_path):
    """Return change(kind, config, **tensors), which writes a trainer's folder."""

    def change(kind, config=(), **tensors):
        rng = np.random.default_rng(3)
        shapes = KINDS[kind].shapes(D_MODEL, D_SAE)
        params = {name: rng.random(shape, np.float32) for name, shape in shapes.items()}
        about = {"format_version": 1, "kind": kind, "k": K}
        save_member(tmp_path / kind, params, about)
        file = convert(tmp_path / kind, "dictionary_learning", tmp_path / "trainer_0/ae.pt")
        config_path = file.with_name("config.json")
        content = json.loads(config_path.read_text())
        del content["minsae_jax"]
        config_path.write_text(json.dumps(content | dict(config)))
        torch.save(torch.load(file, weights_only=True) | tensors, file)
        return file.parent

    return change


@pytest.mark.parametrize("kind", ["batchtopk", "matryoshka"])
def test_threshold_that_was_never_set_is_refused(kind, trainer, tmp_path):
    folder = trainer(kind, threshold=torch.tensor(-1.0))
    with pytest.raises(UserError, match="training was too short to set it"):
        convert(folder, "member", tmp_path / "back")


def test_group_sizes_become_prefixes(trainer, tmp_path):
    folder = trainer("matryoshka", group_sizes=torch.tensor([1, 6, 5]))
    sae = load_sae(convert(folder, "member", tmp_path / "back"))
    assert sae.config["k"] == K
    assert Matryoshka(shares=tuple(sae.config["shares"])).prefixes(D_SAE) == (1, 7, 12)
    bad = trainer("matryoshka", group_sizes=torch.tensor([1, 6]))
    with pytest.raises(UserError, match="group_sizes that do not add up"):
        convert(bad, "member", tmp_path / "other")


def test_class_of_a_bare_topk_file_is_unknown(trainer, tmp_path):
    folder = trainer("topk")
    (folder / "ae.pt").rename(tmp_path / "x.pt")
    with pytest.raises(UserError, match="AutoEncoderTopK or BatchTopKSAE"):
        convert(tmp_path / "x.pt", "member", tmp_path / "back")
    with pytest.raises(UserError, match=r"must be named ae\.pt"):
        convert(tmp_path / "topk", "dictionary_learning", tmp_path / "y.pt")
    assert not (tmp_path / "y.pt").exists()


def test_config_of_a_training_run_is_not_replaced(trainer, tmp_path):
    folder = trainer("topk", {"trainer": {"dict_class": "AutoEncoderTopK"}})
    (folder / "ae.pt").unlink()
    before = (folder / "config.json").read_bytes()
    with pytest.raises(UserError, match="choose another --out"):
        convert(tmp_path / "topk", "dictionary_learning", folder / "ae.pt")
    assert (folder / "config.json").read_bytes() == before


def test_dictionary_learning_requires_k(tmp_path):
    shapes = KINDS["batchtopk"].shapes(D_MODEL, D_SAE)
    params = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    save_member(tmp_path / "m", params, {"format_version": 1, "kind": "batchtopk"})
    with pytest.raises(UserError, match="requires k of kind batchtopk"):
        convert(tmp_path / "m", "dictionary_learning", tmp_path / "trainer_0/ae.pt")


def test_killed_conversion_of_a_trainer_folder_never_looks_complete(trainer, tmp_path, monkeypatch):
    """At any rename, a folder with a new config.json has no old state dict."""
    folder = trainer("topk")
    convert(tmp_path / "topk", "dictionary_learning", folder / "ae.pt")

    def stop(self, target):
        raise KeyboardInterrupt

    rename = Path.replace

    def stop_at_state(self, target):
        return stop(self, target) if Path(target).name == "ae.pt" else rename(self, target)

    for killed in (stop, stop_at_state):
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", killed)
            with pytest.raises(KeyboardInterrupt):
                convert(tmp_path / "topk", "dictionary_learning", folder / "ae.pt")
        with pytest.raises(UserError):
            format_of(folder)
        convert(tmp_path / "topk", "dictionary_learning", folder / "ae.pt")
