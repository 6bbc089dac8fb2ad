"""The settings that define a CBraMod, and the sizes that follow from them."""

from dataclasses import dataclass

# Constants of the published model, which its weights do not show.
SAMPLING_RATE = 200.0  # Hz
STEM_STRIDE = 25  # samples from one position of the first convolution to the next
STEM_PADDING = 24  # zeros at each end of a patch
NORM_GROUPS = 5  # groups of channels that the stem's norms share statistics in


@dataclass(frozen=True)
class Architecture:
    """Everything needed to build the encoder; lengths are in samples.

    The same weights fit any number of channels and patches, since the places of tokens are computed
    from the input. A new field must have a default, so that the fingerprints of known encoders stay
    the same.
    """

    n_vars: int
    seq_len: int  # of a window; a multiple of patch_len
    patch_len: int
    stem_width: int  # channels of the convolutions on a patch
    stem_kernel: int  # samples that the first convolution reads
    n_layers: int
    d_model: int
    n_heads: int  # half of them attend over channels, half over time
    d_ff: int
    has_head: bool  # whether the reconstruction head is there

    @property
    def n_patches(self) -> int:
        return self.seq_len // self.patch_len

    @property
    def n_frequencies(self) -> int:
        """Return the number of frequencies in the spectrum of a patch."""
        return self.patch_len // 2 + 1


def stem_positions(patch_len: int, stem_kernel: int) -> int:
    """Return the number of positions of the stem in a patch; d_model is width times positions.

    >>> stem_positions(patch_len=200, stem_kernel=49)
    8
    """
    return (patch_len + 2 * STEM_PADDING - stem_kernel) // STEM_STRIDE + 1
