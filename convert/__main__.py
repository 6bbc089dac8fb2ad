"""PyTorch in and out.

    python -m convert encoder SOURCE [--config_path YAML] --out DIR    a checkpoint, or a folder of transformers
    python -m convert encoder DIR --to pytorch --out PATH              and back
    python -m convert sae PATH --to member|minsae|saelens|dictionary_learning --out PATH

`encoder --help` and `sae --help` tell more, and docs/convert.md what is read from where.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from convert import verify
from convert.encoder import convert, describe, read_source, write_pytorch
from convert.sae import Kind, convert_sae
from minsae_jax import cli
from minsae_jax.encoder.converted import is_encoder, load_encoder, load_source, save_encoder
from minsae_jax.errors import UserError

# None: the flag was not given; (): it was, without a recording.
Recording = Annotated[
    tuple[str, ...] | None,
    PrimitiveConstructorSpec(
        nargs="*",
        metavar="[RECORDING]",
        instance_from_str=tuple,
        is_instance=lambda value: value is None or isinstance(value, tuple),
        str_from_instance=lambda value: ["no"] if value is None else list(value),
    ),
]


@dataclass(frozen=True)
class EncoderCommand:
    """Convert a PyTorch PatchTST into a Flax encoder, or an encoder back into gPatchTST's state dict. Settings that the
    weights do not tell come from flags, else from the YAML, else from the source's own config."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """A .pth file, a folder of transformers, or a converted encoder (--to pytorch)."""
    out: str | None = None
    """Folder (flax) or file (pytorch) to write; without it nothing is written, which makes sense with --verify."""
    to: Literal["flax", "pytorch"] = "flax"
    """What to write: our encoder, or gPatchTST's state dict."""
    config_path: str | None = None
    """The encoder's YAML."""
    program: Literal["auto", "gpatchtst", "supervised"] = "auto"
    """Which program's rules hold: gpatchtst (also the official self-supervised one), or the official supervised one,
    which is taken for granted (auto) for a bare state dict under `model.` whose head reads all patches."""
    without_head: bool = False
    """Leave the head out, for activations alone."""
    verify: Recording = None
    """Hold every layer against plain torch on the PyTorch weights, on windows of a recording (.npy, [time, channels] in
    SD) or, without one, on white noise. Ends with exit code 1, and writes nothing, where they differ by over 1e-4."""

    n_vars: int | None = None
    """Number of channels."""
    seq_len: int | None = None
    """Length of a window, in samples."""
    stride: int | None = None
    """Samples from one patch to the next."""
    n_heads: int | None = None
    """Attention heads: needed only where their scale was trained."""
    activation: Literal["relu", "gelu"] | None = None
    """Of the feed-forward branch."""
    res_attention: Literal["true", "false"] | None = None
    """Whether attention scores are handed on from layer to layer."""
    pre_norm: Literal["true", "false"] | None = None
    """Whether normalisation precedes each branch."""
    revin: Literal["true", "false"] | None = None
    """Whether RevIN is applied to the windows."""
    revin_eps: float | None = None
    """Added to RevIN's variance."""
    subtract_last: Literal["true", "false"] | None = None
    """Whether RevIN takes away the window's last sample instead of its mean (official supervised program)."""
    head_type: Literal["pretrain", "prediction", "regression", "classification"] | None = None
    """The head, where its shape leaves it open."""

    def settings(self) -> dict[str, Any]:
        """What the flags say of the architecture."""
        names = (
            "n_vars", "seq_len", "stride", "n_heads", "activation", "res_attention", "pre_norm", "revin", "revin_eps",
            "subtract_last", "head_type",
        )  # fmt: skip
        said = {name: getattr(self, name) for name in names}
        return {
            name: {"true": True, "false": False}.get(v, v)
            for name, v in said.items()
            if v is not None
        }


@dataclass(frozen=True)
class SaeCommand:
    """Convert a sparse autoencoder from any of the forms below into any other. What PATH is, its content says."""

    path: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")]
    """A member's folder, a .pt file of minSAE or dictionary_learning, or a folder of SAELens."""
    to: Kind
    """What to write."""
    out: str
    """Folder (member, saelens) or file (minsae, dictionary_learning) to write."""


def encoder(command: EncoderCommand) -> None:
    if command.out is None and command.verify is None:
        raise UserError("say what to write with --out, or --verify")
    if command.verify is not None and len(command.verify) > 1:
        raise UserError(f"--verify takes one recording, not {len(command.verify)}")
    source = Path(command.source)
    if is_encoder(source):
        return _write_back(command, source)
    opened = read_source(
        source, command.config_path, command.settings(), None if command.program == "auto" else command.program,
        command.without_head,
    )  # fmt: skip
    converted, notes = convert(opened)
    print(describe(opened, converted))
    if command.verify is not None:
        windows = verify.read_windows(converted, *(command.verify or (None,)))
        differences = verify.verify(converted, opened.checkpoint.tensors, windows)
        print(verify.report(differences))
        if not all(d.passes for d in differences):
            print(
                f"error: Flax and torch differ by over {verify.TOLERANCE}: nothing is written",
                file=sys.stderr,
            )
            sys.exit(1)
    if command.out is None:
        return
    if command.to == "flax":
        save_encoder(command.out, converted, notes)
    else:
        write_pytorch(Path(command.out), converted, notes)
    print(f"written to {command.out}")


def _write_back(command: EncoderCommand, folder: Path) -> None:
    if command.to != "pytorch" or command.out is None:
        raise UserError(
            f"{folder} is a converted encoder already: --to pytorch --out FILE gives it back"
        )
    if (
        command.verify is not None
        or command.settings()
        or command.config_path
        or command.without_head
    ):
        raise UserError(
            f"{folder} is given back as it is: --to and --out are all that can be said of it"
        )
    write_pytorch(Path(command.out), load_encoder(folder), load_source(folder))
    print(f"written to {command.out}")


def main(args: list[str]) -> None:
    if not args or args[0] in ("-h", "--help"):
        print(__doc__)
    elif args[0] == "encoder":
        encoder(cli.parse(EncoderCommand, args[1:], "python -m convert encoder"))
    elif args[0] == "sae":
        command = cli.parse(SaeCommand, args[1:], "python -m convert sae")
        sae = convert_sae(command.path, command.to, command.out)
        print(
            f"autoencoder of d_model {sae.d_model}, d_sae {sae.d_sae}, read as {sae.source_kind}, "
            f"written as {sae.kind} to {sae.path}"
        )
    else:
        raise UserError(f"there is no {args[0]!r} to convert: it is encoder or sae")


if __name__ == "__main__":
    cli.run(main)
