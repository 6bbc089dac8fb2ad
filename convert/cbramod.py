"""A PyTorch CBraMod to a Flax encoder.

The authors' checkpoints and Braindecode's have the same names.
"""

import re

import numpy as np

from convert.checkpoint import Checkpoint, Tensors
from convert.rules import Rule, fill, linear_rules, norm_rules
from minsae_jax.encoder.cbramod.architecture import (
    NORM_GROUPS,
    STEM_PADDING,
    Architecture,
    stem_positions,
)
from minsae_jax.encoder.cbramod.pure import abstract_params
from minsae_jax.encoder.patchtst.pure import Params
from minsae_jax.errors import UserError

MASK = "patch_embedding.mask_encoding"  # in every CBraMod, and in no other model


def rules() -> list[Rule]:
    """Return the conversion table; every key and path is in one rule."""
    layer = "encoder.layers.#"
    table = [
        Rule(MASK, "embedding/mask"),
        Rule(
            "patch_embedding.positional_encoding.0.weight", "embedding/position/kernel", _conv_2d
        ),
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
        table += norm_rules(
            f"patch_embedding.proj_in.{3 * i + 1}", f"embedding/stem/norms/{i}"
        )
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
