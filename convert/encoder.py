"""A PyTorch PatchTST checkpoint becomes a Flax encoder: `python -m convert encoder CHECKPOINT --out DIR`."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from convert.architecture import read_architecture
from convert.checkpoint import Tensors, load_checkpoint
from minsae_jax.config import UserError, read_yaml
from minsae_jax.encoder.converted import Encoder, Params, split_model

Rule = tuple[str, str | None, Callable[[np.ndarray], np.ndarray]]


def _same(t: np.ndarray) -> np.ndarray:
    return t


def _linear(source: str, target: str) -> list[Rule]:
    return [(rf"{source}\.weight", f"{target}/kernel", np.transpose), (rf"{source}\.bias", f"{target}/bias", _same)]


def _norm(source: str, target: str) -> list[Rule]:
    return [
        (rf"{source}(?:\.1)?\.weight", f"{target}/scale", _same),
        (rf"{source}(?:\.1)?\.bias", f"{target}/bias", _same),
        (rf"{source}\.1\.running_mean", f"{target}/mean", _same),
        (rf"{source}\.1\.running_var", f"{target}/var", _same),
        (rf"{source}\.1\.num_batches_tracked", None, _same),
    ]


_LAYER = r"backbone\.encoder\.layers\.(\d+)"
# Key of the state dict (a pattern), path in the Flax model (None: not needed), transform.
RULES: list[Rule] = [
    (r"revin\.affine_weight", "revin/affine_weight", _same),
    (r"revin\.affine_bias", "revin/affine_bias", _same),
    (r"backbone\.W_pos", "position", _same),
    (r"backbone\.cls_token", "cls_token", np.ravel),
    *_linear(r"backbone\.W_P", "embeddings/0"),
    *_linear(r"backbone\.W_P\.(\d+)", r"embeddings/\1"),
    *_linear(rf"{_LAYER}\.self_attn\.W_Q", r"layers/\1/attention/query"),
    *_linear(rf"{_LAYER}\.self_attn\.W_K", r"layers/\1/attention/key"),
    *_linear(rf"{_LAYER}\.self_attn\.W_V", r"layers/\1/attention/value"),
    *_linear(rf"{_LAYER}\.self_attn\.to_out\.0", r"layers/\1/attention/out"),
    (rf"{_LAYER}\.self_attn\.sdp_attn\.scale", r"layers/\1/attention/scale", _same),
    *_norm(rf"{_LAYER}\.norm_attn", r"layers/\1/norm_attention"),
    *_linear(rf"{_LAYER}\.ff\.0", r"layers/\1/ff_in"),
    *_linear(rf"{_LAYER}\.ff\.3", r"layers/\1/ff_out"),
    *_norm(rf"{_LAYER}\.norm_ffn", r"layers/\1/norm_ff"),
    *_linear(r"head\.linear", "head/linears/0"),
    *_linear(r"head\.linears\.(\d+)", r"head/linears/\1"),
]


def apply_rules(tensors: Tensors, target: Params) -> Params:
    """The target's tree filled with the tensors.

    Raises one UserError with every key that no rule knows or that has no place in this architecture, every shape that
    does not fit, every place left empty, and every value that is not finite.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(target)
    wanted = {"/".join(str(k.key) for k in path): leaf for path, leaf in leaves}
    filled: dict[str, np.ndarray] = {}
    complaints = []
    for key, tensor in tensors.items():
        rule = next(((m, path, f) for pattern, path, f in RULES if (m := re.fullmatch(pattern, key))), None)
        if rule is None:
            complaints.append(f"unknown key {key}")
            continue
        match, template, transform = rule
        if template is None:
            continue
        path, value = match.expand(template), transform(tensor)
        if path not in wanted:
            complaints.append(f"{key} has no place in this architecture")
        elif value.shape != wanted[path].shape or value.dtype != wanted[path].dtype:
            complaints.append(
                f"{key} is {value.dtype}{list(tensor.shape)}, not what fits {path}, float32{list(wanted[path].shape)}"
            )
        elif not np.isfinite(value).all():
            complaints.append(f"{key} holds NaN or infinity")
        filled[path] = value
    complaints += [f"nothing fills {path}" for path in wanted if path not in filled]
    if complaints:
        more = f" and {len(complaints) - 6} more" if len(complaints) > 6 else ""
        raise UserError(f"the state dict does not fit: {'; '.join(complaints[:6])}{more}")
    return jax.tree_util.tree_unflatten(structure, [np.array(filled[path], order="C") for path in wanted])


def convert_encoder(
    checkpoint_path: str | Path, config_path: str | Path | None = None
) -> tuple[Encoder, dict[str, Any]]:
    """The encoder in a checkpoint, and notes: sources (where each setting came from), source_file, source_sha256.

    Raises UserError where the file, its settings or its tensors are not those of a PatchTST.
    """
    yaml = read_yaml(config_path) if config_path else {}
    checkpoint = load_checkpoint(checkpoint_path)
    architecture, sources = read_architecture(checkpoint, yaml)
    params = apply_rules(checkpoint.tensors, split_model(architecture)[1])
    notes = {"sources": sources, "source_file": checkpoint.path.name, "source_sha256": checkpoint.sha256}
    return Encoder(architecture, params), notes


def describe(encoder: Encoder, notes: dict[str, Any]) -> str:
    """A short summary for the terminal."""
    a = encoder.architecture
    lines = [
        f"PatchTST from {notes['source_file']}: {a.n_layers} layers, d_model {a.d_model}, {a.n_heads} heads, "
        f"d_ff {a.d_ff}, {a.norm}, {a.activation}, {a.head_type} head",
        f"windows of {a.seq_len} samples x {a.n_vars} channels -> {a.n_tokens} tokens a channel "
        f"({a.n_patches} patches of {a.patch_len}, stride {a.stride}{', and CLS' if a.use_cls_token else ''}), "
        f"RevIN {'on' if a.revin else 'off'}",
    ]
    lines += [
        f"from the {source}: {', '.join(n for n, s in notes['sources'].items() if s == source)}"
        for source in dict.fromkeys(notes["sources"].values())
    ]
    count = sum(leaf.size for leaf in jax.tree.leaves(encoder.params))
    return "\n".join([*lines, f"{count:,} parameters, fingerprint {encoder.fingerprint[:12]}"])
