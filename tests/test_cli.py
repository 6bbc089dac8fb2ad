"""The command lines, in the process: flags, help, and one sentence for every mistake."""

import pytest

import convert.__main__
import minsae_jax.__main__
from minsae_jax import cli
from minsae_jax.sae.config import TrainConfig


def fails(capsys, main, *args: str) -> str:
    """The one line on stderr of a command that must end with exit code 2."""
    with pytest.raises(SystemExit) as e:
        cli.run(main, list(args))
    assert e.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["fly"], "there is no verb 'fly'"),
        (["train", "--lrr", "3"], "Unrecognized options: --lrr, 3 (did you mean --lr?)"),
        (["train", "--lr", "x"], "Could not find valid parse for arguments: ['x']"),
        (["train", "--lr", "-1"], "--lr must be finite and not below 0, but is -1"),
        (["train", "--num_steps", "0"], "--num_steps must be above 0 and finite, but is 0"),
        (
            ["train", "--number_of_arrays", "2"],
            "--number_of_arrays has no meaning under --recipe april2024",
        ),
        (["train", "--recipe", "minsea"], "invalid choice 'minsea'"),
        (["train", "--config", "nowhere.yaml"], "there is no file nowhere.yaml"),
        (["train", "--config"], "--config takes one YAML file"),
        (["train", "--store", "nowhere"], "there is no store nowhere"),
        (["train", "--checkpoint_path", "nowhere"], "there is no encoder at nowhere"),
        (["extract"], "extract needs --root_path"),
        (["extract", "--root_path", "x"], "extract needs --checkpoint_path"),
        (
            ["extract", "--root_path", "x", "--checkpoint_path", "no.pth"],
            "there is no checkpoint file no.pth",
        ),
        (["extract", "--split", "tset"], "invalid choice 'tset'"),
        (["extract", "--batch_size", "0"], "--batch_size must be above 0 and finite"),
        (["demo", "--patients", "2"], "--patients must be at least 10"),
        (["plot"], "plot needs --run"),
        (["plot", "--run", "nowhere"], "nowhere is no run"),
    ],
)
def test_mistakes(capsys, monkeypatch, tmp_path, args, told):
    monkeypatch.chdir(tmp_path)
    assert told in fails(capsys, minsae_jax.__main__.main, *args)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["decoder"], "there is no 'decoder' to convert"),
        (["encoder", "no.pth", "--out", "x"], "there is no checkpoint file no.pth"),
        (["encoder", "no.pth"], "--out"),
        (
            ["encoder", "no.pth", "--out", "x", "--config_path", "no.yaml"],
            "there is no file no.yaml",
        ),
        (["sae", "no.pt", "--to", "member", "--out", "x"], "there is no autoencoder no.pt"),
        (["sae", "no.pt", "--to", "keras", "--out", "x"], "invalid choice 'keras'"),
    ],
)
def test_mistakes_of_convert(capsys, monkeypatch, tmp_path, args, told):
    monkeypatch.chdir(tmp_path)
    assert told in fails(capsys, convert.__main__.main, *args)


def test_debug_shows_the_traceback(capsys):
    with pytest.raises(SystemExit):
        cli.run(minsae_jax.__main__.main, ["fly", "--debug"])
    assert "Traceback" in capsys.readouterr().err


def test_a_bug_is_not_dressed_up_as_a_mistake():
    def broken(args):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        cli.run(broken, [])


@pytest.mark.parametrize(
    "args", [["train", "--help"], ["extract", "-h"], ["demo", "--help"], ["plot", "--help"]]
)
def test_help(capsys, args):
    with pytest.raises(SystemExit) as e:
        cli.run(minsae_jax.__main__.main, args)
    assert e.value.code == 0
    assert f"usage: minsae {args[0]}" in capsys.readouterr().out


def test_overview(capsys):
    for main in (minsae_jax.__main__.main, convert.__main__.main):
        cli.run(main, [])
        cli.run(main, ["--help"])
    assert "verbs:" in capsys.readouterr().out


def test_dashes_and_underscores_are_alike():
    one = cli.parse(
        TrainConfig, ["--lambda-sparsity", "1", "2", "--num-steps", "5", "--no-overwrite"], "x"
    )
    other = cli.parse(TrainConfig, ["--lambda_sparsity", "1", "2", "--num_steps=5"], "x")
    assert one == other == TrainConfig(lambda_sparsity=(1.0, 2.0), num_steps=5)


def test_flags_override_the_file(tmp_path):
    (tmp_path / "x.yaml").write_text("train: {lr: 1e-4, num_steps: 7}")
    for config in (["--config", str(tmp_path / "x.yaml")], [f"--config={tmp_path / 'x.yaml'}"]):
        settings = minsae_jax.__main__._settings(
            TrainConfig, "train", [*config, "--num_steps", "9"]
        )
        assert (settings.lr, settings.num_steps) == ((1e-4,), 9)


def test_the_disks_refusals_are_one_sentence_too(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    out = str(tmp_path / "file" / "below")
    assert "Not a directory" in fails(capsys, minsae_jax.__main__.main, "demo", "--root_path", out)

    def full(args):
        raise OSError(28, "No space left on device")

    assert fails(capsys, full) == "error: No space left on device"
