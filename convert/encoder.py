"""A PyTorch PatchTST becomes a Flax encoder, and goes back: `python -m convert encoder SOURCE --out DIR`."""

import dataclasses
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from convert.architecture import read_architecture, spelling
from convert.checkpoint import HALVES, Checkpoint, Program, Tensors, load_checkpoint, save_torch
from convert.huggingface import load_huggingface
from minsae_jax.encoder.converted import Encoder, Params, split_model
from minsae_jax.encoder.patchtst.model import Architecture
from minsae_jax.errors import UserError
from minsae_jax.settings import read_yaml

Transform = Callable[[np.ndarray], np.ndarray]
# Key of gPatchTST's state dict, path in the Flax model, transforms there and back; `#` is a number.
Rule = tuple[str, str, Transform, Transform]
COUNTER = "num_batches_tracked"  # BatchNorm's, which nothing reads


def rules(a: Architecture) -> list[Rule]:
    """The table for one architecture; every key and every path stands in one rule."""

    def same(source: str, target: str) -> Rule:
        return source, target, np.asarray, np.asarray

    def linear(source: str, target: str) -> list[Rule]:
        weight = (f"{source}.weight", f"{target}/kernel", np.transpose, np.transpose)
        return [weight, same(f"{source}.bias", f"{target}/bias")]

    def norm(source: str, target: str) -> list[Rule]:
        if a.norm == "LayerNorm":
            return [
                same(f"{source}.weight", f"{target}/scale"),
                same(f"{source}.bias", f"{target}/bias"),
            ]
        names = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
        return [same(f"{source}.1.{theirs}", f"{target}/{ours}") for theirs, ours in names.items()]

    layer = "backbone.encoder.layers.#"
    return [
        same("revin.affine_weight", "revin/affine_weight"),
        same("revin.affine_bias", "revin/affine_bias"),
        same("backbone.W_pos", "position"),
        ("backbone.cls_token", "cls_token", np.ravel, lambda t: t.reshape(1, 1, -1)),
        *(
            linear("backbone.W_P", "embeddings/0")
            if a.shared_embedding
            else linear("backbone.W_P.#", "embeddings/#")
        ),
        *linear(f"{layer}.self_attn.W_Q", "layers/#/attention/query"),
        *linear(f"{layer}.self_attn.W_K", "layers/#/attention/key"),
        *linear(f"{layer}.self_attn.W_V", "layers/#/attention/value"),
        same(f"{layer}.self_attn.sdp_attn.scale", "layers/#/attention/scale"),
        *linear(f"{layer}.self_attn.to_out.0", "layers/#/attention/out"),
        *norm(f"{layer}.norm_attn", "layers/#/norm_attention"),
        *linear(f"{layer}.ff.0", "layers/#/ff_in"),
        *linear(f"{layer}.ff.3", "layers/#/ff_out"),
        *norm(f"{layer}.norm_ffn", "layers/#/norm_ff"),
        *(
            linear("head.linears.#", "head/linears/#")
            if a.individual_head
            else linear("head.linear", "head/linears/0")
        ),
    ]


def _translated(name: str, source: str, target: str) -> str | None:
    """The target's name for what matches the source's pattern."""
    match = re.fullmatch(re.escape(source).replace(r"\#", r"(\d+)"), name)
    return match and target.replace("#", match[1] if match.groups() else "")


def apply_rules(a: Architecture, tensors: Tensors) -> Params:
    """The Flax model's parameters from the tensors.

    Raises one UserError with every key that no rule of this architecture knows, every shape that does not fit, every
    place left empty, and every value that is not finite.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(split_model(a)[1])
    wanted = {_path(keys): leaf for keys, leaf in leaves}
    filled: dict[str, np.ndarray] = {}
    complaints = []
    table = rules(a)
    for key, tensor in tensors.items():
        if a.norm == "BatchNorm" and key.endswith(f".1.{COUNTER}"):
            if tensor.ndim or not np.isfinite(tensor):
                complaints.append(f"{key} is no number")
            continue
        found = ((_translated(key, theirs, ours), there) for theirs, ours, there, _ in table)
        path, there = next(((path, there) for path, there in found if path), ("", None))
        if there is None or path not in wanted:
            complaints.append(f"unknown key {key[:200]}")
            continue
        value = there(tensor)
        if value.shape != wanted[path].shape or value.dtype != wanted[path].dtype:
            complaints.append(
                f"{key} is {value.dtype}{list(tensor.shape)}, not what fits {path}, float32{list(wanted[path].shape)}"
            )
        elif not np.isfinite(value).all():
            complaints.append(f"{key} holds NaN or infinity")
        elif path.endswith("/var") and value.min() < 0:
            complaints.append(f"{key} holds a variance below 0")
        filled[path] = value
    complaints += [f"nothing fills {path}" for path in wanted if path not in filled]
    if complaints:
        more = f" and {len(complaints) - 6} more" if len(complaints) > 6 else ""
        raise UserError(f"the state dict does not fit: {'; '.join(complaints[:6])}{more}")
    return jax.tree_util.tree_unflatten(
        structure, [np.array(filled[path], order="C") for path in wanted]
    )


def state_dict(a: Architecture, params: Params) -> Tensors:
    """The inverse of `apply_rules`: gPatchTST's state dict (without BatchNorm's counters), RevIN's under `revin.`."""
    leaves = {_path(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(params)}
    tensors = {}
    for theirs, ours, _, back in rules(a):
        for path, leaf in leaves.items():
            key = _translated(path, ours, theirs)
            if key:
                tensors[key] = np.array(back(np.asarray(leaf)), order="C")
    return tensors


def _path(keys: tuple[Any, ...]) -> str:
    return "/".join(str(getattr(key, "key", key)) for key in keys)


@dataclass(frozen=True)
class Source:
    """What is to be converted, opened and understood."""

    checkpoint: Checkpoint
    architecture: Architecture
    sources: dict[str, str]  # where each setting came from
    doubts: tuple[str, ...]  # worth a warning each, once it is converted


def read_source(
    path: str | Path,
    config_path: str | Path | None = None,
    flags: Mapping[str, Any] | None = None,
    program: Program | None = None,
    without_head: bool = False,
) -> Source:
    """A .pth file, or a folder of transformers. flags precede the YAML at config_path; program is guessed where it is
    not said. Raises UserError where the file, its settings or its tensors are not those of a PatchTST."""
    yaml = read_yaml(config_path) if config_path else {}
    path = Path(path)
    checkpoint = load_huggingface(path, without_head) if path.is_dir() else load_checkpoint(path)
    if program and checkpoint.program == "transformers":
        raise UserError(
            f"{path} is a folder of transformers, which leaves nothing to say with --program"
        )
    if without_head:
        tensors = {k: t for k, t in checkpoint.tensors.items() if not k.startswith("head.")}
        checkpoint = replace(checkpoint, tensors=tensors)
        flags = dict(flags or {}) | {"head_type": "none"}
    checkpoint = replace(checkpoint, program=program or checkpoint.program)
    return Source(checkpoint, *read_architecture(checkpoint, yaml, flags or {}))


def convert(source: Source) -> tuple[Encoder, dict[str, Any]]:
    """The encoder, and notes for its config.json: `sources`, source_program, source_file, source_sha256, and what
    `write_pytorch` needs to give the file back to the bit. Raises UserError where tensors do not fit."""
    c = source.checkpoint
    encoder = Encoder(source.architecture, apply_rules(source.architecture, c.tensors))
    for doubt in source.doubts:
        warnings.warn(doubt, stacklevel=2)
    if "float64" in c.dtypes.values():
        warnings.warn(f"{c.path.name} holds float64, which is rounded to float32", stacklevel=2)
    notes = {
        "sources": source.sources,
        "source_program": c.program,
        "source_file": c.path.name,
        "source_sha256": c.sha256,
        "source_form": c.form,
        "source_dtypes": {k: dtype for k, dtype in c.dtypes.items() if dtype in HALVES},
        "batches_tracked": {
            k: int(t) for k, t in c.tensors.items() if k.endswith(COUNTER) and t.dtype.kind == "i"
        },
    }
    return encoder, notes


def convert_encoder(
    path: str | Path, config_path: str | Path | None = None
) -> tuple[Encoder, dict[str, Any]]:
    """`read_source` and `convert` in one."""
    return convert(read_source(path, config_path))


def write_pytorch(path: Path, encoder: Encoder, notes: Mapping[str, Any]) -> None:
    """gPatchTST's checkpoint of an encoder, or its bare state dict where that came in; written aside and renamed.

    A checkpoint holds model_state_dict, revin_state_dict (None without affine weights) and config, from which it is
    converted again without a YAML. Raises UserError on an encoder that gPatchTST cannot run.
    """
    import torch

    if path.exists():
        raise UserError(f"{path} exists, and a checkpoint is never overwritten: name another file")
    a = encoder.architecture
    _refuse_foreign(a)
    tensors = {k: torch.from_numpy(t) for k, t in state_dict(a, encoder.params).items()}
    dtypes, counts = notes.get("source_dtypes", {}), notes.get("batches_tracked", {})
    if not all(key in tensors and dtype in HALVES for key, dtype in dtypes.items()) or not all(
        key.endswith(f".1.{COUNTER}") and type(count) is int and abs(count) < 2**63
        for key, count in counts.items()
    ):
        raise UserError(
            "the encoder's config.json is damaged (source_dtypes, batches_tracked): convert it again"
        )
    tensors |= {key: tensors[key].to(getattr(torch, dtype)) for key, dtype in dtypes.items()}
    tensors |= {key: torch.tensor(count) for key, count in counts.items()}
    content: dict[str, Any] = tensors
    if notes.get("source_form") != "state dict":
        revin = {k.removeprefix("revin."): t for k, t in tensors.items() if k.startswith("revin.")}
        content = {
            "model_state_dict": {k: t for k, t in tensors.items() if not k.startswith("revin.")},
            "revin_state_dict": revin or None,
            "config": settings_of(a),
        }
    save_torch(path, content)


def _refuse_foreign(a: Architecture) -> None:
    """gPatchTST knows only the defaults of what other programs do differently."""
    alike = replace(
        a,
        **{
            f.name: f.default for f in dataclasses.fields(a) if f.default is not dataclasses.MISSING
        },
    )
    if not a.revin:
        alike = replace(alike, scaler=a.scaler)
    if not a.pre_norm:
        alike = replace(alike, norm_stream=a.norm_stream)
    if a.first_sample == alike.first_sample:
        alike = replace(alike, leftover=a.leftover)
    if a.head_type == "none" or alike != a:
        names = [
            f.name for f in dataclasses.fields(a) if getattr(a, f.name) != getattr(alike, f.name)
        ]
        raise UserError(
            f"gPatchTST has no such encoder ({', '.join(names) or 'no head'}), so it cannot be written for it"
        )


def settings_of(a: Architecture) -> dict[str, Any]:
    """The settings in the sections and spellings of gPatchTST's YAML."""
    model = {
        spelling(f.name): getattr(a, f.name)
        for f in dataclasses.fields(a)
        if f.default is dataclasses.MISSING
    }
    return {"data": {"n_vars": model.pop("n_vars")}, "model": model}


def describe(source: Source, encoder: Encoder) -> str:
    """A short summary for the terminal."""
    a, c = source.architecture, source.checkpoint
    program = {"gpatchtst": "gPatchTST", "supervised": "the official supervised program"}.get(
        c.program, c.program
    )
    head = "no head" if a.head_type == "none" else f"{a.head_type} head"
    lines = [
        f"PatchTST of {program} from {c.path.name}: {a.n_layers} layers, d_model {a.d_model}, {a.n_heads} heads, "
        f"d_ff {a.d_ff}, {a.norm}, {a.activation}, {head}",
        f"windows of {a.seq_len} samples x {a.n_vars} channels -> {a.n_tokens} tokens a channel "
        f"({a.n_patches} patches of {a.patch_len}, stride {a.stride}{', and CLS' if a.use_cls_token else ''}), "
        f"RevIN {'on' if a.revin else 'off'}",
    ]
    lines += [
        f"from the {where}: {', '.join(n for n, s in source.sources.items() if s == where)}"
        for where in dict.fromkeys(source.sources.values())
    ]
    count = sum(leaf.size for leaf in jax.tree.leaves(encoder.params))
    return "\n".join([*lines, f"{count:,} parameters, fingerprint {encoder.fingerprint[:12]}"])
