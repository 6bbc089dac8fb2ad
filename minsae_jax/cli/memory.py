"""Commands under a limit of memory (`ulimit -v`), where native code ends the process.

XLA and the C library abort with their own stack traces or messages where Python would raise
MemoryError. Under a limit, a command therefore runs in a child process whose native output goes to
a temporary file. If it crashes, its parent reports lack of memory in one line where there are signs
of it, and otherwise shows the end of that output.
"""

import contextlib
import faulthandler
import os
import re
import select
import signal
import sys
import tempfile
from pathlib import Path
from typing import IO

# Exit codes of crashes in native code, where those of signals are negative; 127 is of the loader of
# libraries. Windows lacks some signals.
SIGNALS = ("SIGABRT", "SIGSEGV", "SIGBUS", "SIGILL", "SIGFPE", "SIGTRAP")
CRASHES = {-getattr(signal, name): name for name in SIGNALS if hasattr(signal, name)}
CRASHES[127] = "exit code 127"
SMALLER = "try a smaller --batch_size, --feature_dim_factor or sweep"
# Messages of the C and C++ libraries, the dynamic loader and XLA
OUT_OF_MEMORY = re.compile(
    r"bad_alloc|out of memory|cannot allocate memory|failed to map segment|pthread_create|"
    r"RESOURCE_EXHAUSTED|MemoryError",
    re.IGNORECASE,
)
# LLVM crashes without a message. At a failed request of a few MB, over 99 % of the limit is used.
NEARLY_ALL = 0.9
SAMPLE_SECONDS = 0.05
SHOWN_LINES = 100
SHOWN_BYTES = 100_000


def memory_limit() -> float | None:
    """Return the limit of this process's memory in GB, or None if there is none."""
    try:
        # Windows does not have this module.
        import resource
    except ImportError:
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if limit == resource.RLIM_INFINITY else limit / 1e9


def run_in_child(limit: float) -> None:
    """Return in a new process; this one waits for it and exits with its code. limit: in GB."""
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryFile() as native:
        child = os.fork()
        if child == 0:
            redirect_native_output(native)
            # Where Python was at a crash.
            faulthandler.enable(2)
            return
        # Ctrl-C reaches the child by itself.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for forwarded in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(forwarded, lambda number, _: os.kill(child, number))
        code, peak = _wait(child)
        _report(code, peak, limit, _end_of(native))
    os._exit(code if code >= 0 else 128 - code)


def _report(code: int, peak: float, limit: float, output: str) -> None:
    """Print the error of a child that crashed; exit with code 2 if it lacked memory.

    peak: of its memory in GB, 0 if unknown. output: end of its native output.
    """
    if code not in CRASHES:
        return
    if peak > NEARLY_ALL * limit or OUT_OF_MEMORY.search(output):
        message = f"error: native code crashed, probably for lack of memory, {advice(limit)}"
        print(message, file=sys.stderr, flush=True)
        os._exit(2)
    message = f"{output}\nerror: native code crashed ({CRASHES[code]})"
    print(message.lstrip("\n"), file=sys.stderr, flush=True)


def advice(limit: float) -> str:
    """Return the end of an error message: the limit, and how to avoid it."""
    return f"which is limited to {limit:.1f} GB; raise the limit (ulimit -v), or {SMALLER}"


def _wait(child: int) -> tuple[int, float]:
    """Wait for a process, and return its exit code and the peak of its memory in GB.

    The peak is that of its address space, which `ulimit -v` limits; 0 if it is not known.
    """
    peak = 0.0
    # Only Linux has both.
    with contextlib.suppress(AttributeError, OSError):
        descriptor = os.pidfd_open(child)
        while not select.select([descriptor], [], [], SAMPLE_SECONDS)[0]:
            status = Path(f"/proc/{child}/status").read_text(errors="replace")
            kilobytes = re.search(r"VmPeak:\s*(\d+)", status)
            if kilobytes:
                peak = int(kilobytes[1]) * 1024 / 1e9
    _, status_of_exit = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status_of_exit), peak


def redirect_native_output(native: IO[bytes]) -> int:
    """Write the output of native code to descriptor 2 into a file.

    Return the descriptor of Python's stderr, which writes to where it did before.
    """
    descriptor = 2
    # Python's stderr is another one if this is called twice, and has none in some notebooks.
    with contextlib.suppress(AttributeError, OSError):
        descriptor = sys.stderr.fileno()
    stderr = os.dup(descriptor)
    os.dup2(native.fileno(), 2)
    sys.stderr = os.fdopen(stderr, "w", buffering=1, errors="replace")
    return stderr


def _end_of(file: IO[bytes]) -> str:
    """Return the last lines of a file."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - SHOWN_BYTES, 0))
    text = file.read().decode(errors="replace")
    return "\n".join(text.splitlines()[-SHOWN_LINES:])
