"""Progress bars on stderr, which are lines in a log file where stderr is not a terminal."""

import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

from tqdm import tqdm

COUNTS = "{n_fmt}/{total_fmt}, {remaining} left, {rate_noinv_fmt}{postfix}"
BAR = "{desc} {percentage:.0f}%|{bar}| " + COUNTS
LINE = "{desc} {percentage:.0f}%, " + COUNTS
START_LINE = "{desc} {percentage:.0f}%, {n_fmt}/{total_fmt}{postfix}"  # there is no rate yet
LINE_SECONDS = 10.0  # from one line to the next


class Bar:
    """A progress bar: title, percentage, count, time left, rate, and a note if there is one."""

    def __init__(self, title: str, total: int, unit: str, delay: float):
        self._tqdm = tqdm(
            total=total,
            desc=title,
            unit=f" {unit}",
            bar_format=BAR,
            dynamic_ncols=True,
            delay=delay,
        )

    def start_at(self, done: int) -> None:
        """Set the count that was reached before; it does not enter the rate."""
        self._tqdm.initial = done
        self._tqdm.n = done

    def advance(self, count: int) -> None:
        """Add to the count."""
        self._tqdm.update(count)

    def note(self, text: str) -> None:
        """Show a text after the rate; a log file shows it from the next line on."""
        self._tqdm.set_postfix_str(text)

    def print(self, line: str) -> None:
        """Print a line above the bar; may be called in another thread."""
        self._tqdm.write(line, file=sys.stderr)

    def close(self) -> None:
        self._tqdm.close()


class _Lines(Bar):
    """The same as lines: one after `delay`, then one every LINE_SECONDS, and one at the end.

    Rates do not include the first call of `advance`, before which programs are compiled.
    """

    def __init__(self, title: str, total: int, unit: str, delay: float):
        self._title = title
        self._total = total
        self._unit = unit
        self._note = ""
        self._initial = 0  # count from which the rate is measured
        self._count = 0
        self._has_begun = False
        self._shown: int | None = None  # count of the last line
        self._started = time.monotonic()
        self._first_due = self._started + delay
        self._due = self._first_due

    def start_at(self, done: int) -> None:
        self._initial = done
        self._count = done

    def advance(self, count: int) -> None:
        self._count += count
        if not self._has_begun:
            self._has_begun = True
            self._initial = self._count
            self._started = time.monotonic()
        if time.monotonic() >= self._due:
            self._print()

    def note(self, text: str) -> None:
        self._note = text

    def print(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        if time.monotonic() >= self._first_due and self._shown != self._count:
            self._print()

    def _print(self) -> None:
        now = time.monotonic()
        self._due = now + LINE_SECONDS
        self._shown = self._count
        # tqdm itself would print lines that end in \r and, at last, an empty one.
        line = tqdm.format_meter(
            self._count,
            self._total,
            now - self._started,
            prefix=self._title,
            unit=f" {self._unit}",
            bar_format=LINE if self._count > self._initial else START_LINE,
            postfix=self._note,
            initial=self._initial,
        )
        print(line, file=sys.stderr, flush=True)


@contextmanager
def progress(title: str, total: int, unit: str, delay: float = 0.0) -> Iterator[Bar]:
    """Show the progress of a block that calls `advance`, once it has taken `delay` seconds.

    If stderr is not a terminal, a line is printed every ten seconds instead of a bar.
    """
    kind = Bar if sys.stderr.isatty() else _Lines
    with closing(kind(title, total, unit, delay)) as bar:
        yield bar
