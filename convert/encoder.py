"""A PyTorch encoder to Flax: `python -m convert encoder SOURCE --out DIR`.

Each family of models has a module with its settings, and the table that maps its tensors to the
parameters of the Flax model: `cbramod.py`, and the folder `patchtst`.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax

from convert import cbramod
from convert.checkpoint import HALVES, Checkpoint, Program, SourceModel, load_checkpoint
from convert.patchtst import weights as patchtst
from convert.patchtst.architecture import read_source as read_patchtst
from convert.patchtst.huggingface import load_huggingface
from convert.torch_files import Tensors
from minsae_jax.encoder.base import Params
from minsae_jax.encoder.cbramod.encoder import CBraModEncoder
from minsae_jax.encoder.converted import EncoderSource
from minsae_jax.encoder.native import NativeEncoder
from minsae_jax.encoder.patchtst.encoder import PatchTSTEncoder
from minsae_jax.errors import UserError
from minsae_jax.settings import read_yaml


@dataclass(frozen=True)
class Family:
    """How the models of one family are converted.

    to_flax: (architecture, state dict) -> parameters. describe: (architecture, checkpoint) -> lines
    for the terminal.
    """

    encoder: type[NativeEncoder]
    to_flax: Callable[[Any, Tensors], Params]
    describe: Callable[[Any, Checkpoint], list[str]]


FAMILIES: dict[type, Family] = {
    patchtst.Architecture: Family(PatchTSTEncoder, patchtst.to_flax, patchtst.describe),
    cbramod.Architecture: Family(CBraModEncoder, cbramod.to_flax, cbramod.describe),
}


def read_source(
    path: str | Path,
    config_path: str | Path | None = None,
    flags: Mapping[str, Any] | None = None,
    program: Program | None = None,
    without_head: bool = False,
) -> SourceModel:
    """Read a .pth file, or a folder of transformers or Braindecode.

    flags: settings that precede those of the YAML at `config_path`. program: guessed if it is None.
    Raises UserError if file, settings or tensors are not those of a PatchTST or CBraMod.
    """
    yaml = read_yaml(config_path) if config_path else {}
    flags = flags or {}
    path = Path(path)
    checkpoint = load_huggingface(path, without_head) if path.is_dir() else load_checkpoint(path)
    if cbramod.is_cbramod(checkpoint.tensors):
        if config_path is not None or program is not None:
            raise UserError("--config_path and --program do not apply to CBraMod")
        return cbramod.read_source(checkpoint, flags, without_head)
    yaml_file = str(config_path or "")
    return read_patchtst(checkpoint, yaml, yaml_file, flags, program, without_head)


class Converted(NamedTuple):
    """A converted encoder, and the origin to save with it."""

    encoder: NativeEncoder
    source: EncoderSource


def convert(source: SourceModel) -> Converted:
    """Convert a checkpoint. Raises UserError if its tensors do not fit the architecture."""
    checkpoint = source.checkpoint
    family = FAMILIES[type(source.architecture)]
    params = family.to_flax(source.architecture, checkpoint.tensors)
    encoder = family.encoder(source.architecture, params)
    for message in source.warnings:
        warnings.warn(message, stacklevel=2)
    if "float64" in checkpoint.dtypes.values():
        warnings.warn(
            f"{checkpoint.path.name} contains float64, which is rounded to float32", stacklevel=2
        )
    # Kept so that `patchtst.write_pytorch` can restore the file to the bit.
    counters = {k: t for k, t in checkpoint.tensors.items() if k.endswith(patchtst.BATCHES_TRACKED)}
    origin = EncoderSource(
        sources=source.sources,
        source_program=checkpoint.program,
        source_file=checkpoint.path.name,
        source_sha256=checkpoint.sha256,
        source_form=checkpoint.form,
        source_dtypes={k: name for k, name in checkpoint.dtypes.items() if name in HALVES},
        batches_tracked={k: int(t) for k, t in counters.items() if t.dtype.kind == "i"},
    )
    return Converted(encoder, origin)


def convert_encoder(path: str | Path, config_path: str | Path | None = None) -> Converted:
    """Read and convert a checkpoint in one call; see `read_source` and `convert`."""
    return convert(read_source(path, config_path))


def describe(source: SourceModel, encoder: NativeEncoder) -> str:
    """Return a summary of a conversion for the terminal, over several lines."""
    family = FAMILIES[type(source.architecture)]
    lines = family.describe(source.architecture, source.checkpoint)
    for where in dict.fromkeys(source.sources.values()):
        names = [name for name, origin in source.sources.items() if origin == where]
        lines.append(f"from the {where}: {', '.join(names)}")
    n_parameters = sum(leaf.size for leaf in jax.tree.leaves(encoder.params))
    lines.append(f"{n_parameters:,} parameters, fingerprint {encoder.fingerprint[:12]}")
    return "\n".join(lines)
