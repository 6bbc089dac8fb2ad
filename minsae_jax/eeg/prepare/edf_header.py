"""Headers of EDF and BDF files: channels and the layout of the records.

The header has 256 bytes, and 256 more for each channel, field by field: the labels of all channels
come first, with 16 characters each, and the samples per record after 216, with 8 each.
"""

from dataclasses import dataclass
from pathlib import Path

HEADER_BYTES = 256  # of the file, and of each of its channels
ANNOTATIONS = ("EDF Annotations", "BDF Annotations")  # labels of channels
SUFFIXES = (".edf", ".bdf")


@dataclass(frozen=True)
class Header:
    """The layout of a file. Tuples have one entry for each channel, with those of annotations."""

    is_discontinuous: bool
    seconds: float  # of each record
    labels: tuple[str, ...]
    n_samples: tuple[int, ...]  # in each record
    sample_bytes: int

    @property
    def size(self) -> int:
        """Number of bytes before the first record."""
        return HEADER_BYTES * (1 + len(self.labels))

    @property
    def samples_of_signals(self) -> list[int]:
        """Number of samples per record of each channel that is not of annotations."""
        channels = zip(self.labels, self.n_samples, strict=True)
        return [n for label, n in channels if label not in ANNOTATIONS]


def read_header(path: Path) -> Header:
    """Read the header of an EDF or BDF file. Raises ValueError if it is invalid."""
    with path.open("rb") as file:
        of_file = file.read(HEADER_BYTES).decode("latin-1")
        n_channels = int(_field(of_file, 252, 4))
        of_channels = file.read(HEADER_BYTES * n_channels).decode("latin-1")
    sizes = [_field(of_channels, 216 * n_channels + 8 * i, 8) for i in range(n_channels)]
    return Header(
        is_discontinuous=of_file[192:197] in ("EDF+D", "BDF+D"),
        seconds=float(_field(of_file, 244, 8)),
        labels=tuple(_field(of_channels, 16 * i, 16) for i in range(n_channels)),
        n_samples=tuple(int(size) for size in sizes),
        sample_bytes=3 if path.suffix.lower() == ".bdf" else 2,
    )


def has_signals(path: Path) -> bool:
    """Return False for an EDF+ or BDF+ file that contains annotations only."""
    if path.suffix.lower() not in SUFFIXES or not path.is_file():
        return True
    try:
        labels = read_header(path).labels
    except (OSError, ValueError):
        return True
    return not labels or any(label not in ANNOTATIONS for label in labels)


def _field(header: str, start: int, length: int) -> str:
    """Return a field without its padding: spaces, or in some files zeros."""
    return header[start : start + length].partition("\0")[0].strip()
