"""CSV files that grow by rows and can be resumed at a checkpoint; open only during a write."""

import csv
from collections.abc import Iterable
from pathlib import Path

from minsae_jax.files import atomic_write, regular_file


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
    with path.open("a", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def _cell_count(line: str) -> int:
    # The csv module is slow on act_freqs.csv, which has a column for each feature; it is only
    # needed for quoted cells.
    if '"' in line:
        return len(next(csv.reader([line])))
    return line.count(",") + 1
