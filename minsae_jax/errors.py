"""Errors that the command line reports as one line, without a traceback; texts of messages."""

import errno
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class UserError(Exception):
    """An error that the user can fix. The message is one line: problem, place, remedy.

    Characters that a terminal cannot print are replaced, since messages contain names from files.
    """

    def __init__(self, message: str):
        super().__init__("".join(c if c.isprintable() else "?" for c in message))


class Stopped(KeyboardInterrupt):
    """Clean shutdown after a signal; the message says how to resume."""

    def __init__(self, signal_number: int, message: str):
        super().__init__(message)
        self.exit_code = 128 + signal_number


def brief(text: object, limit: int = 200) -> str:
    """Return a text, such as an error's message, on one line, cut after `limit` characters.

    >>> brief(ValueError("two\\n  lines"))
    'two lines'
    """
    if isinstance(text, UnicodeDecodeError):
        # Python's message names a codec. Some spreadsheets write tables in Latin-1.
        byte = text.object[text.start]
        text = f"its encoding must be {text.encoding.upper()}, got the byte 0x{byte:02x}"
    return " ".join(str(text).split())[:limit]


def join_some(items: Sequence[str], separator: str = ", ", limit: int = 5) -> str:
    """Return the first `limit` items as text, with the number of the others.

    >>> join_some(["a", "b", "c"], limit=2)
    'a, b, and 1 more'
    """
    text = separator.join(items[:limit])
    if len(items) > limit:
        text += f"{separator}and {len(items) - limit} more"
    return text


def is_system_error(error: BaseException) -> bool:
    """Return whether the system failed to read an existing file, which need not be damaged."""
    # EINVAL: a seek before the start of a damaged archive, or a file that is not a regular one.
    return _error_number(error) not in (None, errno.ENOENT, errno.EINVAL)


@contextmanager
def reading(problem: str, remedy: str = "") -> Iterator[None]:
    """Turn all errors of a damaged file, of which libraries raise many types, into one.

    Raises UserError with the problem, the error's message in brackets, and the remedy. Errors of
    the system stay, since that file need not be damaged.
    """
    try:
        yield
    except Exception as e:
        if is_system_error(e):
            raise
        raise UserError(f"{problem} ({brief(e) or type(e).__name__}){remedy}") from e


def system_reason(error: BaseException) -> str:
    """Return why a file could not be read or written, such as "No space left on device".

    >>> system_reason(ValueError("RESOURCE_EXHAUSTED: Error writing … [os_error_code='28']"))
    'No space left on device'
    """
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    number = _error_number(error)
    return brief(error) if number is None else os.strerror(number)


def _error_number(error: BaseException) -> int | None:
    """Return the number of the system's error, if it is one."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    # TensorStore raises several types, with the number at the end of a long message.
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return int(code[1]) if code else None
