"""Hyper-parameters of members, from their config.json."""

from minsae_jax.sae.hyper import member_hyper, sort_key, sparsity, varied_names


def test_members_are_sorted_by_hyper_parameters(trained):
    hypers = [member_hyper(trained.sae(name).config) for name in ("lambda=1", "lambda=0.1")]
    assert list(hypers[0]) == ["kind", "lambda_sparsity", "lr", "seed", "d_sae"]
    assert [h["lambda_sparsity"] for h in sorted(hypers, key=sort_key)] == [0.1, 1.0]
    assert varied_names(hypers) == ["lambda_sparsity"]


def test_imported_member_without_a_sparsity_setting():
    assert sparsity(member_hyper({"kind": "relu", "lambda_sparsity": None, "d_sae": 4})) is None
