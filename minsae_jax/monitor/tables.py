"""Tables and paragraphs for the terminal, and percentages and counts in sentences."""

import shutil
import textwrap

from tqdm import tqdm

MAX_COLUMNS = 100  # of a paragraph


def table(columns: list[str], rows: list[list[str]]) -> str:
    """Return the rows below their titles, the first column aligned left and the others right.

    >>> print(table(["member", "λ"], [["lambda=10", "10"]]))
    member      λ
    lambda=10  10
    """
    lines = [columns, *rows]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    rows_of_text = []
    for first, *others in lines:
        aligned = map(str.rjust, others, widths[1:])
        rows_of_text.append("  ".join([first.ljust(widths[0]), *aligned]))
    return "\n".join(rows_of_text)


def wrap(text: str) -> str:
    """Return a text in lines as wide as the terminal, at most MAX_COLUMNS.

    All but the first are indented. Longer words, such as paths, are not broken.
    """
    columns = shutil.get_terminal_size(fallback=(MAX_COLUMNS, 24)).columns
    return textwrap.fill(
        text,
        min(columns, MAX_COLUMNS),
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def percent(share: float, digits: int = 0) -> str:
    """Return a share for a sentence; columns of tables have no space before the sign.

    >>> percent(0.95)
    '95 %'
    """
    return f"{100 * share:.{digits}f} %"


def size_text(n_bytes: int) -> str:
    """Return a number of bytes in MB, or in GB from one GB on.

    >>> size_text(38_600_000), size_text(2_500_000_000)
    ('38.6 MB', '2.5 GB')
    """
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"


def short_count(count: float) -> str:
    """Return three digits of a count, with k for thousands and M for millions.

    >>> short_count(3318.2)
    '3.32k'
    """
    return tqdm.format_sizeof(count)
