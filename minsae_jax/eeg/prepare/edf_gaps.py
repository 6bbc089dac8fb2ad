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

HEADER_BYTES = 256  # of the file, and of each of its channels
ANNOTATIONS = ("EDF Annotations", "BDF Annotations")  # labels of channels
SAMPLE_BYTES = {b"EDF+D": 2, b"BDF+D": 3}
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


def read_records(path: Path) -> Records | None:
    """Return the records of a discontinuous file; None for any other.

    Raises ValueError or IndexError if its header or a record's time is invalid.
    """
    with path.open("rb") as file:
        header = file.read(HEADER_BYTES)
        sample_bytes = SAMPLE_BYTES.get(header[192:197])
        if sample_bytes is None:
            return None
        n_channels = int(header[252:256])
        of_channels = file.read(HEADER_BYTES * n_channels).decode("latin-1")
        # The fields of all channels one after the other: the label is first, of 16 characters;
        # samples per record are behind 216, of 8.
        labels = [of_channels[16 * i : 16 * i + 16].strip() for i in range(n_channels)]
        sizes = of_channels[216 * n_channels :]
        n_bytes = [sample_bytes * int(sizes[8 * i : 8 * i + 8]) for i in range(n_channels)]
        start = HEADER_BYTES * (1 + n_channels)
        n_records = (path.stat().st_size - start) // sum(n_bytes)
        has_notes = [i for i, label in enumerate(labels) if label in ANNOTATIONS]
        times = []
        notes = []
        for record in range(n_records):
            lists = []
            for i in has_notes:
                file.seek(start + record * sum(n_bytes) + sum(n_bytes[:i]))
                lists += TEXTS.findall(file.read(n_bytes[i]))
            times.append(float(lists[0][0]))
            for onset, duration, texts in lists:
                at = (float(onset) - times[0], float(duration or 0))
                words = texts.decode(errors="replace").split("\x14")
                notes += [Note(*at, text) for text in words if text]
    return Records(float(header[244:252]), np.array(times) - times[0], tuple(notes))
