"""minSAE's files in and out, exact to the bit and strict."""

import numpy as np
import pytest
import torch

from convert.__main__ import main
from minsae_jax import UserError, load_sae
from tests.conftest import FIXTURES

SOURCE = FIXTURES / "sae_parity/sparse_autoencoder_final.pt"


def test_there_and_back(tmp_path):
    main(["sae", str(SOURCE), "--to", "member", "--out", str(tmp_path / "member")])
    main(["sae", str(tmp_path / "member"), "--to", "minsae", "--out", str(tmp_path / "back.pt")])
    before, after = (torch.load(p, weights_only=True) for p in (SOURCE, tmp_path / "back.pt"))
    assert before.keys() == after.keys()
    for name in before:
        assert after[name].is_contiguous()
        assert torch.equal(before[name], after[name])


def test_same_numbers_as_torch(tmp_path):
    main(["sae", str(SOURCE), "--to", "member", "--out", str(tmp_path / "member")])
    state, sae = torch.load(SOURCE, weights_only=True), load_sae(tmp_path / "member")
    x = torch.randn(3, 5, sae.d_model)
    features = torch.relu(x @ state["encoder.weight"].T + state["encoder.bias"])
    np.testing.assert_allclose(sae.encode(x.numpy()), features, atol=1e-5, rtol=0)
    x_hat = features @ state["decoder.weight"].T + state["decoder.bias"]
    np.testing.assert_allclose(sae.decode(features.numpy()), x_hat, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda s: s.pop("decoder.bias"), "is no autoencoder of minSAE"),
        (lambda s: s.update(more=torch.zeros(1)), "is no autoencoder of minSAE"),
        (lambda s: s.update({"encoder.weight": s["encoder.weight"].T}), "does not fit together"),
        (lambda s: s.update({"encoder.bias": s["encoder.bias"].double()}), "must be float32"),
        (lambda s: s.update({"encoder.bias": [1.0]}), "is no tensor"),
    ],
)
def test_strict(tmp_path, change, told):
    state = dict(torch.load(SOURCE, weights_only=True))
    change(state)
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(UserError, match=told):
        main(["sae", str(tmp_path / "x.pt"), "--to", "member", "--out", str(tmp_path / "member")])
    assert not (tmp_path / "member").exists()


def test_wrong_paths(tmp_path):
    with pytest.raises(UserError, match="there is no autoencoder"):
        main(["sae", str(tmp_path / "x.pt"), "--to", "member", "--out", str(tmp_path / "m")])
    with pytest.raises(UserError, match=r"there is no sae\.safetensors"):
        main(["sae", str(tmp_path), "--to", "minsae", "--out", str(tmp_path / "m.pt")])
    (tmp_path / "thesis.tex").write_text("years of work")
    for to, out in (("minsae", "."), ("member", "."), ("minsae", "thesis.tex"), ("member", "thesis.tex")):
        with pytest.raises(UserError, match="exists and is no such autoencoder"):
            main(["sae", str(SOURCE), "--to", to, "--out", str(tmp_path / out)])
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_its_own_kind_is_replaced(tmp_path):
    for _ in range(2):
        main(["sae", str(SOURCE), "--to", "member", "--out", str(tmp_path / "member")])
        main(["sae", str(tmp_path / "member"), "--to", "minsae", "--out", str(tmp_path / "back.pt")])


def test_nan_is_refused(tmp_path):
    state = dict(torch.load(SOURCE, weights_only=True))
    state["encoder.bias"] = torch.full_like(state["encoder.bias"], torch.nan)
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(UserError, match="holds NaN"):
        main(["sae", str(tmp_path / "x.pt"), "--to", "member", "--out", str(tmp_path / "m")])
