"""Encoders written as PyTorch checkpoints: bit-identical, or refused."""

import json
from dataclasses import replace

import pytest
import torch
import yaml

from convert.__main__ import main
from convert.encoder import convert, convert_encoder, read_source
from convert.patchtst.weights import settings_of, write_pytorch
from minsae_jax import UserError, load_encoder
from tests.conftest import ENCODERS, FIXTURES
from tests.random_encoder import BASE, random_state_dict

SOURCE = FIXTURES / "layernorm_prenorm"


def convert_file(checkpoint, out, config):
    main(["encoder", str(checkpoint), "--config_path", str(config), "--out", str(out)])


def convert_back(encoder, out):
    main(["encoder", str(encoder), "--to", "pytorch", "--out", str(out)])


def assert_bit_identical(before, after):
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].dtype == after[name].dtype
        assert before[name].shape == after[name].shape
        assert before[name].numpy(force=True).tobytes() == after[name].numpy(force=True).tobytes()


@pytest.mark.parametrize("name", ENCODERS)
def test_written_checkpoint_is_bit_identical(name, tmp_path):
    source = FIXTURES / name
    convert_file(source / "checkpoint.pth", tmp_path / "encoder", source / "config.yaml")
    convert_back(tmp_path / "encoder", tmp_path / "back.pth")
    before, after = (
        torch.load(p, weights_only=True) for p in (source / "checkpoint.pth", tmp_path / "back.pth")
    )
    assert_bit_identical(before["model_state_dict"], after["model_state_dict"])
    assert_bit_identical(before.get("revin_state_dict") or {}, after["revin_state_dict"] or {})
    again, _ = convert_encoder(tmp_path / "back.pth")  # its own config is enough
    assert again.fingerprint == load_encoder(tmp_path / "encoder").fingerprint


@pytest.mark.parametrize(
    ("dtype", "change"),
    [
        (torch.float32, {}),
        (torch.float16, {}),
        (torch.bfloat16, {"norm": "LayerNorm", "pos_dim": 1, "shared_embedding": False}),
        (
            torch.float32,
            {
                "head_type": "prediction",
                "target_dim": 5,
                "use_cls_token": False,
                "individual_head": True,
            },
        ),
        (torch.float32, {"head_type": "prediction", "target_dim": 5}),
        (torch.float32, {"head_type": "regression", "target_dim": 2, "use_cls_token": False}),
        (torch.float32, {"head_type": "classification", "target_dim": 3}),
    ],
)
def test_bare_state_dict_is_written_bare(dtype, change, tmp_path):
    a = replace(BASE, **change)
    before = {
        k: v.to(dtype) if v.is_floating_point() else v for k, v in random_state_dict(a).items()
    }
    torch.save(before, tmp_path / "x.pth")
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(settings_of(a)))
    convert_file(tmp_path / "x.pth", tmp_path / "e", tmp_path / "x.yaml")
    convert_back(tmp_path / "e", tmp_path / "back.pth")
    assert_bit_identical(
        {k: v.view(torch.int16) if v.itemsize == 2 else v for k, v in before.items()},
        {
            k: v.view(torch.int16) if v.itemsize == 2 else v
            for k, v in torch.load(tmp_path / "back.pth", weights_only=True).items()
        },
    )


def test_encoder_that_gpatchtst_cannot_run_is_refused(tmp_path):
    supervised = read_source(
        FIXTURES / "official/supervised/checkpoint.pth",
        flags={"n_vars": 4, "seq_len": 53, "stride": 5},
    )
    encoder, source = convert(supervised)
    with pytest.raises(
        UserError, match=r"gPatchTST cannot run this encoder \(end_padding, denormalize\)"
    ):
        write_pytorch(tmp_path / "x.pth", encoder, source)
    encoder, source = convert(read_source(SOURCE / "checkpoint.pth", without_head=True))
    with pytest.raises(UserError, match="no head"):
        write_pytorch(tmp_path / "x.pth", encoder, source)
    assert list(tmp_path.iterdir()) == []


def test_edited_config_json_is_not_trusted(tmp_path):
    main(["encoder", str(SOURCE / "checkpoint.pth"), "--out", str(tmp_path / "e")])
    config = json.loads((tmp_path / "e/config.json").read_text())
    for change in (
        {"source_dtypes": {"nokey": "float16"}},
        {"source_dtypes": {"backbone.W_pos": "int8"}},
        {"batches_tracked": {"backbone.W_pos": 3}},
        {"batches_tracked": {"a.1.num_batches_tracked": "x"}},
    ):
        (tmp_path / "e/config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=r"config\.json is damaged"):
            convert_back(tmp_path / "e", tmp_path / "x.pth")
    for change in ({"source_dtypes": "load"}, {"batches_tracked": [1]}):
        (tmp_path / "e/config.json").write_text(json.dumps(config | change))
        convert_back(tmp_path / "e", tmp_path / f"{len(change)}{change}.pth")
