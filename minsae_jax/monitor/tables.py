"""Tables for the terminal, and percentages and counts in sentences."""

from tqdm import tqdm


def table(columns: list[str], rows: list[list[str]]) -> str:
    """Return the rows below their titles, the first column aligned left and the others right.

    >>> print(table(["member", "λ"], [["lambda=10", "10"]]))
    member      λ
    lambda=10  10
    """
    lines = [columns, *rows]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    return "\n".join(_line(cells, widths) for cells in lines)


def percent(share: float, digits: int = 0) -> str:
    """Return a share for a sentence; columns of tables have no space before the sign.

    >>> percent(0.95)
    '95 %'
    """
    return f"{100 * share:.{digits}f} %"


def short_count(count: float) -> str:
    """Return three digits of a count, with k for thousands and M for millions.

    >>> short_count(3318.2)
    '3.32k'
    """
    return tqdm.format_sizeof(count)


def _line(cells: list[str], widths: list[int]) -> str:
    first = cells[0].ljust(widths[0])
    others = map(str.rjust, cells[1:], widths[1:])
    return "  ".join([first, *others])
