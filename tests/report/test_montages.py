"""Pairs of channels of the longitudinal bipolar montage."""

import pytest

from minsae_jax.eeg.montage import CHANNELS
from minsae_jax.report.montages import bipolar_chains

LATERAL = (
    *("Fp1", "F3", "C3", "P3", "O1", "F7", "T7", "P7"),
    *("Fp2", "F4", "C4", "P4", "O2", "F8", "T8", "P8"),
)


def names_of(channels: list[str]) -> list[str]:
    return [
        " ".join(f"{channels[a]}-{channels[b]}" for a, b in chain)
        for chain in bipolar_chains(channels)
    ]


def test_chains_of_the_tuh_channels():
    assert names_of(list(CHANNELS)) == [
        "FP1-F7 F7-T3 T3-T5 T5-O1",
        "FP1-F3 F3-C3 C3-P3 P3-O1",
        "FZ-CZ CZ-PZ",
        "FP2-F4 F4-C4 C4-P4 P4-O2",
        "FP2-F8 F8-T4 T4-T6 T6-O2",
    ]


def test_names_may_be_new_or_with_a_common_reference():
    channels = [f"EEG {name.upper()}-REF" for name in (*LATERAL, "Fz", "Cz", "Pz")]
    first, *_, last = names_of(channels)
    assert first.startswith("EEG FP1-REF-EEG F7-REF EEG F7-REF-EEG T7-REF")
    assert last.endswith("EEG P8-REF-EEG O2-REF")
    assert len(bipolar_chains(channels)) == 5


def test_sixteen_channels_have_no_midline():
    chains = names_of([*LATERAL, "Cz"])
    assert len(chains) == 4
    assert not any("z" in chain for chain in chains)


@pytest.mark.parametrize("missing", ["Fp1", "T8", "O2"])
def test_there_are_no_chains_without_a_channel(missing):
    assert bipolar_chains([name for name in LATERAL if name != missing]) == []


def test_bipolar_channels_have_no_chains():
    """Names of the CHB-MIT corpus."""
    assert bipolar_chains(["FP1-F7", "F7-T7", "T7-P7", "P7-O1", "FZ-CZ", "CZ-PZ"]) == []
