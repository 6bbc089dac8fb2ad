"""PatchTST as an encoder for extraction, evaluation and report."""

from dataclasses import replace
from functools import partial

import numpy as np
from jaxtyping import Float

from minsae_jax.activations.tokens import TokenGrid
from minsae_jax.eeg.montage import CHANNELS
from minsae_jax.eeg.recordings import SAMPLING_RATE
from minsae_jax.encoder.base import (
    DEFAULT_OPTIONS,
    ComputeOptions,
    EncoderSpec,
    FunctionFrom,
    Params,
    Substitutes,
)
from minsae_jax.encoder.masked_error import MaskedReconstruction, function_from
from minsae_jax.encoder.native import NativeEncoder
from minsae_jax.encoder.patchtst.architecture import Architecture
from minsae_jax.encoder.patchtst.masked_error import downstream, window_errors
from minsae_jax.encoder.patchtst.model import PatchTST


class PatchTSTEncoder(NativeEncoder):
    """PatchTST with its weights: one token for each patch of a channel, and CLS if it has one.

    Each channel of a window is a sequence.
    """

    architecture_type = Architecture
    model_type = PatchTST
    architecture: Architecture

    def __init__(self, architecture: Architecture, params: Params):
        super().__init__(architecture, params)
        self.spec = _spec(architecture)
        self.reconstruction_note = (
            f"the encoder's head is {architecture.head_type}, not the pretrain head"
        )
        if architecture.head_type == "pretrain":
            mask_shape = (architecture.n_patches,)
            self.reconstruction = MaskedReconstruction(self, mask_shape, window_errors)

    def with_options(self, options: ComputeOptions) -> Architecture:
        return replace(self.architecture, revin=self.applies_revin(options))

    def without_head(self) -> Architecture:
        return replace(self.architecture, head_type="none")

    def function_from(
        self, layer: int, substitutes: Substitutes, options: ComputeOptions = DEFAULT_OPTIONS
    ) -> FunctionFrom:
        run_window = partial(downstream, layer=layer)
        return function_from(PatchTST, self.with_options(options), run_window, substitutes)

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


# The public name from before there were other families.
Encoder = PatchTSTEncoder


def _spec(a: Architecture) -> EncoderSpec:
    # PatchTST's settings contain none of these; its encoders are trained on the TUH corpus.
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
