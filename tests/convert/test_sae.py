"""Autoencoders of minSAE, and damaged or foreign files of every format.

`test_sae_kinds.py` compares numbers with SAELens and dictionary_learning.
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


D_MODEL, D_SAE = 6, 10
OTHERS = ("minsae", "saelens", "dictionary_learning")


@pytest.fixture
def member(tmp_path):
    rng = np.random.default_rng(0)
    shapes = RELU.shapes(D_MODEL, D_SAE)
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    config = {
        "format_version": 1,
        "kind": "relu",
        "layer": -1,
        "encoder": "abc",
        "d_model": D_MODEL,
        "d_sae": D_SAE,
    }
    save_member(tmp_path / "member", params, config)
    return tmp_path / "member"


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
