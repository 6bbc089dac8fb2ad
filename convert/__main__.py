"""Conversion of encoders and SAEs: `python -m convert encoder`, `randomize` and `sae`."""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from minsae_jax.interrupts import exit_during_imports

exit_during_imports()

from convert import verify
from convert.encoder import convert, describe, read_source
from convert.patchtst.weights import write_pytorch
from convert.sae import Format, convert_sae
from minsae_jax import cli
from minsae_jax.eeg.description import read_description
from minsae_jax.eeg.recordings import recordings_folder
from minsae_jax.encoder.converted import is_encoder, load_encoder, load_source, save_encoder
from minsae_jax.encoder.random_weights import (
    has_batch_norm,
    windows_for_averages,
    with_random_weights,
)
from minsae_jax.errors import UserError
from minsae_jax.settings import Seed, check_settings

ABOUT = """
Convert weights between PyTorch and minsae_jax.

  python -m convert encoder SOURCE [--config_path YAML] --out DIR   PyTorch to Flax
  python -m convert encoder DIR --to pytorch --out PATH             and back
  python -m convert randomize SOURCE --out DIR                      random weights, for a control
  python -m convert sae PATH --to member|minsae|saelens|dictionary_learning --out PATH

`python -m convert VERB --help` shows the flags; docs/convert.md describes the formats.
"""
NOISE = "noise"
BRAINDECODE = "braindecode:"
Choice = Literal["true", "false"]  # a switch that can also be left to the checkpoint


@dataclass(frozen=True, kw_only=True)
class ConversionFlags:
    """Source, target and options of a conversion."""

    heading: ClassVar[str] = "Conversion"

    source: Annotated[str, cli.Flag(positional=True)]
    """A .pth file, a folder of transformers or Braindecode, or a converted encoder (with --to
    pytorch)"""
    out: str | None = None
    """Folder (flax) or file (pytorch) to write; may be missing with --verify"""
    to: Literal["flax", "pytorch"] = "flax"
    """flax: an encoder for minsae; pytorch: the state dict of gPatchTST"""
    config_path: str | None = None
    """YAML file with the encoder's settings"""
    program: Literal["auto", "gpatchtst", "supervised"] = "auto"
    """Program that wrote the file: gpatchtst (also the official self-supervised one) or the
    official supervised one; auto picks supervised for bare state dicts under `model.` whose head
    reads all patches"""
    without_head: bool = False
    """Leave out the head"""
    verify: Annotated[str | None, cli.Flag(bare=NOISE)] = None
    """Compare every layer with PyTorch on a recording (.npy, [time, channels]) or, without one, on
    white noise; if they differ by over 1e-4, write nothing and exit with code 1"""


@dataclass(frozen=True, kw_only=True)
class ArchitectureFlags:
    """Settings of a PatchTST or CBraMod; None if weights, YAML or checkpoint decide."""

    heading: ClassVar[str] = (
        "Settings that the weights do not determine; they override the YAML and the checkpoint"
    )

    n_vars: int | None = None
    """Number of channels"""
    seq_len: int | None = None
    """Samples of a window"""
    stride: int | None = None
    """Samples from one patch to the next"""
    n_heads: int | None = None
    """Attention heads; only needed if the scale of the scores was trained"""
    activation: Literal["relu", "gelu"] | None = None
    """Activation function of the feed-forward layers"""
    res_attention: Choice | None = None
    """Add the attention scores of the layer before"""
    pre_norm: Choice | None = None
    """Normalise before attention and feed-forward layers instead of after them"""
    revin: Choice | None = None
    """Apply RevIN to the windows"""
    revin_eps: float | None = None
    """Added to RevIN's variance"""
    subtract_last: Choice | None = None
    """Let RevIN subtract the last sample instead of the mean (official supervised program)"""
    head_type: Literal["pretrain", "prediction", "regression", "classification"] | None = None
    """Type of the head, if its shape does not determine it"""


@dataclass(frozen=True, kw_only=True)
class EncoderCommand(ArchitectureFlags, ConversionFlags):
    """Flags of `python -m convert encoder`."""

    def architecture_settings(self) -> dict[str, object]:
        """Return the settings of the architecture that were given as flags."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(ArchitectureFlags)}
        bools = {"true": True, "false": False}
        return {name: bools.get(v, v) for name, v in values.items() if v is not None}


@dataclass(frozen=True, kw_only=True)
class RandomizeCommand:
    """Flags of `python -m convert randomize`."""

    source: Annotated[str, cli.Flag(positional=True)]
    """Folder of a converted encoder, or a model of Braindecode such as braindecode:LaBraM"""
    out: str
    """Folder to write; for a model of Braindecode it is the --checkpoint_path of minsae extract"""
    root_path: str | None = None
    """Folder of the recordings; required by models of Braindecode, for the names of their channels,
    and by encoders with BatchNorm, whose averages become those of the train patients"""
    checkpoint_path: str | None = None
    """Weights of a model of Braindecode, as for minsae extract"""
    seed: Annotated[int, Seed] = 0
    """Seed of the permutations"""

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, kw_only=True)
class SaeCommand:
    """Flags of `python -m convert sae`."""

    path: Annotated[str, cli.Flag(positional=True)]
    """Folder of a member, .pt file of minSAE or dictionary_learning, or folder of SAELens"""
    to: Format
    """Format to write"""
    out: str
    """Folder (member, saelens) or file (minsae, dictionary_learning) to write"""


def encoder(command: EncoderCommand) -> None:
    """Convert a PyTorch PatchTST or CBraMod into a Flax encoder, or a PatchTST back to PyTorch."""
    if command.out is None and command.verify is None:
        raise UserError("requires --out, --verify or both")
    source = Path(command.source)
    if is_encoder(source):
        _export_encoder(command, source)
        return
    opened = read_source(
        source,
        command.config_path,
        command.architecture_settings(),
        None if command.program == "auto" else command.program,
        command.without_head,
    )
    converted, notes = convert(opened)
    print(describe(opened, converted))
    if command.verify is not None:
        recording = None if command.verify == NOISE else command.verify
        windows = verify.read_windows(converted, recording)
        differences = verify.verify(converted, opened.checkpoint.tensors, windows)
        print(verify.report(differences))
        if not all(d.passes for d in differences):
            message = f"Flax and PyTorch differ by over {verify.TOLERANCE}; nothing is written"
            print(f"error: {message}", file=sys.stderr)
            sys.exit(1)
    if command.out is None:
        return
    if command.to == "flax":
        save_encoder(command.out, converted, notes)
    else:
        write_pytorch(Path(command.out), converted, notes)
    print(f"written to {command.out}")


def _export_encoder(command: EncoderCommand, folder: Path) -> None:
    """Write a converted encoder as PyTorch's state dict."""
    if command.to != "pytorch" or command.out is None:
        raise UserError(f"{folder} is already converted; export it with --to pytorch --out FILE")
    other_flags = (command.verify, command.config_path, command.without_head or None)
    if command.architecture_settings() or any(flag is not None for flag in other_flags):
        raise UserError(f"{folder} is already converted; only --to and --out apply to its export")
    write_pytorch(Path(command.out), load_encoder(folder), load_source(folder))
    print(f"written to {command.out}")


def randomize(command: RandomizeCommand) -> None:
    """Permute the weights of an encoder: the control for what it has learned (docs/evaluate.md)."""
    if command.source.startswith(BRAINDECODE):
        _randomize_braindecode(command)
        return
    if command.checkpoint_path is not None:
        raise UserError("--checkpoint_path is for models of Braindecode; SOURCE has the weights")
    folder = Path(command.source)
    trained = load_encoder(folder)
    if Path(command.out).resolve() == folder.resolve():
        raise UserError(f"--out must be another folder than {folder}, which would be replaced")
    windows = None
    if has_batch_norm(trained):
        if command.root_path is None:
            raise UserError(f"{folder} has BatchNorm, whose averages require --root_path")
        windows = windows_for_averages(command.root_path, trained)
    random = with_random_weights(trained, windows, command.seed)
    weights = f"permutation of {trained.fingerprint[:12]} with seed {command.seed}"
    origin = load_source(folder)
    sources = {**origin.sources, "weights": weights}
    save_encoder(command.out, random, dataclasses.replace(origin, sources=sources))
    _print_random_weights(command, trained.fingerprint, random.fingerprint)


def _randomize_braindecode(command: RandomizeCommand) -> None:
    """Write a model of Braindecode with permuted weights, as its `save_pretrained` does."""
    from convert.braindecode import load_braindecode, save_random_weights

    if command.root_path is None:
        raise UserError("models of Braindecode require --root_path, for the names of the channels")
    channels = read_description(recordings_folder(Path(command.root_path))).channels
    name = command.source.removeprefix(BRAINDECODE)
    trained = load_braindecode(name, command.checkpoint_path, channels)
    random = save_random_weights(trained, Path(command.out), command.seed)
    _print_random_weights(command, trained.fingerprint, random)


def _print_random_weights(command: RandomizeCommand, trained: str, random: str) -> None:
    print(f"weights: permutation of {trained[:12]} with seed {command.seed}")
    print(f"fingerprint {random[:12]}, written to {command.out}")


def sae(command: SaeCommand) -> None:
    """Convert a sparse autoencoder between file formats; the format of PATH is detected."""
    converted = convert_sae(command.path, command.to, command.out)
    print(
        f"{converted.kind} autoencoder with d_model {converted.d_model}, d_sae {converted.d_sae}, "
        f"read as {converted.source_format}, written as {converted.format} to {command.out}"
    )


VERBS = {
    "encoder": cli.Verb(EncoderCommand, encoder),
    "randomize": cli.Verb(RandomizeCommand, randomize),
    "sae": cli.Verb(SaeCommand, sae),
}


def main(args: list[str]) -> None:
    run, command = cli.parse_verb(VERBS, args, "python -m convert", ABOUT, has_config=False)
    run(command)


if __name__ == "__main__":
    cli.run(main)
