"""Gaps in discontinuous EDF+ and BDF+ files (EDF+D), whose records MNE joins without a word.

Times of annotations are of the clock, so that those after a gap are late, and MNE leaves out those
after the end of the joined records. Each record states when it begins, in its first annotation.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from minsae_jax.eeg.prepare.edf_header import ANNOTATIONS, Header

# Texts at one time: onset, perhaps a duration, and texts; the first of a record has none.
TEXTS = re.compile(rb"([+-]\d+\.?\d*)(?:\x15(\d+\.?\d*))?\x14(.*?)\x14\0", re.DOTALL)
ROUNDING = 1e-3  # of a record's time in seconds


class Note(NamedTuple):
    """An annotation; times in seconds from the start of the first record."""

    onset: float
    duration: float  # 0 if the file gives none
    text: str


@dataclass(frozen=True)
class Records:
    """The records of a discontinuous file, of equal lengths."""

    seconds: float  # of each
    starts: Float[np.ndarray, " records"]  # in seconds from the start of the first
    notes: tuple[Note, ...]

    @property
    def n_gaps(self) -> int:
        return int((np.diff(self.starts) > self.seconds + ROUNDING).sum())

    def without_gaps(self, time: float) -> float:
        """Return a time in the joined records; one in a gap is the end of the record before."""
        record = self._record_at(time)
        return record * self.seconds + min(time - float(self.starts[record]), self.seconds)

    def is_in_gap(self, time: float) -> bool:
        """Return whether a time is after the end of the record that began last."""
        start = float(self.starts[self._record_at(time)])
        return time > start + self.seconds + ROUNDING

    def _record_at(self, time: float) -> int:
        return max(int(np.searchsorted(self.starts, time, side="right")) - 1, 0)


def read_records(path: Path, header: Header) -> Records:
    """Return the records of a discontinuous file.

    Raises ValueError or IndexError if a record's time is invalid.
    """
    n_bytes = [header.sample_bytes * n for n in header.n_samples]
    n_records = (path.stat().st_size - header.size) // sum(n_bytes)
    has_notes = [i for i, label in enumerate(header.labels) if label in ANNOTATIONS]
    times = []
    notes = []
    with path.open("rb") as file:
        for record in range(n_records):
            lists = []
            for i in has_notes:
                file.seek(header.size + record * sum(n_bytes) + sum(n_bytes[:i]))
                lists += TEXTS.findall(file.read(n_bytes[i]))
            times.append(float(lists[0][0]))
            for onset, duration, texts in lists:
                at = (float(onset) - times[0], float(duration or 0))
                notes += [Note(*at, text) for text in _decoded(texts).split("\x14") if text]
    return Records(header.seconds, np.array(times) - times[0], tuple(notes))


def _decoded(texts: bytes) -> str:
    """Return texts as UTF-8, as EDF+ requires, or else as Latin-1, which many programs write."""
    try:
        return texts.decode()
    except UnicodeDecodeError:
        return texts.decode("latin-1")
