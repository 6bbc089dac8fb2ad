"""A converted encoder: a folder with the parameters (Orbax) and config.json, and the Encoder that is loaded from it.

`config.json`: format_version, fingerprint, architecture, sources (where each setting came from), source_file and its
sha256.
"""

import dataclasses
import hashlib
import json
import re
import shutil
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jaxtyping import Array, Float

from minsae_jax.encoder.patchtst.model import Architecture, PatchTST, layer_index
from minsae_jax.errors import UserError, brief
from minsae_jax.settings import from_dict

FORMAT_VERSION = 1
Params = dict[str, Any]
Precision = Literal["float32", "bfloat16"]


@lru_cache(64)
def _split(architecture: Architecture, precision: Precision) -> tuple[nnx.GraphDef, Any]:
    dtype = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}[precision]
    return nnx.split(nnx.eval_shape(lambda: PatchTST(architecture, dtype, rngs=nnx.Rngs(0))))


def split_model(
    architecture: Architecture, precision: Precision = "float32"
) -> tuple[nnx.GraphDef, Params]:
    """Graph and abstract parameters (shapes and dtypes) of the model; nothing is allocated. precision: of the layers'
    products."""
    graph, state = _split(architecture, precision)
    return graph, nnx.to_pure_dict(state)


class Encoder:
    """PatchTST with its weights, under jit, in full float32 (no TF32 on GPU).

    `fingerprint` tells encoders apart: sha256 over the architecture and all parameters.
    """

    def __init__(self, architecture: Architecture, params: Params):
        self.architecture = architecture
        self.graph, _ = split_model(architecture)
        self.params = params
        self.fingerprint = _fingerprint(architecture, params)

    def __call__(
        self, past_values: Float[Array | np.ndarray, "batch seq_len n_vars"]
    ) -> Float[Array, "..."]:
        """What the reference's head gives; see `patchtst.Head` for the shapes."""
        return _forward(self.graph, self.params, self._checked(past_values))

    def activations(
        self, past_values: Float[Array | np.ndarray, "batch seq_len n_vars"], layer: int = -1
    ) -> Float[Array, "batch n_vars n_tokens d_model"]:
        """Output of a layer, float32, for EEG in SD. RevIN is applied where the encoder was trained with it.

        Raises UserError where the window's length or channels are not the encoder's, or there is no such layer.
        """
        layers = (layer_index(layer, self.architecture.n_layers),)
        return _hidden(self.graph, self.params, self._checked(past_values), layers)[0]

    def _checked(self, past_values: Array | np.ndarray) -> Array:
        a = self.architecture
        if np.ndim(past_values) != 3 or past_values.shape[1:] != (a.seq_len, a.n_vars):
            raise UserError(
                f"past_values must be [batch, {a.seq_len} samples, {a.n_vars} channels] for this encoder, "
                f"but is {list(np.shape(past_values))}"
            )
        return jnp.asarray(past_values, jnp.float32)


@partial(jax.jit, static_argnums=(0, 3))
def _hidden(
    graph: nnx.GraphDef, params: Params, past_values: Array, layers: tuple[int, ...]
) -> tuple[Array, ...]:
    with jax.default_matmul_precision("highest"):
        return nnx.merge(graph, params).hidden(past_values, layers)


@partial(jax.jit, static_argnums=0)
def _forward(graph: nnx.GraphDef, params: Params, past_values: Array) -> Array:
    with jax.default_matmul_precision("highest"):
        return nnx.merge(graph, params)(past_values)


def _fingerprint(architecture: Architecture, params: Params) -> str:
    settings = {
        f.name: value
        for f in dataclasses.fields(architecture)
        if (value := getattr(architecture, f.name))
        != f.default  # so that a new field leaves known encoders alone
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.asarray(leaf)
        name = "/".join(str(getattr(part, "key", part)) for part in path)
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def save_encoder(folder: str | Path, encoder: Encoder, notes: dict[str, Any]) -> None:
    """Write a converted encoder, aside first, so that a half-written one never looks complete.

    Replaces an encoder that is there; raises UserError where the folder holds anything else.
    """
    folder = Path(folder).absolute()
    aside = folder.with_name(folder.name + ".tmp")
    for place in (folder, aside):
        if place.exists() and not _is_ours(place):
            raise UserError(
                f"{place} exists and is no converted encoder, and is not overwritten: name another folder"
            )
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    needed, free = (
        sum(leaf.nbytes for leaf in jax.tree.leaves(encoder.params)) + (1 << 18),
        shutil.disk_usage(aside).free,
    )
    try:
        if free < needed:  # Orbax would say so on a hundred lines
            raise OSError(f"it needs {needed / 1e6:.1f} MB, but {free / 1e6:.1f} MB are free")
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save((aside / "params").absolute(), encoder.params)
        config = {
            "format_version": FORMAT_VERSION,
            "fingerprint": encoder.fingerprint,
            "architecture": dataclasses.asdict(encoder.architecture),
        }
        (aside / "config.json").write_text(json.dumps(config | notes, indent=2) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    except (OSError, ValueError, RuntimeError) as e:  # what Orbax raises when it cannot write
        reason = brief(e)
        raise UserError(
            f"the encoder could not be written to {folder} ({reason}): make room, or name another"
        ) from e
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def is_encoder(folder: Path) -> bool:
    return (folder / "config.json").is_file() and (folder / "params").is_dir()


def _is_ours(folder: Path) -> bool:
    """A folder with nothing in it but an encoder, or what is left of one that was being written."""
    if not folder.is_dir():
        return False
    names = {p.name for p in folder.iterdir()}
    foreign = {
        n
        for n in names
        if n != "config.json" and not re.fullmatch(r"params(\.orbax-checkpoint-tmp.*)?", n)
    }
    if foreign or "config.json" not in names:
        return not foreign
    try:
        return "fingerprint" in json.loads((folder / "config.json").read_text())
    except (OSError, ValueError, RecursionError, TypeError):
        return False


def load_notes(folder: str | Path) -> dict[str, Any]:
    """What config.json says of the source, as far as it is needed to give it back."""
    config = json.loads((Path(folder) / "config.json").read_text())
    kinds = {"source_dtypes": dict, "batches_tracked": dict, "source_form": str}
    return {k: v for k, v in config.items() if k in kinds and isinstance(v, kinds[k])}


def load_encoder(folder: str | Path) -> Encoder:
    """The encoder in a folder that `python -m convert encoder` wrote. Raises UserError where it holds none."""
    folder = Path(folder)
    if not folder.exists():
        raise UserError(
            f"there is no encoder at {folder}: convert one with `python -m convert encoder`"
        )
    try:
        config = json.loads((folder / "config.json").read_text())
        if config["format_version"] > FORMAT_VERSION:
            raise UserError(
                f"{folder} was written by a newer minsae_jax (format {config['format_version']}): update"
            )
        architecture = from_dict(Architecture, config["architecture"])
        with ocp.StandardCheckpointer() as checkpointer:
            params = checkpointer.restore(
                (folder / "params").absolute(), split_model(architecture)[1]
            )
        encoder = Encoder(architecture, params)
        if encoder.fingerprint != config["fingerprint"]:
            raise ValueError("it is not what its fingerprint says")
        return encoder
    except UserError:
        raise
    except Exception as e:
        reason = brief(e)
        raise UserError(
            f"{folder} is no converted encoder, or a damaged one ({reason}): convert it again"
        ) from e
