"""Feature frequencies of a member: on how many tokens of a log interval each feature was active.

They are the rows of act_freqs.csv, as in the PyTorch minSAE. For 131,072 features and 10,000 log
intervals that would be 5 GB of text, so beyond MAX_CSV_NUMBERS they go to act_freqs.npy instead,
a structured array with a row for each log interval:

    table = np.load("act_freqs.npy")
    table["step"]    # int64 [rows]: tokens trained on, like the column `step` of the CSV
    table["active"]  # int32 [rows, d_sae]

Beyond MAX_NUMBERS there are only the rows of every n-th log interval, beginning with the first.

Why .npy: NumPy pads the header so that a file can grow, and rows of one size can be found, and cut
off at a checkpoint, by their number. A row is written before the header counts it, so a reader, or
a resumed run, never sees half of one. Compressed rows are a third to a half of the size, but would
need an index, which a kill can separate from the rows.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from minsae_jax.errors import reading
from minsae_jax.files import HEADER_LOCK, atomic_write, named_errors
from minsae_jax.monitor.csv_log import (
    RESTORE,
    append_rows,
    complete_lines,
    damaged,
    parse_rows,
    start_csv,
)

ACT_FREQS_CSV = "act_freqs.csv"
ACT_FREQS_NPY = "act_freqs.npy"
MAX_CSV_NUMBERS = 2**24  # 40 to 100 MB of text
MAX_NUMBERS = 2**26  # 256 MiB


def open_frequencies(
    folder: Path, d_sae: int, n_intervals: int, tokens: int
) -> "FrequencyCsv | FrequencyArray":
    """Open the file of a member, without the rows after a checkpoint at `tokens`; 0 for a new one.

    n_intervals: log intervals of the whole run. Raises UserError if the file of a resumed run is
    damaged.
    """
    # Runs of earlier versions have a CSV of any size.
    is_old = tokens > 0 and (folder / ACT_FREQS_CSV).exists()
    if is_old or d_sae * n_intervals <= MAX_CSV_NUMBERS:
        return FrequencyCsv(folder / ACT_FREQS_CSV, d_sae, tokens)
    stride = interval_stride(d_sae, n_intervals)
    return FrequencyArray(folder / ACT_FREQS_NPY, d_sae, stride, tokens)


def interval_stride(d_sae: int, n_intervals: int) -> int:
    """Return n, if every n-th log interval gets a row of act_freqs.npy: a power of two.

    So members of several sizes have rows of the same log intervals.

    >>> interval_stride(d_sae=131_072, n_intervals=10_000)
    32
    """
    stride = 1
    while d_sae * -(-n_intervals // stride) > MAX_NUMBERS:
        stride *= 2
    return stride


class FrequencyCsv:
    """Rows of act_freqs.csv."""

    def __init__(self, path: Path, d_sae: int, tokens: int):
        self.path = path
        features = [f"feat_{i}" for i in range(d_sae)]
        # Its column `step` counts tokens, as in the PyTorch minSAE.
        start_csv(path, ("step", *features), last=tokens)
        self._rows: list[tuple[int, Int[np.ndarray, " d_sae"]]] = []  # added, not written

    def add(self, interval: int, tokens: int, active: Int[np.ndarray, " d_sae"]) -> None:
        """Add the row of log interval number `interval`, from 0, which ended after `tokens`."""
        # As an array, a row takes a tenth of the memory of a list.
        self._rows.append((tokens, active))

    def write(self) -> None:
        """Write the rows added since the last write; after an error they are lost."""
        rows = self._rows
        self._rows = []
        append_rows(self.path, ([tokens, *active.tolist()] for tokens, active in rows))


class FrequencyArray:
    """Rows of act_freqs.npy."""

    def __init__(self, path: Path, d_sae: int, stride: int, tokens: int):
        self.path = path
        self._dtype = row_dtype(d_sae)
        self._stride = stride
        self._n_rows = 0
        self._rows: list[bytes] = []  # added, not written
        if tokens and path.exists():
            table = _open_array(path)
            if table.dtype != self._dtype:
                raise damaged(path, f"it does not have {d_sae} features")
            steps = table.steps()
            self._n_rows = int(((steps > 0) & (steps <= tokens)).sum())
        else:
            with atomic_write(path) as temporary:
                temporary.write_bytes(_header(self._dtype, 0))
        with path.open("r+b") as file:
            # First the number of rows: a reader must not look for those that are cut off.
            file.write(_header(self._dtype, self._n_rows))
            file.flush()
            file.truncate(self._row_offset())

    def _row_offset(self) -> int:
        return len(_header(self._dtype, 0)) + self._n_rows * self._dtype.itemsize

    def add(self, interval: int, tokens: int, active: Int[np.ndarray, " d_sae"]) -> None:
        """Add the row of log interval number `interval`, from 0, which ended after `tokens`."""
        if interval % self._stride == 0:
            self._rows.append(np.array((tokens, active), self._dtype).tobytes())

    def write(self) -> None:
        """Write the rows added since the last write; after an error they are lost."""
        rows = self._rows
        self._rows = []
        if not rows:
            return
        with named_errors(self.path), self.path.open("r+b") as file:
            file.seek(self._row_offset())
            file.write(b"".join(rows))
            # The rows must be there when the header counts them.
            file.flush()
            self._n_rows += len(rows)
            file.seek(0)
            file.write(_header(self._dtype, self._n_rows))


def row_dtype(d_sae: int) -> np.dtype:
    """Return the dtype of a row of act_freqs.npy."""
    return np.dtype([("step", "<i8"), ("active", "<i4", (d_sae,))])


def _header(dtype: np.dtype, n_rows: int) -> bytes:
    """Return the header of a .npy file, whose length does not depend on the number of rows."""
    buffer = io.BytesIO()
    description = np.lib.format.dtype_to_descr(dtype)
    header = {"descr": description, "fortran_order": False, "shape": (n_rows,)}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue()


@dataclass(frozen=True)
class CsvTable:
    """The rows of an act_freqs.csv, which may be growing."""

    path: Path
    d_sae: int

    def steps(self) -> Int[np.ndarray, " rows"]:
        """Return the tokens trained on at the end of each row's log interval."""
        with reading(f"{self.path} is damaged", remedy=RESTORE):
            return np.array([int(line.partition(",")[0]) for line in self._lines()], np.int64)

    def read(self, rows: Sequence[int]) -> Float[np.ndarray, "rows d_sae"]:
        """Return the numbers of active tokens of some rows, in order."""
        # Only these are parsed: with large d_sae the whole table does not fit into memory.
        selected = set(rows)
        lines = [line for row, line in enumerate(self._lines()) if row in selected]
        return parse_rows(self.path, lines, 1 + self.d_sae)[:, 1:]

    def _lines(self) -> Iterator[str]:
        return islice(complete_lines(self.path), 1, None)


@dataclass(frozen=True)
class ArrayTable:
    """The rows of an act_freqs.npy, which may be growing."""

    path: Path
    dtype: np.dtype
    n_rows: int
    offset: int  # of the first row, in bytes

    @property
    def d_sae(self) -> int:
        return self.dtype["active"].shape[0]

    def steps(self) -> Int[np.ndarray, " rows"]:
        """Return the tokens trained on at the end of each row's log interval."""
        steps = []
        # Not by a memory map: should a resumed run cut the file meanwhile, that kills the process.
        with self.path.open("rb") as file:
            for row in range(self.n_rows):
                file.seek(self.offset + row * self.dtype.itemsize)
                steps.append(int.from_bytes(file.read(8), "little"))
        return np.array(steps, np.int64)

    def read(self, rows: Sequence[int]) -> Int[np.ndarray, "rows d_sae"]:
        """Return the numbers of active tokens of some rows."""
        active = []
        with self.path.open("rb") as file:
            for row in rows:
                file.seek(self.offset + row * self.dtype.itemsize)
                content = file.read(self.dtype.itemsize)
                if len(content) < self.dtype.itemsize:
                    raise damaged(self.path, f"row {row + 1} is incomplete")
                active.append(np.frombuffer(content, self.dtype)["active"][0])
        return np.stack(active)


def open_table(folder: Path) -> CsvTable | ArrayTable:
    """Open the frequencies of a member. Raises UserError if the file is damaged."""
    array = folder / ACT_FREQS_NPY
    if array.exists():
        return _open_array(array)
    path = folder / ACT_FREQS_CSV
    d_sae = next(complete_lines(path), "").count(",")
    if d_sae == 0:
        raise damaged(path, "it has no header")
    return CsvTable(path, d_sae)


def _open_array(path: Path) -> ArrayTable:
    with reading(f"{path} is damaged", remedy=RESTORE):
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            if version != (1, 0):
                raise ValueError(f"its format is {version}")
            with HEADER_LOCK:
                (n_rows,), _, dtype = np.lib.format.read_array_header_1_0(file)
            offset = file.tell()
            n_bytes = file.seek(0, io.SEEK_END) - offset
        table = ArrayTable(path, dtype, min(n_rows, n_bytes // dtype.itemsize), offset)
        if dtype != row_dtype(table.d_sae):
            raise ValueError(f"its dtype is {dtype}")
    return table
