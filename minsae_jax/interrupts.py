"""Ctrl-C while a command imports modules, which takes seconds where they are not cached.

An interrupted import would print a long traceback, or crash in the native code of JAX.
"""

import os
import signal
import sys
import threading
from types import FrameType

INTERRUPTED = "interrupted; rerun the same command to resume"
INTERRUPTED_CODE = 130


def exit_during_imports() -> None:
    """Let Ctrl-C end this process at once while it imports; at other times nothing changes."""
    # Python allows signal handlers in the main thread only, and a shell can ignore Ctrl-C.
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)


def _interrupt(_: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            print(INTERRUPTED, file=sys.stderr, flush=True)
            os._exit(INTERRUPTED_CODE)
        frame = frame.f_back
    raise KeyboardInterrupt
