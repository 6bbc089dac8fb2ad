"""The converter: what it reads where, what it refuses, and that it runs nothing."""

import json
import os
import pickle
import resource
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from convert.__main__ import main
from convert.encoder import convert, convert_encoder, read_source, settings_of, write_pytorch
from minsae_jax import UserError, load_encoder
from minsae_jax.encoder.patchtst import Architecture
from tests.conftest import ENCODERS, FIXTURES
from tests.random_encoder import random_state_dict

SOURCE = FIXTURES / "layernorm_prenorm"
SAE = FIXTURES / "sae_parity/sparse_autoencoder_final.pt"


@pytest.fixture
def checkpoint():
    return torch.load(SOURCE / "checkpoint.pth", weights_only=True)


@pytest.fixture
def settings():
    return yaml.safe_load((SOURCE / "config.yaml").read_text())


@pytest.fixture
def through_files(tmp_path):
    """through_files(checkpoint, settings), as a user would convert."""

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


def test_own_config_gives_the_same(through_files, checkpoint, settings):
    with_yaml, notes = through_files(checkpoint, settings)
    alone, notes_alone = through_files(checkpoint)
    assert with_yaml.fingerprint == alone.fingerprint
    assert notes["sources"]["seq_len"] == "YAML"
    assert notes_alone["sources"]["seq_len"] == "checkpoint's config"


@pytest.mark.parametrize("key", ["model", "state_dict"])
def test_state_dict_under_other_keys(through_files, checkpoint, settings, key):
    expected = through_files(checkpoint, settings)[0].fingerprint
    assert through_files({key: checkpoint["model_state_dict"], "opt": {}}, settings)[0].fingerprint == expected


def test_bare_state_dict_and_prefixes(through_files, checkpoint, settings):
    expected = through_files(checkpoint, settings)[0].fingerprint
    state = checkpoint["model_state_dict"]
    assert through_files(dict(state), settings)[0].fingerprint == expected
    for prefix in ("module.", "_orig_mod.", "_orig_mod.module.", "model.", "module.model."):
        prefixed = checkpoint | {"model_state_dict": {prefix + k: v for k, v in state.items()}}
        assert through_files(prefixed, settings)[0].fingerprint == expected


def test_numpy_scalars_beside_the_weights(through_files, checkpoint, settings):
    import numpy as np

    through_files(checkpoint | {"train_loss": np.float64(0.5), "val_loss": np.float32(0.5)}, settings)


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
        ("model", "stride", 0, "stride must be a whole number above 0 and below 2^31, but the YAML says 0"),
        ("model", "revin", "maybe", "revin must be true or false, but the YAML says 'maybe'"),
    ],
)  # fmt: skip
def test_contradictions(through_files, checkpoint, settings, section, key, value, told):
    settings[section][key] = value
    with pytest.raises(UserError) as e:
        through_files(checkpoint, settings)
    assert told in str(e.value)


def test_individual_embeddings_must_match_the_channels(through_files):
    source = FIXTURES / "revin_affine_gelu_overlap"
    checkpoint = torch.load(source / "checkpoint.pth", weights_only=True)
    checkpoint["config"]["data"]["n_vars"] = 6
    with pytest.raises(UserError, match="n_vars is 6 in the checkpoint's config, but 5 in the state dict"):
        through_files(checkpoint)


@pytest.mark.parametrize("key", ["activation", "res_attention", "stride", "seq_len", "revin", "revin_eps", "n_vars"])
def test_what_nothing_gives_is_named(through_files, checkpoint, settings, key):
    for config in (settings, checkpoint["config"]):
        for section in ("data", "model"):
            config[section].pop(key, None)
    with pytest.raises(UserError, match=rf"neither the YAML nor the config in x.pth gives {key}"):
        through_files(checkpoint, settings)


def test_defaults(through_files, checkpoint, settings):
    for config in (settings, checkpoint["config"]):
        config["model"].pop("pre_norm", None)
        config["model"]["pe"] = None
    encoder, notes = through_files(checkpoint, settings)
    assert encoder.architecture.pre_norm is False
    assert notes["sources"]["pre_norm"] == "program's default"


def test_ignored_settings_are_one_warning(through_files, checkpoint, settings):
    settings["model"] |= {"norm": "BatchNorm", "use_cls_token": False}  # the checkpoint's own config is right
    with pytest.warns(UserWarning, match="the state dict decides") as seen:
        encoder, _ = through_files(checkpoint, settings)
    assert len(seen) == 1
    assert "norm is BatchNorm in the YAML, but LayerNorm in the state dict" in str(seen[0].message)
    assert (encoder.architecture.norm, encoder.architecture.use_cls_token) == ("LayerNorm", True)


def test_equal_settings_in_other_spellings_are_no_disagreement(through_files, checkpoint, settings):
    checkpoint["config"]["model"] |= {"revin_eps": "1e-05", "activation": "GELU"}  # as PyYAML reads 1e-05
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        through_files(checkpoint, settings)


def test_yaml_precedes_the_own_config_with_one_warning(through_files, checkpoint, settings):
    settings["model"] |= {"activation": "relu", "res_attention": False}
    with pytest.warns(UserWarning, match="precedes") as seen:
        encoder, _ = through_files(checkpoint, settings)
    assert len(seen) == 1
    assert "activation ('relu', not 'gelu'), res_attention (False, not True)" in str(seen[0].message)
    assert (encoder.architecture.activation, encoder.architecture.res_attention) == ("relu", False)


def test_keys_that_do_not_fit_are_told_together(through_files, checkpoint, settings):
    state = checkpoint["model_state_dict"]
    del state["backbone.encoder.layers.1.ff.0.bias"]
    state["backbone.extra.weight"] = torch.zeros(3)
    state["backbone.encoder.layers.2.ff.3.bias"] = torch.zeros(5)
    state["backbone.encoder.layers.2.ff.0.bias"][0] = float("nan")
    with pytest.raises(UserError) as e:
        through_files(checkpoint, settings)
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


def same(before, after):
    """Two state dicts, to the bit."""
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].dtype == after[name].dtype
        assert before[name].shape == after[name].shape
        assert before[name].numpy(force=True).tobytes() == after[name].numpy(force=True).tobytes()


@pytest.mark.parametrize("name", ENCODERS)
def test_back_to_the_bit(name, tmp_path):
    source = FIXTURES / name
    main(["encoder", str(source / "checkpoint.pth"), "--config_path", str(source / "config.yaml"), "--out",
          str(tmp_path / "encoder")])  # fmt: skip
    main(["encoder", str(tmp_path / "encoder"), "--to", "pytorch", "--out", str(tmp_path / "back.pth")])
    before, after = (torch.load(p, weights_only=True) for p in (source / "checkpoint.pth", tmp_path / "back.pth"))
    same(before["model_state_dict"], after["model_state_dict"])
    same(before.get("revin_state_dict") or {}, after["revin_state_dict"] or {})
    again, _ = convert_encoder(tmp_path / "back.pth")  # its own config is enough
    assert again.fingerprint == load_encoder(tmp_path / "encoder").fingerprint


BASE = Architecture(
    n_vars=3, seq_len=50, patch_len=8, stride=6, n_layers=2, d_model=16, n_heads=4, d_ff=24, activation="relu",
    norm="BatchNorm", pre_norm=False, res_attention=True, shared_embedding=True, use_cls_token=True, pos_dim=16,
    head_type="pretrain", target_dim=8, individual_head=False, revin=False, revin_affine=False, revin_eps=1e-5,
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"norm": "LayerNorm", "pos_dim": 1, "shared_embedding": False},
        {"head_type": "prediction", "target_dim": 5, "use_cls_token": False, "individual_head": True},
        {"head_type": "prediction", "target_dim": 5},
        {"head_type": "regression", "target_dim": 2, "use_cls_token": False},
        {"head_type": "classification", "target_dim": 3},
    ],
)
def test_a_bare_state_dict_comes_back_bare(change, dtype, tmp_path):
    a = replace(BASE, **change)
    before = {k: v.to(dtype) if v.is_floating_point() else v for k, v in random_state_dict(a).items()}
    torch.save(before, tmp_path / "x.pth")
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(settings_of(a)))
    main(["encoder", str(tmp_path / "x.pth"), "--config_path", str(tmp_path / "x.yaml"), "--out", str(tmp_path / "e")])
    main(["encoder", str(tmp_path / "e"), "--to", "pytorch", "--out", str(tmp_path / "back.pth")])
    same({k: v.view(torch.int16) if v.itemsize == 2 else v for k, v in before.items()},
         {k: v.view(torch.int16) if v.itemsize == 2 else v
          for k, v in torch.load(tmp_path / "back.pth", weights_only=True).items()})  # fmt: skip


def test_float64_is_rounded_with_a_warning(through_files, checkpoint, settings):
    state = checkpoint["model_state_dict"]
    checkpoint["model_state_dict"] = {k: v.double() if v.is_floating_point() else v for k, v in state.items()}
    with pytest.warns(UserWarning, match="holds float64, which is rounded"):
        encoder, _ = through_files(checkpoint, settings)
    assert encoder.fingerprint == convert_encoder(SOURCE / "checkpoint.pth", SOURCE / "config.yaml")[0].fingerprint


def test_what_gpatchtst_cannot_run_is_not_written_for_it(tmp_path):
    source = read_source(
        FIXTURES / "official/supervised/checkpoint.pth", flags={"n_vars": 4, "seq_len": 53, "stride": 5}
    )
    encoder, notes = convert(source)
    with pytest.raises(UserError, match=r"gPatchTST has no such encoder \(end_padding, denormalize\)"):
        write_pytorch(tmp_path / "x.pth", encoder, notes)
    encoder, notes = convert(read_source(SOURCE / "checkpoint.pth", without_head=True))
    with pytest.raises(UserError, match="no head"):
        write_pytorch(tmp_path / "x.pth", encoder, notes)
    assert list(tmp_path.iterdir()) == []


def test_wrong_ways(tmp_path):
    given = ["encoder", str(SOURCE / "checkpoint.pth")]
    main([*given, "--out", str(tmp_path / "e")])
    (tmp_path / "precious.pth").write_text("epochs of work")
    for args, told in (
        (given, "say what to write with --out, or --verify"),
        ([*given, "--verify", "a.npy", "b.npy"], "takes one recording, not 2"),
        ([*given, "--to", "pytorch", "--out", str(tmp_path / "precious.pth")], "is never overwritten"),
        (["encoder", str(tmp_path / "e"), "--out", str(tmp_path / "f")], "is a converted encoder already"),
        (
            ["encoder", str(tmp_path / "e"), "--to", "pytorch", "--out", str(tmp_path / "f"), "--stride", "3"],
            "as it is",
        ),
        ([*given, "--out", str(tmp_path / "f"), "--res_attention", "maybe"], "invalid choice 'maybe'"),
        ([*given, "--out", str(tmp_path / "f"), "--stride", "20"], "make 10 patches"),
    ):
        with pytest.raises(UserError, match=told):
            main(args)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["e", "precious.pth"]
    assert (tmp_path / "precious.pth").read_text() == "epochs of work"


def test_a_killed_conversion_never_looks_complete(tmp_path, monkeypatch):
    """Whatever write it dies at, there is no encoder, or the old one."""
    given = ["encoder", str(SOURCE / "checkpoint.pth"), "--out", str(tmp_path / "e")]

    def die(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", die)
        with pytest.raises(KeyboardInterrupt):
            main(given)
    assert list(tmp_path.iterdir()) == []
    main(given)
    (tmp_path / "e.tmp/params").mkdir(parents=True)  # as SIGKILL leaves it
    main(given)
    assert [p.name for p in tmp_path.iterdir()] == ["e"]
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            main(["encoder", str(tmp_path / "e"), "--to", "pytorch", "--out", str(tmp_path / "x.pth")])
    assert [p.name for p in tmp_path.iterdir()] == ["e"]


def test_only_encoders_are_replaced(tmp_path):
    given = ["encoder", str(SOURCE / "checkpoint.pth"), "--out"]
    main([*given, str(tmp_path / "e")])
    shutil.copytree(tmp_path / "e", tmp_path / "with_more")
    (tmp_path / "with_more/thesis.tex").write_text("years of work")
    (tmp_path / "alike/params").mkdir(parents=True)
    (tmp_path / "alike/config.json").write_text("{}")
    (tmp_path / "e.tmp").mkdir()
    (tmp_path / "e.tmp/thesis.tex").write_text("years of work")
    before = sorted(tmp_path.rglob("*"))
    for name in ("with_more", "alike", "e"):
        with pytest.raises(UserError, match="is no converted encoder, and is not overwritten"):
            main([*given, str(tmp_path / name)])
    assert sorted(tmp_path.rglob("*")) == before


def test_notes_that_were_edited_are_not_trusted(tmp_path):
    main(["encoder", str(SOURCE / "checkpoint.pth"), "--out", str(tmp_path / "e")])
    config = json.loads((tmp_path / "e/config.json").read_text())
    for change in (
        {"source_dtypes": {"nokey": "float16"}}, {"source_dtypes": {"backbone.W_pos": "int8"}},
        {"batches_tracked": {"backbone.W_pos": 3}}, {"batches_tracked": {"a.1.num_batches_tracked": "x"}},
    ):  # fmt: skip
        (tmp_path / "e/config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=r"config\.json is damaged"):
            main(["encoder", str(tmp_path / "e"), "--to", "pytorch", "--out", str(tmp_path / "x.pth")])
    for change in ({"source_dtypes": "load"}, {"batches_tracked": [1]}):
        (tmp_path / "e/config.json").write_text(json.dumps(config | change))
        main(["encoder", str(tmp_path / "e"), "--to", "pytorch", "--out", str(tmp_path / f"{len(change)}{change}.pth")])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_heads_are_told_in_half_precision_too(dtype, tmp_path):
    a = replace(BASE, d_model=128, n_heads=16, pos_dim=128)
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in random_state_dict(a).items()}
    torch.save(state, tmp_path / "x.pth")
    flags = {"n_vars": 3, "seq_len": 50, "stride": 6, "activation": "relu", "res_attention": True, "revin": False}
    flags |= {"revin_eps": 1e-5, "head_type": "pretrain"}
    assert read_source(tmp_path / "x.pth", flags=flags).architecture == a


def test_the_flag_that_is_named_exists(tmp_path):
    state = random_state_dict(BASE)
    for key in state:
        if key.endswith("scale"):
            state[key] = torch.tensor(0.123)  # trained
    torch.save({"model_state_dict": state, "config": settings_of(BASE)["data"]}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"gives seq_len, stride, num_heads, .*: say --seq_len and so on"):
        read_source(tmp_path / "x.pth")
    settings = settings_of(BASE)
    del settings["model"]["num_heads"]
    torch.save({"model_state_dict": state, "config": settings}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="gives num_heads: say --n_heads"):
        main(["encoder", str(tmp_path / "x.pth"), "--out", str(tmp_path / "e")])
    main(["encoder", str(tmp_path / "x.pth"), "--out", str(tmp_path / "e"), "--n_heads", "4"])


@pytest.mark.parametrize("head", [{"head_type": "none"}, {"head_type": "regression", "target_dim": 2}])
def test_a_wrapped_gpatchtst_is_not_taken_for_the_official_program(head, tmp_path):
    a = replace(BASE, use_cls_token=False, seq_len=52, **head)
    state = random_state_dict(a)
    if a.head_type == "none":
        state = {k: v for k, v in state.items() if not k.startswith("head.")}
    torch.save({f"model.{k}": v for k, v in state.items()}, tmp_path / "x.pth")
    flags = {"n_vars": 3, "seq_len": 52, "stride": 6, "revin": False, "revin_eps": 1e-5}
    with pytest.raises(UserError, match="gives activation, res_attention"):
        read_source(tmp_path / "x.pth", flags=flags)
    flags |= {"activation": "relu", "res_attention": True}
    if a.head_type != "none":
        flags["head_type"] = a.head_type
    source = read_source(tmp_path / "x.pth", flags=flags)
    assert source.checkpoint.program == "gpatchtst"
    assert source.architecture.first_sample == 2


def test_what_cannot_be_written_is_one_sentence(tmp_path, capfd):
    """As on a full disk: no file may be longer than 1 KiB."""
    main(["encoder", str(SOURCE / "checkpoint.pth"), "--out", str(tmp_path / "e")])
    out = tmp_path / "full"
    for args in (
        ["encoder", str(SOURCE / "checkpoint.pth"), "--out", str(out)],
        ["encoder", str(tmp_path / "e"), "--to", "pytorch", "--out", str(out)],
        *(["sae", str(SAE), "--to", kind, "--out", str(out)] for kind in ("minsae", "member", "saelens")),
    ):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
        try:
            with pytest.raises((UserError, OSError), match=r"File too large|could not be written|FILE_TOO_LARGE|27"):
                main(args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        left = [p for p in tmp_path.iterdir() if p.name != "e"]
        assert all(p.is_dir() and not any(p.iterdir()) for p in left)
