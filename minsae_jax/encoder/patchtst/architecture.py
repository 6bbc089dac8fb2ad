"""The settings that define a PatchTST, and the sizes that follow from them."""

from dataclasses import dataclass
from typing import Literal

from minsae_jax.encoder.patchtst.revin import Scaler


@dataclass(frozen=True)
class Architecture:
    """Everything needed to build the encoder; lengths are in samples.

    Fields with a default exist for the official program and for `transformers`; the defaults are
    gPatchTST's behaviour. A new field must have a default, so that the fingerprints of known
    encoders stay the same.
    """

    n_vars: int
    seq_len: int
    patch_len: int
    stride: int
    n_layers: int
    d_model: int
    n_heads: int
    d_ff: int
    activation: Literal["relu", "gelu"]
    norm: Literal["BatchNorm", "LayerNorm"]
    pre_norm: bool
    res_attention: bool
    shared_embedding: bool
    use_cls_token: bool
    pos_dim: int  # d_model, or 1: one learnt number per position, the same for every dimension
    head_type: Literal["pretrain", "prediction", "regression", "classification", "none"]
    target_dim: int  # outputs of the head; patch_len for the pretrain head
    individual_head: bool  # prediction head with one linear map per channel
    revin: bool
    revin_affine: bool
    revin_eps: float
    scaler: Scaler = "mean_sd"
    end_padding: int = 0  # samples appended to the window, copies of its last one
    leftover: Literal["start", "end"] = "start"  # end at which samples that fill no patch are cut
    norm_stream: bool = True  # pre_norm normalises the residual stream, not only branch inputs
    norm_eps: float = 1e-5
    # How the head combines the tokens of a channel.
    pooling: Literal["gpatchtst", "cls", "mean", "max"] = "gpatchtst"
    # Whether the prediction head's output is mapped back to each window's own mean and SD.
    denormalize: bool = False

    @property
    def n_patches(self) -> int:
        return (self.seq_len + self.end_padding - self.patch_len) // self.stride + 1

    @property
    def first_sample(self) -> int:
        """Return the sample at which the first patch starts; patch p starts p strides later."""
        if self.leftover == "end":
            return 0
        covered = self.patch_len + self.stride * (self.n_patches - 1)
        return self.seq_len + self.end_padding - covered

    @property
    def n_tokens(self) -> int:
        return self.n_patches + self.use_cls_token
