"""CBraMod as an encoder for extraction, evaluation and report."""

from dataclasses import replace
from functools import partial

import numpy as np
from jaxtyping import Array, Float

from minsae_jax.activations.tokens import TokenGrid
from minsae_jax.encoder.base import (
    DEFAULT_OPTIONS,
    ComputeOptions,
    EncoderSpec,
    FunctionFrom,
    Params,
    Substitutes,
)
from minsae_jax.encoder.cbramod.architecture import SAMPLING_RATE, Architecture
from minsae_jax.encoder.cbramod.masked_error import downstream, window_errors
from minsae_jax.encoder.cbramod.model import CBraMod
from minsae_jax.encoder.masked_error import MaskedReconstruction, function_from
from minsae_jax.encoder.native import NativeEncoder
from minsae_jax.errors import UserError


class CBraModEncoder(NativeEncoder):
    """CBraMod with its weights: one token for each channel and patch of a window.

    Windows are in µV / 100 at 200 Hz. A window is one sequence, ordered by channel, then time.
    """

    architecture_type = Architecture
    model_type = CBraMod
    architecture: Architecture

    def __init__(self, architecture: Architecture, params: Params):
        super().__init__(architecture, params)
        a = architecture
        self.spec = EncoderSpec(
            seq_len=a.seq_len,
            n_vars=a.n_vars,
            sampling_rate=SAMPLING_RATE,
            unit="100 uV",
            channels=None,
            layers=tuple(range(a.n_layers)),
            d_model=a.d_model,
            tokens=TokenGrid.patches(a.n_patches, a.patch_len, n_channels=a.n_vars),
        )
        if a.has_head:
            mask_shape = (a.n_vars, a.n_patches)
            self.reconstruction = MaskedReconstruction(self, mask_shape, window_errors)

    def __call__(
        self, past_values: Float[Array | np.ndarray, "batch seq_len n_vars"]
    ) -> Float[Array, "batch n_vars n_patches patch_len"]:
        """Return the patches as the head reconstructs them. Raises UserError without a head."""
        if not self.architecture.has_head:
            raise UserError("this encoder has no reconstruction head")
        return super().__call__(past_values)

    def without_head(self) -> Architecture:
        return replace(self.architecture, has_head=False)

    def function_from(
        self, layer: int, substitutes: Substitutes, options: ComputeOptions = DEFAULT_OPTIONS
    ) -> FunctionFrom:
        run_window = partial(downstream, layer=layer)
        return function_from(CBraMod, self.architecture, run_window, substitutes)

    def check_options(self, options: ComputeOptions) -> None:
        """Raise UserError if RevIN is requested: CBraMod reads absolute amplitudes."""
        if options.force_revin:
            raise UserError("--force_revin requires a PatchTST encoder")

    def waveform(
        self, direction: Float[np.ndarray, " d_model"]
    ) -> Float[np.ndarray, " patch_len"] | None:
        """Return the samples that a direction of the last layer adds to a patch, in µV / 100.

        None without the reconstruction head.
        """
        if not self.architecture.has_head:
            return None
        return direction @ np.asarray(self.params["head"]["kernel"])
