"""Command lines, called in this process: flags, help, and one line for every error."""

import re
import subprocess
import sys
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import pytest

import convert.__main__
import minsae_jax.__main__
from minsae_jax import cli
from minsae_jax.cli.flags import arguments_of
from minsae_jax.cli.help_text import help_texts
from minsae_jax.encoder.config import ExtractConfig
from minsae_jax.errors import UserError
from minsae_jax.sae.config import TrainConfig
from minsae_jax.settings import AtLeastOne, missing_settings

SECTIONS = {name: verb.settings for name, verb in minsae_jax.__main__.VERBS.items()}
COMMANDS = [
    (module.main, prog, name, verb)
    for module, prog in ((minsae_jax.__main__, "minsae"), (convert.__main__, "python -m convert"))
    for name, verb in module.VERBS.items()
]


def error_of(capsys, main, *args: str) -> str:
    """Return the only line on stderr of a command that must exit with code 2."""
    with pytest.raises(SystemExit) as e:
        cli.run(main, list(args))
    assert e.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def help_of(capsys, main, *args: str) -> str:
    with pytest.raises(SystemExit) as e:
        cli.run(main, list(args))
    assert e.value.code == 0
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["fly"],
            "unknown verb 'fly'; choose from demo, prepare, extract, train, evaluate, steer, view",
        ),
        (["trian"], "unknown verb 'trian'; did you mean 'train'?"),
        (["train", "--lrr", "3"], "unknown flag --lrr; did you mean '--lr'?"),
        (["train", "--lamda", "3"], "unknown flag --lamda; did you mean '--lambda_sparsity'?"),
        (["train", "--lamda=3"], "unknown flag --lamda; did you mean '--lambda_sparsity'?"),
        (["train", "--num", "3"], "unknown flag --num"),  # no abbreviations
        (["train", "3"], "unexpected argument '3' (see minsae train --help)"),
        (["train", "--layer", "0", "-1"], "unexpected argument '-1' (see minsae train --help)"),
        (["train", "--k", "4,8"], "separated by spaces (4 8) or, in YAML, be a list ([4, 8])"),
        (["train", "--lr", "x"], "lr must be a number or auto, got 'x'"),
        (["train", "--d_sae", "64"], "--d_sae; did you mean '--feature_dim_factor'?"),
        (["train", "--learning-rate", "1"], "did you mean '--lr'?"),
        (["train", "--lr", "atuo"], "or auto, got 'atuo'; did you mean 'auto'?"),
        (["train", "--lr", "-1e-3"], "--lr must be"),
        (["train", "--lr", "auto", "auto"], "--lr contains duplicate values: auto auto"),
        (["train", "--lr"], "--lr: expected at least one argument"),
        (["train", "--live=yes"], "--live/--no_live: ignored explicit argument 'yes'"),
        (["train", "--num_steps", "0"], "--num_steps must be"),
        (["train", "--num_steps", "1.5"], "num_steps must be a whole number, got 1.5"),
        (["train", "--number_of_arrays", "2"], "--number_of_arrays"),
        (["train", "--recipe", "minsea"], "got 'minsea'; did you mean 'minsae'?"),
        (["train", "--config", "nowhere.yaml"], "file nowhere.yaml does not exist"),
        (["train", "--config"], "--config: expected one argument"),
        (["train", "--config", "a.yaml", "--config=b.yaml"], "--config takes one file"),
        (["train", "--store", "nowhere"], "nowhere"),
        (["train", "--checkpoint_path", "nowhere"], "nowhere"),
        (["extract", "--root_path", "x", "--checkpoint_path", "no.pth"], "no.pth"),
        (["extract", "--root_path", "x"], "extract requires --checkpoint_path or --model"),
        (["extract", "--root_path", "x", "--model", "LaBraM"], "--model must be braindecode:NAME"),
        (["extract", "--split", "tset"], "got 'tset'; did you mean 'test'?"),
        (["extract", "--batch_size", "0"], "batch_size"),
        (["prepare", "nowhere", "--out", "x"], "there is no file, folder or match of nowhere"),
        (["prepare", "--out", "x"], "minsae prepare requires SOURCE"),
        (["prepare", "x", "--out", "x", "--on_missing", "skp"], "did you mean 'skip'?"),
        (["demo", "--patients", "2"], "--patients must be"),
        (["plot", "--run", "nowhere"], "nowhere"),
        (["evaluate", "--run", "nowhere", "--root_path", "x"], "nowhere"),
        (["steer", "--run", "x", "--root_path", "x"], "minsae steer requires --feature"),
        (["steer", "--run", "nowhere", "--root_path", "x", "--feature", "1"], "nowhere"),
        (["steer", "--feature", "1", "--scale", "x"], "scale must be a number, got 'x'"),
        (["steer", "--feature", "one"], "feature must be a whole number, got 'one'"),
    ],
)
def test_mistake_is_one_line(capsys, monkeypatch, tmp_path, args, message):
    monkeypatch.chdir(tmp_path)
    if args[0] == "steer" and "--run" not in args:
        args = [*args, "--run", "x", "--root_path", "x"]
    if args[0] == "extract" and "--root_path" not in args:
        args = [*args, "--root_path", "x", "--checkpoint_path", "y"]
    assert message in error_of(capsys, minsae_jax.__main__.main, *args)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["encodr"], "unknown verb 'encodr'; did you mean 'encoder'?"),
        (["encoder"], "python -m convert encoder requires SOURCE"),
        (["sae", "no.pt"], "python -m convert sae requires --to and --out"),
        (["encoder", "no.pth", "--out", "x"], "no.pth"),
        (["encoder", "no.pth"], "requires --out, --verify or both"),
        (["encoder", "no.pth", "--out", "x", "--config_path", "no.yaml"], "no.yaml does not exist"),
        (["encoder", "no.pth", "--config", "x"], "unknown flag --config"),
        (["sae", "no.pt", "--to", "member", "--out", "x"], "no.pt"),
        (["sae", "no.pt", "--to", "keras", "--out", "x"], "to must be one of member, minsae"),
    ],
)
def test_mistake_of_convert_is_one_line(capsys, monkeypatch, tmp_path, args, message):
    monkeypatch.chdir(tmp_path)
    assert message in error_of(capsys, convert.__main__.main, *args)


def test_debug_shows_traceback(capsys):
    with pytest.raises(SystemExit) as e:
        cli.run(minsae_jax.__main__.main, ["fly", "--debug"])
    assert e.value.code == 2
    assert "Traceback" in capsys.readouterr().err


def test_bug_is_not_reported_as_user_error():
    def broken(args):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        cli.run(broken, [])


def test_system_errors_are_one_line(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    out = str(tmp_path / "file" / "below")
    message = error_of(capsys, minsae_jax.__main__.main, "demo", "--root_path", out)
    assert "Not a directory" in message

    def full(args):
        raise OSError(28, "No space left on device")

    assert error_of(capsys, full) == "error: No space left on device"


def test_out_of_memory_is_one_line(capsys):
    def too_large(args):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes\n  by allocator")

    assert "out of memory" in error_of(capsys, too_large)


THREAD_THAT_NEVER_ENDS = """
import threading
from minsae_jax.cli import process
from minsae_jax.errors import UserError

def main(args):
    threading.Thread(target=threading.Event().wait).start()
    print("printed before")
    raise UserError("message")

process.EXIT_SECONDS = 0.1
process.run(main, [])
"""


def test_thread_that_never_ends_does_not_keep_a_failed_command():
    command = [sys.executable, "-c", THREAD_THAT_NEVER_ENDS]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stderr) == (2, "error: message\n")
    assert result.stdout == "printed before\n"


def test_interrupt_exits_with_130(capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as e:
        cli.run(interrupted, [])
    assert e.value.code == 130
    assert capsys.readouterr().err == "interrupted; rerun the same command to resume\n"


INTERRUPTED_IMPORT = """
import runpy, signal, sys

program, module, *arguments = sys.argv[1:]
# A shell that runs the tests in the background may have it ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
sys.argv = [program, *arguments]
runpy.run_module(program, run_name="__main__")
"""


@pytest.mark.parametrize(
    "words",
    [
        ("minsae_jax", "minsae_jax.api", "--help"),
        ("minsae_jax", "jax", "extract", "--root_path", "recordings", "--out", "store"),
        ("convert", "convert.verify", "--help"),
    ],
)
def test_interrupt_during_imports_is_one_line(words):
    command = [sys.executable, "-c", INTERRUPTED_IMPORT, *words]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stdout) == (130, "")
    assert result.stderr == "interrupted; rerun the same command to resume\n"


@pytest.mark.parametrize(("main", "prog", "name", "verb"), COMMANDS)
def test_help_explains_every_setting_and_default_once(capsys, main, prog, name, verb):
    text = help_of(capsys, main, name, "--help")
    assert f"usage: {prog} {name}" in text
    assert text == help_of(capsys, main, name, "-h")
    assert "%%" not in text
    for field, explanation in help_texts(verb.settings).items():
        assert explanation, field
        assert field in text or field.upper() in text
    assert not re.search(r"\(default[^()]*\)[. ]*\(default", text)
    assert "(default: )" not in text
    assert "none)" not in text.lower()


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A class whose docstring is not shown."""

    heading: ClassVar[str] = "Recordings to read"

    root_path: str
    """Folder of the recordings."""
    layers: tuple[int | Literal["all"], ...] = (-1,)
    """Layers, from 0,
    or all."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """Another class."""

    heading: ClassVar[str] = "Optimisation"

    lr: tuple[float, ...] = ()
    """Learning rate (default: 5e-5; minsae 1e-3)"""
    num_steps: Annotated[int | None, AtLeastOne] = None
    """Number of steps"""


@dataclass(frozen=True, kw_only=True)
class Example(Training, Reading):
    """Settings made of topics."""

    share: float = 0.05
    """Share, in 0 to 100 %"""
    bands: tuple[str, ...] = ("alpha 8-13", "beta")
    """Bands"""
    live: bool = False
    """Without a store"""


def parse_example(*args: str, tmp_path=None, text: str = "") -> Example:
    if text:
        (tmp_path / "x.yaml").write_text(text)
        args = (*args, "--config", str(tmp_path / "x.yaml"))
    return cli.parse(Example, args, "minsae read", "", {"read": Example}, "read")


def test_help_is_grouped_by_topic_with_one_default(capsys):
    with pytest.raises(SystemExit):
        parse_example("--help")
    text = capsys.readouterr().out
    groups = [line for line in text.splitlines() if line.endswith(":") and line[0] != " "]
    assert groups == ["Recordings to read:", "Optimisation:", "Settings:", "General:"]
    text = " ".join(text.split())
    for line in (
        "--root_path TEXT Folder of the recordings (required)",
        "--layers INT|all [INT|all ...] Layers, from 0, or all (default: -1)",
        "--lr FLOAT [FLOAT ...] Learning rate (default: 5e-5; minsae 1e-3) --num_steps",
        "--num_steps INT Number of steps Settings:",
        "--share FLOAT Share, in 0 to 100 % (default: 0.05)",
        '--bands TEXT [TEXT ...] Bands (default: "alpha 8-13" beta)',
        "--live, --no_live Without a store (default: false)",
    ):
        assert line in text


def test_help_shows_values_of_the_config_file(capsys, tmp_path):
    with pytest.raises(SystemExit):
        parse_example("-h", tmp_path=tmp_path, text="read: {lr: [1e-4, 2], root_path: data}")
    text = " ".join(capsys.readouterr().out.split())
    assert "Learning rate (x.yaml: 0.0001 2) --num_steps" in text
    assert "Folder of the recordings (x.yaml: data)" in text


def test_required_setting_comes_from_flag_or_config(tmp_path):
    assert parse_example("--root_path", "a").root_path == "a"
    assert parse_example(tmp_path=tmp_path, text="read: {root_path: b}").root_path == "b"
    with pytest.raises(UserError) as e:
        parse_example(tmp_path=tmp_path, text="read: {live: true}")
    where = "(as a flag or in section read of --config)"
    assert str(e.value) == f"minsae read requires --root_path {where}"


def test_every_verb_names_its_required_settings():
    for name, cls in SECTIONS.items():
        required = missing_settings(cls, {})
        if required:
            with pytest.raises(UserError) as e:
                cli.parse(cls, [], f"minsae {name}", "", SECTIONS, name)
            written = {argument.name: argument.written for argument in arguments_of(cls)}
            assert all(written[setting] in str(e.value) for setting in required)


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        (["--num_steps", "1e4"], "num_steps", 10_000),
        (["--num-steps", "12345678901234567"], "num_steps", 12_345_678_901_234_567),
        (["--layers", "-1", "0"], "layers", (-1, 0)),
        (["--layers", "all"], "layers", ("all",)),
        (["--lr", "-1e-3", "-.5", "2"], "lr", (-1e-3, -0.5, 2.0)),
        (["--root-path", "-1"], "root_path", "-1"),
        (["--live"], "live", True),
        (["--live", "--no-live"], "live", False),
        (["--share=1", "--share", "2"], "share", 2.0),  # the last one counts
    ],
)
def test_words_become_values(words, field, value):
    result = getattr(parse_example("--root_path", "x", *words), field)
    assert result == value
    assert type(result) is type(value)


def test_flag_without_value_and_positional():
    @dataclass(frozen=True, kw_only=True)
    class Command:
        path: Annotated[str, cli.Flag(positional=True)]
        """Path"""
        verify: Annotated[str | None, cli.Flag(bare="noise")] = None
        """Verify"""

    assert cli.parse(Command, ["x"], "c") == Command(path="x")
    assert cli.parse(Command, ["x", "--verify"], "c").verify == "noise"
    assert cli.parse(Command, ["--verify", "a.npy", "x"], "c") == Command(path="x", verify="a.npy")


def test_positional_with_several_values():
    @dataclass(frozen=True, kw_only=True)
    class Command:
        paths: Annotated[tuple[str, ...], cli.Flag(positional=True)]
        """Paths"""
        out: str = ""
        """Output"""

    for words in (["a", "b", "--out", "c"], ["--out", "c", "a", "b"]):
        assert cli.parse(Command, words, "c") == Command(paths=("a", "b"), out="c")
    with pytest.raises(UserError, match="c requires PATHS"):
        cli.parse(Command, ["--out", "c"], "c")


def test_overview_lists_verbs(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for module in (minsae_jax.__main__, convert.__main__):
        for args in ([], ["--help"], ["-h"]):
            with pytest.raises(SystemExit) as exited:
                cli.run(module.main, args)
            assert not exited.value.code
            out = capsys.readouterr().out
            for name in module.VERBS:
                assert re.search(rf"^  {name} +\S", out, flags=re.M)
            verbs = out.partition("verbs:")[2]
            assert max(map(len, verbs.splitlines())) < 80


def test_version(capsys):
    cli.run(minsae_jax.__main__.main, ["--version"])
    assert capsys.readouterr().out == f"minsae_jax {minsae_jax.__version__}\n"


def test_dashes_and_underscores_are_the_same():
    words = ["--lambda-sparsity", "1", "2", "--num-steps", "5", "--no-overwrite"]
    one = cli.parse(TrainConfig, words, "x")
    other = cli.parse(TrainConfig, ["--lambda_sparsity", "1", "2", "--num_steps=5"], "x")
    assert one == other == TrainConfig(lambda_sparsity=(1.0, 2.0), num_steps=5)


def test_alias_is_the_same_flag():
    for name in ("--layer", "--cache_layer"):
        config = cli.parse(ExtractConfig, ["--root_path", "x", name, "5", "-1"], "x")
        assert config.cache_layer == (5, -1)
        assert cli.parse(TrainConfig, [name, "-2"], "x").cache_layer == -2


def test_flag_that_is_given_twice_is_a_warning():
    with pytest.warns(UserWarning, match="--lr is given twice, and only 1e-4 2e-4 is used"):
        config = cli.parse(TrainConfig, ["--lr=1e-3", "--lr", "1e-4", "2e-4"], "x")
    assert config.lr == (1e-4, 2e-4)


@pytest.mark.parametrize("joined", [False, True])
def test_flags_override_the_config_file(tmp_path, joined):
    path = tmp_path / "x.yaml"
    path.write_text("train: {lr: 1e-4, num_steps: 7}\nextract: {batch_size: 4}")
    config = [f"--config={path}"] if joined else ["--config", str(path)]
    args = [*config, "--num_steps", "9"]
    settings = cli.parse(TrainConfig, args, "minsae train", "", SECTIONS, "train")
    assert (settings.lr, settings.num_steps) == ((1e-4,), 9)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--kind", "relu"], "--k requires --kind topk or batchtopk or matryoshka ({path} sets k)"),
        (
            ["--recipe", "minsae"],
            "--batch_size requires --recipe april2024 or modern ({path} sets batch_size)",
        ),
        (["--kind", "relu", "--k", "8"], "--k requires --kind topk or batchtopk or matryoshka"),
        (["--lr", "1", "1"], "--lr contains duplicate values: 1.0 1.0"),
    ],
)
def test_contradiction_names_the_file_of_a_setting_that_is_not_a_flag(tmp_path, words, message):
    path = tmp_path / "x.yaml"
    path.write_text("train: {kind: topk, k: [4, 8], batch_size: 64, lr: 1e-4}")
    with pytest.raises(UserError) as e:
        cli.parse(TrainConfig, ["--config", str(path), *words], "x", "", SECTIONS, "train")
    assert str(e.value) == message.format(path=path)
