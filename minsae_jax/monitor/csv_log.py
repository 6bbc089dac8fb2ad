"""CSV files that grow by rows and can be resumed at a checkpoint."""

import csv
import io
from collections.abc import Iterable
from pathlib import Path

from minsae_jax.files import atomic_write, regular_file


class Csv:
    """A CSV file that rows are appended to by `flush` and `close`; it is open only then."""

    def __init__(self, path: Path):
        self.path = path
        self._new_buffer()

    def _new_buffer(self) -> None:
        self._rows = io.StringIO(newline="")
        self._writer = csv.writer(self._rows)

    def writerow(self, row: Iterable[object]) -> None:
        self._writer.writerow(row)

    def flush(self) -> None:
        """Write the rows since the last time."""
        text = self._rows.getvalue()
        if not text:
            return
        # Not a second time, should this fail.
        self._new_buffer()
        with self.path.open("a", newline="", encoding="utf-8") as file:
            file.write(text)

    def close(self) -> None:
        self.flush()


def open_csv(path: Path, header: tuple[str, ...], last: int) -> Csv:
    """Open a CSV file for appending, without the rows after a checkpoint.

    Rows are dropped whose first column is above `last` or that were cut off. With `last` = 0 the
    file is new.
    """
    lines = [",".join(header)]
    if last and path.exists():
        text = regular_file(path).read_text(encoding="utf-8", errors="replace")
        for line in text.splitlines()[1:]:
            first = line.split(",", 1)[0]
            if _cell_count(line) == len(header) and first.isdecimal() and int(first) <= last:
                lines.append(line)
    # The line breaks of csv.writer, which appends the later rows.
    with atomic_write(path) as temporary:
        temporary.write_text("\r\n".join(lines) + "\r\n", newline="")
    return Csv(path)


def _cell_count(line: str) -> int:
    # The csv module is slow on act_freqs.csv, which has a column for each feature; it is only
    # needed for quoted cells.
    if '"' in line:
        return len(next(csv.reader([line])))
    return line.count(",") + 1
