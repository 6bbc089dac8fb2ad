"""Synthetic EEG as EDF files with annotations, as clinics have them: `minsae demo --edf`."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from minsae_jax.eeg.events import Event
from minsae_jax.eeg.montage import CHANNELS
from minsae_jax.eeg.recordings import SAMPLING_RATE
from minsae_jax.errors import UserError

MICROVOLTS_PER_SD = 20.0
LABELS = {name: f"EEG {name}-REF" for name in CHANNELS}


def write_edf(path: Path, eeg: Float[np.ndarray, "samples 19"], events: Sequence[Event]) -> None:
    """Write a recording in SD as EDF in µV, with its events as annotations.

    Raises UserError if edfio is not installed.
    """
    try:
        import edfio
    except ImportError:
        raise UserError('demo --edf requires edfio: pip install "minsae_jax[eeg]"') from None
    signals = []
    for name, channel in zip(CHANNELS, eeg.T, strict=True):
        signals.append(
            edfio.EdfSignal(
                MICROVOLTS_PER_SD * channel.astype(np.float64),
                sampling_frequency=SAMPLING_RATE,
                label=LABELS[name],
                physical_dimension="uV",
            )
        )
    annotations = []
    for event in events:
        onset = event.start / SAMPLING_RATE
        duration = (event.stop - event.start) / SAMPLING_RATE
        # EDF+ has no field for channels; MNE reads KIND@@CHANNEL, one for each channel.
        for channel in event.channels:
            text = f"{event.kind}@@{LABELS[channel]}"
            annotations.append(edfio.EdfAnnotation(onset, duration, text))
    edfio.Edf(signals, annotations=annotations).write(path)
