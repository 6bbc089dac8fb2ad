"""PatchTST as an encoder for extraction, evaluation and report."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from minsae_jax.activations.tokens import TokenGrid
from minsae_jax.eeg.montage import CHANNELS
from minsae_jax.eeg.recordings import SAMPLING_RATE
from minsae_jax.encoder.base import (
    DEFAULT_OPTIONS,
    ComputeOptions,
    EncoderSpec,
    FunctionFrom,
    HiddenFunction,
    NativeEncoder,
    Params,
    Substitutes,
)
from minsae_jax.encoder.patchtst.architecture import Architecture
from minsae_jax.encoder.patchtst.masked_error import function_from, masked_errors
from minsae_jax.encoder.patchtst.pure import abstract_params, bind, hidden_function


class Encoder(NativeEncoder):
    """PatchTST with its weights, compiled, in full float32 (no TF32 on GPU).

    `fingerprint` identifies the encoder: SHA-256 of the architecture and all parameters.
    """

    architecture_type = Architecture
    architecture: Architecture

    def __init__(self, architecture: Architecture, params: Params):
        super().__init__(architecture, params)
        self.spec = _spec(architecture)
        self.reconstruction_note = (
            f"the encoder's head is {architecture.head_type}, not the pretrain head"
        )
        if architecture.head_type == "pretrain":
            self.reconstruction = MaskedPatches(architecture)

    def __call__(
        self, past_values: Float[Array | np.ndarray, "batch seq_len n_vars"]
    ) -> Float[Array, "..."]:
        """Return the output of the head; `patchtst.model.Head` lists its shapes."""
        return _forward(self.architecture, self.params, self.checked(past_values))

    def function(
        self, layers: tuple[int, ...], options: ComputeOptions = DEFAULT_OPTIONS
    ) -> HiddenFunction:
        return hidden_function(self.architecture, layers, options)

    def function_from(
        self, layer: int, substitutes: Substitutes, options: ComputeOptions = DEFAULT_OPTIONS
    ) -> FunctionFrom:
        """Return the function that runs the rest of the model; `BaseEncoder` describes it.

        It is computed in float32.
        """
        return function_from(self.architecture, layer, self.applies_revin(options), substitutes)

    def check_options(self, options: ComputeOptions) -> None:
        """Do nothing: every option is possible."""

    def applies_revin(self, options: ComputeOptions) -> bool:
        return self.architecture.revin or options.force_revin

    def waveform(
        self, direction: Float[np.ndarray, " d_model"]
    ) -> Float[np.ndarray, " patch_len"] | None:
        """Return the samples that a direction of the last layer adds to a patch.

        None without the pretrain head.
        """
        if self.architecture.head_type != "pretrain":
            return None
        return direction @ np.asarray(self.params["head"]["linears"][0]["kernel"])

    @classmethod
    def abstract_params(cls, architecture: Architecture) -> Params:
        return abstract_params(architecture)


def _spec(a: Architecture) -> EncoderSpec:
    # The settings of PatchTST contain none of these: its encoders are those of the TUH corpus.
    channels = CHANNELS if a.n_vars == len(CHANNELS) else None
    return EncoderSpec(
        seq_len=a.seq_len,
        n_vars=a.n_vars,
        sampling_rate=float(SAMPLING_RATE),
        # RevIN removes the unit.
        unit=None if a.revin else "SD",
        channels=channels,
        layers=tuple(range(a.n_layers)),
        d_model=a.d_model,
        tokens=TokenGrid.patches(
            a.n_patches, a.patch_len, a.stride, a.first_sample, n_cls=int(a.use_cls_token)
        ),
        per_channel=True,
        reserved_samples=a.patch_len,
    )


@dataclass(frozen=True)
class MaskedPatches:
    """gPatchTST's pretraining task: patches are masked in all channels alike."""

    architecture: Architecture

    def draw_mask(self, ratio: float, rng: np.random.Generator) -> Bool[np.ndarray, " n_patches"]:
        n_patches = self.architecture.n_patches
        mask = np.zeros(n_patches, bool)
        n_masked = max(1, int(n_patches * ratio))
        mask[rng.permutation(n_patches)[:n_masked]] = True
        return mask

    def masked_errors(
        self, mesh: Mesh, layer: int, options: ComputeOptions, substitutes: Substitutes
    ) -> Callable[[Any, Any, Any], Float[Array, "batch variants"]]:
        revin = self.architecture.revin or options.force_revin
        return masked_errors(mesh, self.architecture, layer, revin, substitutes)


@partial(jax.jit, static_argnums=0)
def _forward(architecture: Architecture, params: Params, past_values: Array) -> Array:
    with jax.default_matmul_precision("highest"):
        return bind(architecture, params)(past_values)
