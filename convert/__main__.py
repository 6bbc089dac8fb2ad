"""PyTorch in and out.

    python -m convert encoder CHECKPOINT [--config_path YAML] --out DIR
    python -m convert sae PATH --to member|minsae --out PATH

`encoder --help` and `sae --help` tell more.
"""

from dataclasses import dataclass
from typing import Literal

import tyro

from convert.encoder import convert_encoder, describe
from convert.sae import convert_sae
from minsae_jax import cli
from minsae_jax.config import UserError
from minsae_jax.encoder.converted import save_encoder


@dataclass(frozen=True)
class EncoderCommand:
    """Convert a PyTorch PatchTST checkpoint into a Flax encoder."""

    checkpoint: tyro.conf.Positional[str]
    """The .pth file."""
    out: str
    """Folder to write."""
    config_path: str | None = None
    """The encoder's YAML; not needed where the checkpoint carries its own config."""


@dataclass(frozen=True)
class SaeCommand:
    """Convert a sparse autoencoder: a member of a run, or a state dict of minSAE. What PATH is, its content says."""

    path: tyro.conf.Positional[str]
    """A member's folder, or a minSAE .pt file."""
    to: Literal["member", "minsae"]
    """What to write."""
    out: str
    """Folder (member) or file (minsae) to write."""


def main(args: list[str]) -> None:
    if not args or args[0] in ("-h", "--help"):
        print(__doc__)
    elif args[0] == "encoder":
        command = cli.parse(EncoderCommand, args[1:], "python -m convert encoder")
        encoder, notes = convert_encoder(command.checkpoint, command.config_path)
        save_encoder(command.out, encoder, notes)
        print(f"{describe(encoder, notes)}\nwritten to {command.out}")
    elif args[0] == "sae":
        sae_command = cli.parse(SaeCommand, args[1:], "python -m convert sae")
        print(convert_sae(sae_command.path, sae_command.to, sae_command.out))
    else:
        raise UserError(f"there is no {args[0]!r} to convert: it is encoder or sae")


if __name__ == "__main__":
    cli.run(main)
