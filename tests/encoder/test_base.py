"""The interface of encoders: their sizes, and the recordings that they accept."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from minsae_jax import UserError
from minsae_jax.eeg.description import TUH
from minsae_jax.encoder.base import check_recordings
from minsae_jax.encoder.patchtst.encoder import PatchTSTEncoder


def test_unit_matters_without_revin(encoder):
    """RevIN brings every window to a mean of 0 and an SD of 1; without it, µV are refused."""
    in_microvolts = replace(TUH, unit="uV")
    with pytest.raises(UserError, match="expects EEG in SD, but the recordings are in uV"):
        check_recordings(encoder.spec, in_microvolts, allow_mismatch=False)
    with_revin = PatchTSTEncoder(replace(encoder.architecture, revin=True), encoder.params)
    check_recordings(with_revin.spec, in_microvolts, allow_mismatch=False)


def test_repr_has_the_sizes(encoder):
    assert repr(encoder) == (
        "PatchTSTEncoder(1000 samples x 19 channels -> 11 tokens per channel, d_model 128, "
        f"layers 0 to 2, fingerprint {encoder.fingerprint[:12]})"
    )


def test_parameters_have_32_bits_in_a_program_of_64_bits(encoder):
    """Otherwise a converted encoder would seem to be damaged there."""
    another = replace(encoder.architecture, d_ff=encoder.architecture.d_ff + 1)  # is not cached
    with jax.enable_x64(True):
        params = PatchTSTEncoder.abstract_params(another)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}
