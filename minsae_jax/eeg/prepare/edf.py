"""What MNE leaves out of EDF and BDF files: rates and some units of channels, and gaps.

A file is a header, then records of equal lengths in seconds. A record has all samples of the first
channel in its time, then those of the second, and so on. Texts are in channels of annotations.

In discontinuous files (EDF+D, BDF+D), there is time between some records, and MNE joins them
without a warning. It leaves annotations at times of the clock, so that those after a gap are late,
and drops those after the end of the joined records.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float

from minsae_jax.eeg.events import Annotation

SUFFIXES = (".edf", ".bdf")
HEADER_BYTES = 256  # of the file, and of each of its channels
ANNOTATIONS = ("EDF Annotations", "BDF Annotations")  # labels of channels
# MNE knows four spellings of µV and mV, and reads samples in any other unit as volts, which is a
# million times too much for `uv`. µ is here as the Latin-1 characters of its bytes in Latin-1,
# UTF-8 (micro sign, Greek mu), Shift JIS, GBK and DOS. No EEG is in megavolts: MV is mV.
KNOWN_TO_MNE = ("uV", "µV", "\x83ÊV", "mV")
MICROVOLT = re.compile(r"(u|micro|µ|Âµ|Î¼|\x83Ê|¦Ì|æ)V(olts?)?", re.IGNORECASE)
MILLIVOLT = re.compile(r"(m|milli)V(olts?)?", re.IGNORECASE)
# Texts at one time: onset, perhaps a duration after character 21, and texts between characters 20.
# The first such list of a record has no text: its onset is the time at which the record begins.
TEXTS = re.compile(rb"([+-]\d+\.?\d*)(?:\x15(\d+\.?\d*))?\x14(.*?)\x14\0", re.DOTALL)
Texts = tuple[bytes, bytes, bytes]  # onset, duration, texts
ROUNDING = 1e-3  # of a record's time in seconds


@dataclass(frozen=True)
class Header:
    """The layout of a file. Tuples have one entry for each channel, with those of annotations."""

    is_discontinuous: bool
    seconds: float  # of each record
    labels: tuple[str, ...]
    scales: tuple[float, ...]  # that bring the samples to volts after MNE has read them
    n_samples: tuple[int, ...]  # in each record
    sample_bytes: int

    @property
    def signals(self) -> list[int]:
        """Numbers of the channels that are not of annotations, which are those of MNE."""
        return [i for i, label in enumerate(self.labels) if label not in ANNOTATIONS]


def read_header(path: Path) -> Header:
    """Read the header of an EDF or BDF file. Raises ValueError if it is invalid.

    Numbers are texts. Channels are listed field by field: first all labels with 16 characters each,
    after 96 characters per channel the units, and after 216 the samples per record, with 8 each.
    """
    with path.open("rb") as file:
        of_file = file.read(HEADER_BYTES).decode("latin-1")
        n_channels = int(_field(of_file, 252, 4))
        of_channels = file.read(HEADER_BYTES * n_channels).decode("latin-1")
    units = [of_channels[96 * n_channels + 8 * i :][:8] for i in range(n_channels)]
    n_samples = [_field(of_channels, 216 * n_channels + 8 * i, 8) for i in range(n_channels)]
    return Header(
        is_discontinuous=of_file[192:197] in ("EDF+D", "BDF+D"),
        seconds=float(_field(of_file, 244, 8)),
        labels=tuple(_field(of_channels, 16 * i, 16) for i in range(n_channels)),
        scales=tuple(map(_scale, units)),
        n_samples=tuple(map(int, n_samples)),
        sample_bytes=3 if path.suffix.lower() == ".bdf" else 2,
    )


def _field(header: str, start: int, length: int) -> str:
    """Return a field without its padding: spaces, or in some files zeros."""
    return header[start : start + length].partition("\0")[0].strip()


def _scale(unit: str) -> float:
    """Return the factor that MNE leaves out. unit: the field of 8 characters."""
    if unit.strip() in KNOWN_TO_MNE:
        return 1.0
    unit = _field(unit, 0, 8)
    if MICROVOLT.fullmatch(unit):
        return 1e-6
    return 1e-3 if MILLIVOLT.fullmatch(unit) else 1.0


def has_signals(path: Path) -> bool:
    """Return False for an EDF+ or BDF+ file that contains annotations only."""
    if path.suffix.lower() not in SUFFIXES or not path.is_file():
        return True
    try:
        labels = read_header(path).labels
    except (OSError, ValueError):
        return True
    return not labels or any(label not in ANNOTATIONS for label in labels)


@dataclass(frozen=True)
class Records:
    """The records of a discontinuous file."""

    seconds: float  # of each
    starts: Float[np.ndarray, " records"]  # in seconds from the start of the first
    annotations: tuple[Annotation, ...]  # by the clock

    @property
    def n_gaps(self) -> int:
        return int((np.diff(self.starts) > self.seconds + ROUNDING).sum())

    def joined(self, annotations: Iterable[Annotation]) -> tuple[Annotation, ...]:
        """Return annotations by the times of the joined records, without those within a gap."""
        placed = []
        for each in annotations:
            onset = self._joined_time(each.onset)
            duration = self._joined_time(each.onset + each.duration) - onset
            record_end = self.starts[self._record_at(each.onset)] + self.seconds
            if duration > 0 or each.onset <= record_end + ROUNDING:
                placed.append(replace(each, onset=onset, duration=duration))
        return tuple(placed)

    def _joined_time(self, time: float) -> float:
        """Return a time in the joined records; one in a gap is the end of the record before."""
        record = self._record_at(time)
        return record * self.seconds + min(time - float(self.starts[record]), self.seconds)

    def _record_at(self, time: float) -> int:
        """Return the record that began last."""
        return max(int(np.searchsorted(self.starts, time, side="right")) - 1, 0)


def read_records(path: Path, header: Header) -> Records:
    """Return the records of a discontinuous file.

    Raises ValueError or IndexError if a record's time is invalid.
    """
    starts = []
    texts: list[Texts] = []
    for in_record in _texts(path, header):
        starts.append(float(in_record[0][0]))
        texts += in_record
    annotations = _annotations(texts, starts[0])
    return Records(header.seconds, np.array(starts) - starts[0], annotations)


def read_several_lines(path: Path, header: Header) -> tuple[Annotation, ...]:
    """Return the annotations of a continuous file with line breaks, which MNE leaves out."""
    texts = [each for in_record in _texts(path, header) for each in in_record]
    start = 0.0
    # Without a text: the time of the first record, a fraction of a second.
    if texts and not texts[0][2].partition(b"\x14")[0]:
        start = float(texts[0][0])
    return _annotations([each for each in texts if b"\n" in each[2]], start)


def _texts(path: Path, header: Header) -> Iterator[list[Texts]]:
    """Yield the texts of each record."""
    channel_bytes = [header.sample_bytes * n for n in header.n_samples]
    record_bytes = sum(channel_bytes)
    first_record = HEADER_BYTES * (1 + len(header.labels))
    text_channels = [i for i, label in enumerate(header.labels) if label in ANNOTATIONS]
    if not text_channels:
        return
    with path.open("rb") as file:
        for record in range((path.stat().st_size - first_record) // record_bytes):
            in_record = []
            for i in text_channels:
                file.seek(first_record + record * record_bytes + sum(channel_bytes[:i]))
                in_record += TEXTS.findall(file.read(channel_bytes[i]))
            yield in_record


def _annotations(texts: Iterable[Texts], start: float) -> tuple[Annotation, ...]:
    annotations = []
    for onset, duration, kinds in texts:
        for text in filter(None, _decoded(kinds).split("\x14")):
            # One channel at most, as MNE writes it: KIND@@CHANNEL
            kind, *channel = text.split("@@")
            time = float(onset) - start
            annotations.append(Annotation(kind, time, float(duration or 0), tuple(channel)))
    return tuple(annotations)


def _decoded(texts: bytes) -> str:
    """Return texts as UTF-8, as EDF+ requires, or else as Latin-1, which many programs write."""
    try:
        return texts.decode()
    except UnicodeDecodeError:
        return texts.decode("latin-1")
