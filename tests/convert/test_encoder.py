"""The command `python -m convert encoder`: forms it reads, files it does not touch."""

import json
import resource
import shutil
from pathlib import Path

import pytest
import torch

from convert.__main__ import main
from convert.encoder import convert_encoder
from minsae_jax import UserError, load_encoder
from tests.conftest import ENCODERS, FIXTURES

SOURCE = FIXTURES / "layernorm_prenorm"


SAE = FIXTURES / "sae_parity/sparse_autoencoder_final.pt"


@pytest.mark.parametrize("name", ENCODERS)
def test_command_writes_an_encoder(name, tmp_path, capsys):
    out = tmp_path / "encoder"
    source = FIXTURES / name
    checkpoint = str(source / "checkpoint.pth")
    config = str(source / "config.yaml")
    main(["encoder", checkpoint, "--config_path", config, "--out", str(out)])
    printed = capsys.readouterr().out
    encoder = load_encoder(out)
    assert encoder.fingerprint[:12] in printed
    assert "from the state dict: " in printed
    config = json.loads((out / "config.json").read_text())
    assert config["sources"]["d_model"] == "state dict"
    assert config["sources"]["stride"] == "YAML"
    assert len(config["source_sha256"]) == 64


def test_summary_counts_parameters(tmp_path, capsys, checkpoint):
    main(["encoder", str(SOURCE / "checkpoint.pth"), "--out", str(tmp_path / "e")])
    state = checkpoint["model_state_dict"]
    assert f"{sum(t.numel() for t in state.values()):,} parameters" in capsys.readouterr().out


@pytest.mark.parametrize("key", ["model", "state_dict"])
def test_state_dict_under_other_keys(through_files, checkpoint, settings, key):
    expected = through_files(checkpoint, settings)[0].fingerprint
    assert (
        through_files({key: checkpoint["model_state_dict"], "opt": {}}, settings)[0].fingerprint
        == expected
    )


def test_bare_state_dict_and_prefixes(through_files, checkpoint, settings):
    expected = through_files(checkpoint, settings)[0].fingerprint
    state = checkpoint["model_state_dict"]
    assert through_files(dict(state), settings)[0].fingerprint == expected
    for prefix in ("module.", "_orig_mod.", "_orig_mod.module.", "model.", "module.model."):
        prefixed = checkpoint | {"model_state_dict": {prefix + k: v for k, v in state.items()}}
        assert through_files(prefixed, settings)[0].fingerprint == expected


def under(prefix: str, state: dict) -> dict:
    return {f"{prefix}{key}": tensor for key, tensor in state.items()}


def test_model_in_a_larger_one_is_found(through_files, checkpoint, settings):
    """As in checkpoints of Lightning, with any name of the attribute, and of AveragedModel."""
    expected = through_files(checkpoint, settings)[0].fingerprint
    state = checkpoint["model_state_dict"]
    lightning = {"hyper_parameters": {"lr": 1e-3}, "epoch": 3, "optimizer_states": []}
    content = lightning | {"state_dict": under("net.", state)}
    assert through_files(content, settings)[0].fingerprint == expected
    content["state_dict"]["loss.weight"] = torch.ones(2)
    with pytest.warns(UserWarning, match=r"only 'net.' of \S+ is converted, without 'loss.weight'"):
        assert through_files(content, settings)[0].fingerprint == expected
    content["state_dict"] = under("student.", state) | under("teacher.", state)
    with pytest.raises(UserError, match=r"several PatchTSTs \('student.', 'teacher.'\)"):
        through_files(content, settings)
    average = under("module.", state) | {"n_averaged": torch.tensor(5)}
    with pytest.warns(UserWarning, match="without 'n_averaged'"):
        assert through_files(average, settings)[0].fingerprint == expected


def test_state_dict_of_an_average_is_not_taken_silently(through_files, checkpoint, settings):
    expected = through_files(checkpoint, settings)[0].fingerprint
    state = checkpoint["model_state_dict"]
    average = {key: torch.zeros_like(tensor) for key, tensor in state.items()}
    both = {"model": state, "ema": average}
    with pytest.warns(UserWarning, match="also contains 'ema'; only model is converted"):
        assert through_files(both, settings)[0].fingerprint == expected
    assert through_files({"ema": state, "epoch": 1}, settings)[0].fingerprint == expected
    with pytest.raises(UserError, match=r"several state dicts \('ema', 'raw'\)"):
        through_files({"ema": average, "raw": state}, settings)


def test_numpy_scalars_beside_the_weights(through_files, checkpoint, settings):
    import numpy as np

    through_files(
        checkpoint | {"train_loss": np.float64(0.5), "val_loss": np.float32(0.5)}, settings
    )


def test_all_wrong_keys_are_in_one_error(through_files, checkpoint, settings):
    state = checkpoint["model_state_dict"]
    del state["backbone.encoder.layers.1.ff.0.bias"]
    state["backbone.extra.weight"] = torch.zeros(3)
    state["backbone.encoder.layers.2.ff.3.bias"] = torch.zeros(5)
    state["backbone.encoder.layers.2.ff.0.bias"][0] = float("nan")
    with pytest.raises(UserError) as e:
        through_files(checkpoint, settings)
    for message in (
        "nothing fills layers/1/ff_in/bias",
        "unknown key backbone.extra.weight",
        "layers.2.ff.3.bias is float32[5]",
        "layers.2.ff.0.bias contains NaN",
    ):
        assert message in str(e.value)


def test_damaged_files_are_refused(tmp_path):
    text, cut, other = tmp_path / "text.pth", tmp_path / "cut.pth", tmp_path / "other.pth"
    text.write_text("hello")
    cut.write_bytes((SOURCE / "checkpoint.pth").read_bytes()[:50_000])
    torch.save([1, 2], other)
    for path, message in (
        (text, "not a PyTorch checkpoint"),
        (cut, "not a PyTorch checkpoint"),
        (other, "contains a list"),
    ):
        with pytest.raises(UserError, match=message):
            convert_encoder(path)
    with pytest.raises(UserError, match="there is no checkpoint file"):
        convert_encoder(tmp_path / "nowhere.pth")
    torch.save({"a": torch.zeros(3)}, other)
    with pytest.raises(UserError, match=r"the state dict has no backbone.W_P.weight"):
        convert_encoder(other)


def test_failed_conversion_keeps_the_old_encoder(tmp_path, checkpoint):
    out = tmp_path / "encoder"
    main(["encoder", str(SOURCE / "checkpoint.pth"), "--out", str(out)])
    before = load_encoder(out).fingerprint
    shutil.copy(SOURCE / "config.yaml", tmp_path / "x.yaml")
    (tmp_path / "x.pth").write_text("nothing")
    with pytest.raises(UserError):
        main(["encoder", str(tmp_path / "x.pth"), "--out", str(out)])
    assert load_encoder(out).fingerprint == before


def test_foreign_folder_is_never_overwritten(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="is not a converted encoder"):
        main(["encoder", str(SOURCE / "checkpoint.pth"), "--out", str(tmp_path)])
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_float64_is_rounded_with_a_warning(through_files, checkpoint, settings):
    state = checkpoint["model_state_dict"]
    checkpoint["model_state_dict"] = {
        k: v.double() if v.is_floating_point() else v for k, v in state.items()
    }
    with pytest.warns(UserWarning, match="contains float64, which is rounded"):
        encoder, _ = through_files(checkpoint, settings)
    assert (
        encoder.fingerprint
        == convert_encoder(SOURCE / "checkpoint.pth", SOURCE / "config.yaml")[0].fingerprint
    )


def test_wrong_commands_are_refused(tmp_path):
    given = ["encoder", str(SOURCE / "checkpoint.pth")]
    main([*given, "--out", str(tmp_path / "e")])
    (tmp_path / "precious.pth").write_text("epochs of work")
    for args, message in (
        (given, "requires --out, --verify or both"),
        ([*given, "--verify", "a.npy", "b.npy"], "unexpected argument 'b.npy'"),
        (
            [*given, "--to", "pytorch", "--out", str(tmp_path / "precious.pth")],
            "is never overwritten",
        ),
        (
            ["encoder", str(tmp_path / "e"), "--out", str(tmp_path / "f")],
            "is already converted",
        ),
        (
            [
                "encoder",
                str(tmp_path / "e"),
                "--to",
                "pytorch",
                "--out",
                str(tmp_path / "f"),
                "--stride",
                "3",
            ],
            "only --to and --out apply",
        ),
        (
            [*given, "--out", str(tmp_path / "f"), "--res_attention", "maybe"],
            "must be one of true, false, got 'maybe'",
        ),
        ([*given, "--out", str(tmp_path / "f"), "--stride", "20"], "make 10 patches"),
    ):
        with pytest.raises(UserError, match=message):
            main(args)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["e", "precious.pth"]
    assert (tmp_path / "precious.pth").read_text() == "epochs of work"


def test_killed_conversion_never_looks_complete(tmp_path, monkeypatch):
    """At any write, there is no encoder, or the old one."""
    given = ["encoder", str(SOURCE / "checkpoint.pth"), "--out", str(tmp_path / "e")]

    def die(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", die)
        with pytest.raises(KeyboardInterrupt):
            main(given)
    assert list(tmp_path.iterdir()) == []
    main(given)
    (tmp_path / ".e.tmp/params").mkdir(parents=True)  # as SIGKILL leaves it
    main(given)
    assert [p.name for p in tmp_path.iterdir()] == ["e"]
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            main(
                [
                    "encoder",
                    str(tmp_path / "e"),
                    "--to",
                    "pytorch",
                    "--out",
                    str(tmp_path / "x.pth"),
                ]
            )
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
    for name in ("with_more", "alike"):
        with pytest.raises(UserError, match="is not a converted encoder"):
            main([*given, str(tmp_path / name)])
    assert sorted(tmp_path.rglob("*")) == before
    main([*given, str(tmp_path / "e")])
    assert (tmp_path / "e.tmp/thesis.tex").read_text() == "years of work"


def test_full_disk_is_one_error(tmp_path, capfd):
    """As on a full disk: no file may be longer than 1 KiB."""
    main(["encoder", str(SOURCE / "checkpoint.pth"), "--out", str(tmp_path / "e")])
    out = tmp_path / "full"
    for args in (
        ["encoder", str(SOURCE / "checkpoint.pth"), "--out", str(out)],
        ["encoder", str(tmp_path / "e"), "--to", "pytorch", "--out", str(out)],
        *(
            ["sae", str(SAE), "--to", kind, "--out", str(out)]
            for kind in ("minsae", "member", "saelens")
        ),
    ):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
        try:
            with pytest.raises(
                (UserError, OSError), match=r"File too large|could not be written|FILE_TOO_LARGE|27"
            ):
                main(args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        left = [p for p in tmp_path.iterdir() if p.name != "e"]
        assert all(p.is_dir() and not any(p.iterdir()) for p in left)
