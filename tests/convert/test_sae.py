"""Autoencoders of minSAE, SAELens and dictionary_learning: same numbers, strict formats.

The arithmetic of each library is written out here, from its documentation, in float64.
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
from minsae_jax.sae.kinds import KINDS
from minsae_jax.sae.member import save_member
from tests.conftest import FIXTURES

RELU = KINDS["relu"]
SOURCE = FIXTURES / "sae_parity/sparse_autoencoder_final.pt"


def test_minsae_round_trip_is_exact(tmp_path):
    main(["sae", str(SOURCE), "--to", "member", "--out", str(tmp_path / "member")])
    main(["sae", str(tmp_path / "member"), "--to", "minsae", "--out", str(tmp_path / "back.pt")])
    before, after = (torch.load(p, weights_only=True) for p in (SOURCE, tmp_path / "back.pt"))
    assert before.keys() == after.keys()
    for name in before:
        assert after[name].is_contiguous()
        assert torch.equal(before[name], after[name])


def test_member_computes_like_torch(tmp_path):
    main(["sae", str(SOURCE), "--to", "member", "--out", str(tmp_path / "member")])
    state, sae = torch.load(SOURCE, weights_only=True), load_sae(tmp_path / "member")
    x = torch.randn(3, 5, sae.d_model)
    features = torch.relu(x @ state["encoder.weight"].T + state["encoder.bias"])
    np.testing.assert_allclose(sae.encode(x.numpy()), features, atol=1e-5, rtol=0)
    x_hat = features @ state["decoder.weight"].T + state["decoder.bias"]
    np.testing.assert_allclose(sae.decode(features.numpy()), x_hat, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("decoder.bias"), "is not an autoencoder of minSAE"),
        (lambda s: s.update(more=torch.zeros(1)), "is not an autoencoder of minSAE"),
        (lambda s: s.update({"encoder.weight": s["encoder.weight"].T}), "inconsistent shapes"),
        (lambda s: s.update({"encoder.bias": s["encoder.bias"].double()}), "must be float32"),
        (lambda s: s.update({"encoder.bias": [1.0]}), "is not a tensor"),
    ],
)
def test_wrong_state_dict_is_refused(tmp_path, change, message):
    state = dict(torch.load(SOURCE, weights_only=True))
    change(state)
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(UserError, match=message):
        main(["sae", str(tmp_path / "x.pt"), "--to", "member", "--out", str(tmp_path / "member")])
    assert not (tmp_path / "member").exists()


def test_wrong_paths_are_refused(tmp_path):
    with pytest.raises(UserError, match="there is no autoencoder"):
        main(["sae", str(tmp_path / "x.pt"), "--to", "member", "--out", str(tmp_path / "m")])
    with pytest.raises(UserError, match=r"there is no sae\.safetensors"):
        main(["sae", str(tmp_path), "--to", "minsae", "--out", str(tmp_path / "m.pt")])
    (tmp_path / "thesis.tex").write_text("years of work")
    for to, out in (
        ("minsae", "."),
        ("member", "."),
        ("minsae", "thesis.tex"),
        ("member", "thesis.tex"),
    ):
        with pytest.raises(UserError, match="exists and is not an autoencoder of format"):
            main(["sae", str(SOURCE), "--to", to, "--out", str(tmp_path / out)])
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_member_of_a_run_is_not_replaced(tmp_path):
    member = tmp_path / "member"
    main(["sae", str(SOURCE), "--to", "member", "--out", str(member)])
    main(["sae", str(SOURCE), "--to", "member", "--out", str(member)])
    (member / "metrics.csv").write_text("step\n")
    with pytest.raises(UserError, match="is a member of a run"):
        main(["sae", str(SOURCE), "--to", "member", "--out", str(member)])


def test_autoencoder_of_the_same_kind_is_replaced(tmp_path):
    for _ in range(2):
        main(["sae", str(SOURCE), "--to", "member", "--out", str(tmp_path / "member")])
        main(
            ["sae", str(tmp_path / "member"), "--to", "minsae", "--out", str(tmp_path / "back.pt")]
        )


def test_nan_is_refused(tmp_path):
    state = dict(torch.load(SOURCE, weights_only=True))
    state["encoder.bias"] = torch.full_like(state["encoder.bias"], torch.nan)
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(UserError, match="NaN"):
        main(["sae", str(tmp_path / "x.pt"), "--to", "member", "--out", str(tmp_path / "m")])


def relu(x):
    return np.maximum(x, 0)


def minsae(state):
    return (
        lambda x: relu(x @ state["encoder.weight"].T + state["encoder.bias"]),
        lambda f: f @ state["decoder.weight"].T + state["decoder.bias"],
    )


def dictionary_learning(state):
    return (
        lambda x: relu((x - state["bias"]) @ state["encoder.weight"].T + state["encoder.bias"]),
        lambda f: f @ state["decoder.weight"].T + state["bias"],
    )


def saelens(cfg, state):
    """`architecture: standard`; apply_b_dec_to_input is true by default."""
    shift = state["b_dec"] if cfg.get("apply_b_dec_to_input", True) else 0
    return lambda x: relu(
        (x - shift) @ state["W_enc"] + state["b_enc"]
    ), lambda f: f @ state["W_dec"] + state["b_dec"]


def read(kind, path):
    """Return (encode, decode) of a written file, as the library computes them."""
    if kind == "saelens":
        cfg = json.loads((path / "cfg.json").read_text())
        tensors = load_file(path / "sae_weights.safetensors")
        return saelens(cfg, {k: v.astype(np.float64) for k, v in tensors.items()})
    state = {k: v.double().numpy() for k, v in torch.load(path, weights_only=True).items()}
    return minsae(state) if kind == "minsae" else dictionary_learning(state)


D_MODEL, D_SAE, SCALE = 6, 10, 0.125
OTHERS = ("minsae", "saelens", "dictionary_learning")


@pytest.fixture
def trained():
    """Parameters for scaled inputs; large biases reveal a wrong scale, sign or transposition."""
    rng = np.random.default_rng(0)
    return {
        name: rng.normal(size=shape).astype(np.float32)
        for name, shape in RELU.shapes(D_MODEL, D_SAE).items()
    }


@pytest.fixture
def member(tmp_path, trained):
    config = {
        "format_version": 1,
        "kind": "relu",
        "layer": -1,
        "encoder": "abc",
        "d_model": D_MODEL,
        "d_sae": D_SAE,
    }
    save_member(tmp_path / "member", RELU.fold_scale(trained, SCALE), config)
    return tmp_path / "member"


@pytest.mark.parametrize("kind", OTHERS)
def test_other_libraries_compute_the_same(kind, member, trained, tmp_path):
    """Compare training's parameters on scale * x with each library's arithmetic on x."""
    main(["sae", str(member), "--to", kind, "--out", str(tmp_path / "out")])
    encode, decode = read(kind, tmp_path / "out")
    x = 8 * np.random.default_rng(1).normal(size=(50, D_MODEL))
    features = relu(SCALE * x @ trained["W_enc"] + trained["b_enc"])
    assert 0.2 < (features > 0).mean() < 0.8
    np.testing.assert_allclose(encode(x), features, atol=1e-5, rtol=1e-5)
    x_hat = (features @ trained["W_dec"] + trained["b_dec"]) / SCALE
    np.testing.assert_allclose(decode(features), x_hat, atol=1e-4, rtol=1e-5)
    sae = load_sae(member)
    np.testing.assert_allclose(sae.encode(x), encode(x), atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(sae.decode(features), decode(features), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", OTHERS)
def test_round_trip_keeps_the_parameters(kind, member, tmp_path):
    main(["sae", str(member), "--to", kind, "--out", str(tmp_path / "out")])
    main(["sae", str(tmp_path / "out"), "--to", "member", "--out", str(tmp_path / "back")])
    before, after = load_sae(member), load_sae(tmp_path / "back")
    for name in before.params:
        tolerance = 1e-6 if (kind, name) == ("dictionary_learning", "b_enc") else 0
        np.testing.assert_allclose(after.params[name], before.params[name], atol=tolerance, rtol=0)
    if kind == "saelens":
        assert after.config == before.config


@pytest.mark.parametrize("source", OTHERS)
@pytest.mark.parametrize("target", OTHERS)
def test_every_kind_converts_to_every_kind(source, target, member, tmp_path):
    main(["sae", str(member), "--to", source, "--out", str(tmp_path / "one")])
    main(["sae", str(tmp_path / "one"), "--to", target, "--out", str(tmp_path / "two")])
    encode, decode = read(source, tmp_path / "one")
    other_encode, other_decode = read(target, tmp_path / "two")
    x = np.random.default_rng(1).normal(size=(50, D_MODEL))
    np.testing.assert_allclose(other_encode(x), encode(x), atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(other_decode(encode(x)), decode(encode(x)), atol=1e-5, rtol=1e-5)


def test_names_and_shapes_are_the_documented_ones(member, tmp_path):
    for kind in OTHERS:
        main(["sae", str(member), "--to", kind, "--out", str(tmp_path / kind)])
    cfg = json.loads((tmp_path / "saelens/cfg.json").read_text())
    assert cfg["architecture"] == "standard"
    assert cfg["apply_b_dec_to_input"] is False
    assert (cfg["d_in"], cfg["d_sae"], cfg["dtype"]) == (D_MODEL, D_SAE, "float32")
    tensors = load_file(tmp_path / "saelens/sae_weights.safetensors")
    assert {k: v.shape for k, v in tensors.items()} == RELU.shapes(D_MODEL, D_SAE)
    state = torch.load(tmp_path / "dictionary_learning", weights_only=True)
    assert {k: tuple(v.shape) for k, v in state.items()} == {
        "bias": (D_MODEL,),
        "encoder.weight": (D_SAE, D_MODEL),
        "encoder.bias": (D_SAE,),
        "decoder.weight": (D_MODEL, D_SAE),
    }
    assert all(v.is_contiguous() and v.dtype == torch.float32 for v in state.values())


@pytest.fixture
def lens(member, tmp_path):
    """change(cfg, tensors) of a SAELens folder, through files."""
    main(["sae", str(member), "--to", "saelens", "--out", str(tmp_path / "lens")])
    folder = tmp_path / "lens"

    def change(cfg=(), **tensors):
        config = json.loads((folder / "cfg.json").read_text())
        (folder / "cfg.json").write_text(json.dumps(config | dict(cfg)))
        save_file(
            load_file(folder / "sae_weights.safetensors") | tensors,
            folder / "sae_weights.safetensors",
        )
        return folder

    return change


@pytest.mark.parametrize("said", [True, None])
def test_saelens_default_takes_the_bias_away_first(lens, tmp_path, said):
    folder = lens({"apply_b_dec_to_input": said, "metadata": {}})
    if said is None:
        cfg = json.loads((folder / "cfg.json").read_text())
        del cfg["apply_b_dec_to_input"]
        (folder / "cfg.json").write_text(json.dumps(cfg))
    main(["sae", str(folder), "--to", "member", "--out", str(tmp_path / "back")])
    encode, decode = read("saelens", folder)
    x = np.random.default_rng(1).normal(size=(50, D_MODEL))
    sae = load_sae(tmp_path / "back")
    np.testing.assert_allclose(sae.encode(x), encode(x), atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(sae.decode(encode(x)), decode(encode(x)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (
            {"architecture": "temporal"},
            "has architecture 'temporal'; only standard, topk, jumprelu",
        ),
        ({"architecture": ["standard"]}, "has architecture"),
        ({"normalize_activations": "layer_norm"}, "has normalize_activations 'layer_norm'"),
        ({"normalize_activations": "expected_average_only_in"}, "has normalize_activations"),
        ({"reshape_activations": "hook_z"}, "has reshape_activations"),
        ({"activation_fn": "tanh-relu"}, "has activation_fn"),
        ({"activation_fn_str": "topk"}, "has activation_fn_str"),
        ({"finetuning_scaling_factor": True}, "has finetuning_scaling_factor True"),
        ({"apply_b_dec_to_input": "yes"}, "has apply_b_dec_to_input 'yes'"),
        ({"apply_b_dec_to_input": 0}, "has apply_b_dec_to_input 0"),
    ],
)
def test_unsupported_saelens_options_are_refused(lens, tmp_path, cfg, message):
    with pytest.raises(UserError, match=message):
        main(["sae", str(lens(cfg)), "--to", "member", "--out", str(tmp_path / "back")])
    assert not (tmp_path / "back").exists()


def test_damaged_saelens_is_refused(lens, tmp_path):
    args = ["--to", "member", "--out", str(tmp_path / "back")]
    with pytest.raises(UserError, match="must contain exactly"):
        main(["sae", str(lens(threshold=np.zeros(D_SAE, np.float32))), *args])
    (tmp_path / "lens/sae_weights.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="not a safetensors file, or it is damaged"):
        main(["sae", str(tmp_path / "lens"), *args])
    (tmp_path / "lens/cfg.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        main(["sae", str(tmp_path / "lens"), *args])


def test_trainer_folder_of_dictionary_learning(member, tmp_path):
    main(
        [
            "sae",
            str(member),
            "--to",
            "dictionary_learning",
            "--out",
            str(tmp_path / "trainer_0/ae.pt"),
        ]
    )
    main(["sae", str(tmp_path / "trainer_0"), "--to", "member", "--out", str(tmp_path / "back")])
    np.testing.assert_allclose(
        load_sae(tmp_path / "back").params["b_enc"], load_sae(member).params["b_enc"], atol=1e-6
    )


@pytest.mark.parametrize("kind", ["member", *OTHERS])
def test_killed_conversion_never_looks_complete(kind, member, tmp_path, monkeypatch):
    """At any rename, the output is not an autoencoder."""
    for survived in range(2):
        out = tmp_path / f"out{survived}"
        renames = []

        def rename(self, target, renames=renames, survived=survived, real=Path.replace):
            renames.append(target)
            if len(renames) > survived:
                raise KeyboardInterrupt
            return real(self, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", rename)
            try:
                main(["sae", str(member), "--to", kind, "--out", str(out)])
            except KeyboardInterrupt:
                with pytest.raises(UserError):
                    format_of(out)
            else:
                assert len(renames) == survived == 1
    assert not list(tmp_path.rglob("*.tmp*"))


def test_another_kind_is_never_replaced(member, tmp_path):
    torch.save({"model_state_dict": {}, "bias": torch.zeros(3)}, tmp_path / "encoder.pth")
    (tmp_path / "config").mkdir()
    (tmp_path / "config/cfg.json").write_text('{"mine": 1}')
    main(["sae", str(member), "--to", "saelens", "--out", str(tmp_path / "topk")])
    cfg = json.loads((tmp_path / "topk/cfg.json").read_text())
    (tmp_path / "topk/cfg.json").write_text(json.dumps(cfg | {"architecture": "topk"}))
    for to, name in (
        ("minsae", "encoder.pth"),
        ("dictionary_learning", "encoder.pth"),
        ("saelens", "config"),
        ("saelens", "topk"),
    ):
        before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
        with pytest.raises(UserError, match="exists and is not an autoencoder of format"):
            main(["sae", str(member), "--to", to, "--out", str(tmp_path / name)])
        assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_bias_beyond_float32_is_refused(lens, tmp_path):
    large = {
        n: np.full(RELU.shapes(D_MODEL, D_SAE)[n], 1e30, np.float32) for n in ("W_enc", "b_dec")
    }
    folder = lens({"apply_b_dec_to_input": True}, **large)
    with pytest.raises(UserError, match="NaN or infinity"):
        main(["sae", str(folder), "--to", "member", "--out", str(tmp_path / "back")])


def test_invalid_metadata_is_ignored(lens, tmp_path):
    folder = lens({"metadata": {"minsae_jax": {"kind": "topk", "format_version": 99}}})
    main(["sae", str(folder), "--to", "member", "--out", str(tmp_path / "back")])
    assert load_sae(tmp_path / "back").config["kind"] == "relu"


def test_minsae_state_dict_in_a_trainer_folder(member, tmp_path):
    main(["sae", str(member), "--to", "minsae", "--out", str(tmp_path / "trainer_0/ae.pt")])
    main(["sae", str(tmp_path / "trainer_0"), "--to", "member", "--out", str(tmp_path / "back")])
    np.testing.assert_array_equal(
        load_sae(tmp_path / "back").params["b_enc"], load_sae(member).params["b_enc"]
    )


def test_member_is_written_onto_itself_unchanged(member):
    before = {p.name: p.read_bytes() for p in member.iterdir()}
    main(["sae", str(member), "--to", "member", "--out", str(member)])
    assert {p.name: p.read_bytes() for p in member.iterdir()} == before


def test_damaged_member_is_refused(member, tmp_path):
    (member / "config.json").write_text("[" * 200_000)
    with pytest.raises(UserError, match=r"config\.json cannot be read as JSON"):
        load_sae(member)
