"""Settings that several commands share about the recordings they read."""

from dataclasses import dataclass
from typing import Annotated

from minsae_jax.eeg.recordings import OnBadRecording
from minsae_jax.settings import NonNegative


@dataclass(frozen=True, kw_only=True)
class RecordingChecks:
    """Recordings"""

    split_seed: Annotated[int, NonNegative] = 42
    """Seed of the patient split, as in tuh_patient_splits_seed_{seed}.pkl."""
    on_bad_recording: OnBadRecording = "error"
    """Recordings that cannot be used: list them all and stop (error), or leave them out (skip)."""
