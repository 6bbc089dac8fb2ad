"""A PyTorch CBraMod to Flax: the authors' checkpoints, and folders that Braindecode saved.

Both have the same names. Fine-tuned models of the authors' code keep the encoder in `backbone`.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from convert.checkpoint import Checkpoint, SourceModel, check_size, count_distinct, tensor_of
from convert.rules import Rule, fill, linear_rules, norm_rules
from convert.torch_files import Tensors
from minsae_jax.encoder.base import Params
from minsae_jax.encoder.cbramod.architecture import (
    NORM_GROUPS,
    SAMPLING_RATE,
    STEM_PADDING,
    STEM_STRIDE,
    Architecture,
    stem_positions,
)
from minsae_jax.encoder.cbramod.encoder import CBraModEncoder
from minsae_jax.errors import UserError
from minsae_jax.settings import JsonObject, shown

MASK = "patch_embedding.mask_encoding"  # in every CBraMod, and in no other model
FINE_TUNED = "backbone."
HEAD = "proj_out."
TASK_HEADS = ("final_layer.", "classifier.")  # of Braindecode, of the authors
# Setting -> its name in Braindecode's config.json
CONFIG_NAMES = {"n_vars": "n_chans", "seq_len": "n_times", "n_heads": "nhead"}
# Of the published model, which was trained on windows of 30 s
PUBLISHED = {"n_vars": 19, "seq_len": 6000, "n_heads": 8}
PUBLISHED_D_MODEL = 200


def is_cbramod(tensors: Tensors) -> bool:
    """Return whether a state dict is that of a CBraMod."""
    return MASK in tensors or FINE_TUNED + MASK in tensors


def read_source(
    checkpoint: Checkpoint, flags: Mapping[str, Any], without_head: bool
) -> SourceModel:
    """Return a checkpoint with its architecture.

    The settings are those of the tensors, else of flags, config or the published model. Raises
    UserError if these contradict each other or do not make a CBraMod.
    """
    left_out = (*TASK_HEADS, HEAD) if without_head else TASK_HEADS
    names = {key.removeprefix(FINE_TUNED): tensor for key, tensor in checkpoint.tensors.items()}
    if len(names) < len(checkpoint.tensors):
        raise UserError(
            f"{checkpoint.path} contains several CBraMods, one in {FINE_TUNED.rstrip('.')!r}; save "
            "one of them alone"
        )
    tensors = {key: tensor for key, tensor in names.items() if not key.startswith(left_out)}
    checkpoint = replace(checkpoint, program="cbramod", tensors=tensors)
    unused = [name for name in flags if name not in PUBLISHED]
    if unused:
        raise UserError(f"--{unused[0]} does not apply to CBraMod")
    inferred = _inferred(tensors)
    config = checkpoint.config
    _check_supported(config, inferred)
    settings = dict(inferred)
    sources = dict.fromkeys(inferred, "state dict")
    for name, published in PUBLISHED.items():
        stated = config.get(CONFIG_NAMES[name])
        if name in flags:
            settings[name] = flags[name]
            sources[name] = "flags"
        elif stated is not None:
            settings[name] = stated
            sources[name] = "config.json"
        elif name != "n_heads" or inferred["d_model"] == PUBLISHED_D_MODEL:
            settings[name] = published
            sources[name] = "published model"
        else:
            raise UserError("this CBraMod has another size than the published one: add --n_heads")
    _check_sizes(settings)
    return SourceModel(checkpoint, Architecture(**settings), sources)


def _inferred(tensors: Tensors) -> dict[str, Any]:
    """Return the settings that the tensors determine."""
    stem = tensor_of(tensors, "patch_embedding.proj_in.0.weight", 4)
    return {
        "patch_len": len(tensor_of(tensors, MASK, 1)),
        "stem_width": stem.shape[0],
        "stem_kernel": stem.shape[3],
        "n_layers": count_distinct(tensors, r"encoder\.layers\.(\d+)\..*"),
        "d_model": len(tensor_of(tensors, "patch_embedding.spectral_proj.0.weight", 2)),
        "d_ff": len(tensor_of(tensors, "encoder.layers.0.linear1.weight", 2)),
        "has_head": any(key.startswith(HEAD) for key in tensors),
    }


def _check_supported(config: JsonObject, inferred: Mapping[str, Any]) -> None:
    """Raise UserError on options of Braindecode that the model here does not have."""
    activation = config.get("activation", "GELU")
    if not isinstance(activation, str) or activation.split(".")[-1] != "GELU":
        raise UserError(f"CBraMod with the activation {shown(activation)} is not supported")
    stem = config.get("channels_kernel_stride_padding_norm")
    width = inferred["stem_width"]
    norm = [NORM_GROUPS, width]
    first = [width, inferred["stem_kernel"], STEM_STRIDE, STEM_PADDING, norm]
    if stem is not None and stem != [first, [width, 3, 1, 1, norm], [width, 3, 1, 1, norm]]:
        raise UserError(f"CBraMod with the convolutions {shown(stem)} is not supported")


def _check_sizes(settings: Mapping[str, Any]) -> None:
    """Raise UserError if the settings do not make a CBraMod of a moderate size."""
    for name in PUBLISHED:
        if type(settings[name]) is not int or not 0 < settings[name] < 1 << 31:
            raise UserError(f"{name} must be a whole number above 0, got {shown(settings[name])}")
    n_vars = settings["n_vars"]
    seq_len = settings["seq_len"]
    patch_len = settings["patch_len"]
    d_model = settings["d_model"]
    n_heads = settings["n_heads"]
    width = settings["stem_width"]
    if seq_len % patch_len:
        raise UserError(f"seq_len {seq_len} is not a multiple of the patch length {patch_len}")
    positions = stem_positions(patch_len, settings["stem_kernel"])
    if width % NORM_GROUPS or d_model != width * positions:
        raise UserError(
            f"{width} convolution channels on patches of {patch_len} samples do not make tokens of "
            f"d_model {d_model}"
        )
    if n_heads % 2 or d_model % n_heads:
        raise UserError(f"n_heads {n_heads} must be even and divide d_model {d_model}")
    n_tokens = n_vars * seq_len // patch_len
    numbers = n_tokens * max(d_model, settings["d_ff"])
    check_size(settings["n_layers"], seq_len, n_vars, numbers)


def to_flax(a: Architecture, tensors: Tensors) -> Params:
    """Return the Flax model's parameters. Raises one UserError that lists all problems."""
    return fill(CBraModEncoder.abstract_params(a), rules(), tensors)


def describe(a: Architecture, checkpoint: Checkpoint) -> list[str]:
    """Return the first lines of the summary of a conversion."""
    head = "reconstruction head" if a.has_head else "no head"
    return [
        f"CBraMod from {checkpoint.path.name}: {a.n_layers} layers, d_model {a.d_model}, "
        f"{a.n_heads} heads, d_ff {a.d_ff}, {head}",
        f"windows of {a.seq_len} samples x {a.n_vars} channels in µV / 100 at "
        f"{SAMPLING_RATE:g} Hz -> {a.n_vars * a.n_patches} tokens, one per channel and patch of "
        f"{a.patch_len} samples",
    ]


def rules() -> list[Rule]:
    """Return the conversion table; every key and path is in one rule."""
    layer = "encoder.layers.#"
    table = [
        Rule(MASK, "embedding/mask"),
        Rule("patch_embedding.positional_encoding.0.weight", "embedding/position/kernel", _conv_2d),
        Rule("patch_embedding.positional_encoding.0.bias", "embedding/position/bias"),
        *linear_rules("patch_embedding.spectral_proj.0", "embedding/spectrum"),
        *norm_rules(f"{layer}.norm1", "layers/#/norm_attention"),
        *norm_rules(f"{layer}.norm2", "layers/#/norm_ff"),
        *linear_rules(f"{layer}.linear1", "layers/#/ff_in"),
        *linear_rules(f"{layer}.linear2", "layers/#/ff_out"),
        *linear_rules("proj_out.0", "head"),
    ]
    # A convolution, a norm and an activation, three times.
    for i in range(3):
        convolution = f"patch_embedding.proj_in.{3 * i}"
        path = f"embedding/stem/convolutions/{i}"
        table += [
            Rule(f"{convolution}.weight", f"{path}/kernel", _conv_over_time),
            Rule(f"{convolution}.bias", f"{path}/bias"),
        ]
        table += norm_rules(f"patch_embedding.proj_in.{3 * i + 1}", f"embedding/stem/norms/{i}")
    for letter, name in (("s", "over_channels"), ("t", "over_time")):
        attention = f"{layer}.self_attn_{letter}"
        projection = f"layers/#/{name}/queries_keys_values"
        table += [
            Rule(f"{attention}.in_proj_weight", f"{projection}/kernel", np.transpose),
            Rule(f"{attention}.in_proj_bias", f"{projection}/bias"),
            *linear_rules(f"{attention}.out_proj", f"layers/#/{name}/out"),
        ]
    return table


def _conv_over_time(weight: np.ndarray) -> np.ndarray:
    # torch: [outputs, inputs, 1, samples]; Flax: [samples, inputs, outputs].
    return weight[:, :, 0].transpose(2, 1, 0) if weight.ndim == 4 else weight


def _conv_2d(weight: np.ndarray) -> np.ndarray:
    # torch: [outputs, inputs, height, width]; Flax: [height, width, inputs, outputs].
    return weight.transpose(2, 3, 1, 0) if weight.ndim == 4 else weight
