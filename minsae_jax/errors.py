"""Errors that the command line reports as one line, without a traceback."""

import os
import re


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


def brief(error: BaseException, limit: int = 200) -> str:
    """Return the error's message on one line, cut after `limit` characters.

    >>> brief(ValueError("two\\n  lines"))
    'two lines'
    """
    return " ".join(str(error).split())[:limit]


def is_system_error(error: BaseException) -> bool:
    """Return whether the system failed to read an existing file, which need not be damaged."""
    is_missing = isinstance(error, FileNotFoundError)
    return isinstance(error, OSError) and error.errno is not None and not is_missing


def system_reason(error: BaseException) -> str:
    """Return why a file could not be written, such as "No space left on device".

    TensorStore raises several types, with the system's error at the end of a long message.

    >>> system_reason(ValueError("RESOURCE_EXHAUSTED: Error writing … [os_error_code='28']"))
    'No space left on device'
    """
    code = re.search(r"os_error_code='(\d+)'", str(error))
    if code:
        return os.strerror(int(code[1]))
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return brief(error)
