"""One reading of hostile input, and what is promised of it."""

import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from minsae_jax.errors import UserError

CPU_SECONDS = 10.0  # a case that takes longer hangs
WAIT_SECONDS = 120.0  # likewise, if it waits; other programs may keep the processor busy
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
    slowest: float = 0.0  # seconds of CPU time
    memory: int = 0  # most additional bytes while one case was read

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
        assert not _events, _events
    finally:
        _events = None


@contextmanager
def _limited_time() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hang

    timers = (
        (signal.SIGPROF, signal.ITIMER_PROF, CPU_SECONDS),
        (signal.SIGALRM, signal.ITIMER_REAL, WAIT_SECONDS),
    )
    for number, timer, seconds in timers:
        signal.signal(number, stop)
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for number, timer, _ in timers:
            signal.setitimer(timer, 0)
            signal.signal(number, signal.SIG_DFL)


def attempt(read: Callable[[], object], names: str, tally: Tally) -> None:
    """Read hostile input: it is accepted, or refused in one short line with `names` in it.

    Anything else fails: other errors, warnings of libraries, a case that hangs, code that runs.
    """
    started = time.process_time()
    memory = reset_peak_memory()
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
    tally.memory = max(tally.memory, peak_memory() - memory)
    tally.slowest = max(tally.slowest, time.process_time() - started)


def reset_peak_memory() -> int:
    """Return the memory of this process in bytes, from which its peak is measured anew."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_memory()


def peak_memory() -> int:
    """Return the largest memory of this process since the last reset, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (peak,) = [line for line in lines if line.startswith("VmHWM")]
    return int(peak.split()[1]) << 10
