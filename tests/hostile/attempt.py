"""One reading of hostile input, and what is promised of it."""

import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from minsae_jax.errors import UserError

SECONDS = 10.0  # a case that takes longer hangs
MESSAGE_LENGTH = (15, 2000)  # characters
# What reading a file must not do, as Python's audit events.
FORBIDDEN = ("os.", "subprocess.", "socket.", "pickle.find_class", "ctypes.", "shutil.", "exec")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
ALLOWED = ("os.listdir", "os.scandir", "os.walk", "os.fwalk")


class Hang(BaseException):
    """A case took too long; no handler of errors may catch this."""


@dataclass
class Tally:
    """What happened in all cases of one input."""

    accepted: int = 0
    refused: int = 0
    slowest: float = 0.0  # seconds
    messages: set[str] = field(default_factory=set)

    @property
    def tried(self) -> int:
        return self.accepted + self.refused


_events: list[str] | None = None  # audit events of the case that is being read


def _watch(event: str, args: tuple[object, ...]) -> None:
    if _events is None or event in ALLOWED:
        return
    if event.startswith(FORBIDDEN):
        _events.append(f"{event} {str(args)[:80]}")
    elif event == "open" and isinstance(args[2], int) and args[2] & WRITING:
        _events.append(f"writes {args[0]}")


sys.addaudithook(_watch)


@contextmanager
def _audited() -> Iterator[None]:
    """Fail if the block runs code, starts a program, or writes a file."""
    global _events
    _events = []
    try:
        yield
        assert _events == []
    finally:
        _events = None


@contextmanager
def _limited_time() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def attempt(read: Callable[[], object], names: str, tally: Tally) -> None:
    """Read hostile input: it is accepted, or refused in one short line with `names` in it.

    Anything else fails: other errors, warnings of libraries, more than SECONDS, code that runs.
    """
    started = time.perf_counter()
    try:
        with warnings.catch_warnings(), _limited_time(), _audited():
            warnings.simplefilter("error")
            # Those of this project are for the user, in one line each.
            warnings.filterwarnings("ignore", category=UserWarning)
            read()
        tally.accepted += 1
    except UserError as e:
        message = str(e)
        assert message.isprintable()
        assert MESSAGE_LENGTH[0] <= len(message) <= MESSAGE_LENGTH[1], message[:3000]
        assert names in message, message
        tally.refused += 1
        tally.messages.add(message)
    tally.slowest = max(tally.slowest, time.perf_counter() - started)
