"""CSV files that grow by rows and can be resumed at a checkpoint; open only during a write.

While one is being written, its last line may be incomplete; readers ignore that line.
"""

import csv
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from minsae_jax.errors import UserError, reading
from minsae_jax.files import atomic_write, named_errors, regular_file

RESTORE = "; restore the file or train the run again"


def start_csv(path: Path, header: tuple[str, ...], last: int) -> None:
    """Write a CSV file with its header, and without the rows after a checkpoint.

    Rows are dropped whose first column is above `last` or that were cut off. With `last` = 0 the
    file is new.
    """
    before = b""
    lines = [",".join(header)]
    if last and path.exists():
        before = regular_file(path).read_bytes()
        for line in before.decode(errors="replace").splitlines()[1:]:
            first = line.split(",", 1)[0]
            if _cell_count(line) == len(header) and first.isdecimal() and int(first) <= last:
                lines.append(line)
    # The line breaks of csv.writer, which appends the later rows.
    content = ("\r\n".join(lines) + "\r\n").encode()
    # Those of a sweep's members can be gigabytes, and mostly no row is dropped.
    if content != before:
        with atomic_write(path) as temporary:
            temporary.write_bytes(content)


def append_rows(path: Path, rows: Iterable[Iterable[object]]) -> None:
    """Add rows at the end of a CSV file."""
    with named_errors(path), path.open("a", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def _cell_count(line: str) -> int:
    # The csv module is slow on act_freqs.csv, which has a column for each feature; it is only
    # needed for quoted cells.
    if '"' in line:
        return len(next(csv.reader([line])))
    return line.count(",") + 1


def complete_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a file that end with a line break."""
    with regular_file(path).open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.endswith("\n"):
                yield line.rstrip("\n")


def parse_rows(
    path: Path, lines: Sequence[str], n_columns: int
) -> Float[np.ndarray, "rows columns"]:
    """Return the numbers in some lines of a CSV file. Raises UserError if it is damaged."""
    if not lines:
        return np.zeros((0, n_columns))
    with reading(f"{path} is damaged", remedy=RESTORE):
        table = np.loadtxt(lines, delimiter=",", ndmin=2, comments=None)
    if table.shape != (len(lines), n_columns):
        raise damaged(path, f"expected {n_columns} columns, got {table.shape[1]}")
    return table


def damaged(path: Path, reason: str) -> UserError:
    """Return the error for a damaged file of metrics."""
    return UserError(f"{path} is damaged ({reason}){RESTORE}")
