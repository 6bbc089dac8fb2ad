"""Commands under a limit of memory (`ulimit -v`), where native code ends the process.

XLA and the C library abort with their own stack traces or messages where Python would raise
MemoryError. Under a limit, a command therefore runs in a child process without the output of native
code, and its parent reports a crash in one line.
"""

import contextlib
import os
import signal
import sys
from typing import IO

# Exit codes of crashes in native code, where those of signals are negative; 127 is of the loader of
# libraries. Windows lacks some signals.
SIGNALS = ("SIGABRT", "SIGSEGV", "SIGBUS", "SIGILL", "SIGFPE", "SIGTRAP")
CRASHES = {-getattr(signal, name): name for name in SIGNALS if hasattr(signal, name)}
CRASHES[127] = "exit code 127"
SMALLER = "try a smaller --batch_size, --feature_dim_factor or sweep"


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
    child = os.fork()
    if child == 0:
        with open(os.devnull, "wb") as nowhere:
            redirect_native_output(nowhere)
        return
    # Ctrl-C reaches the child by itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        # nohup ignores SIGHUP, and so does the child then.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, _: os.kill(child, number))
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code in CRASHES:
        print(
            f"error: native code crashed ({CRASHES[code]}; --debug shows its output), probably for "
            f"lack of memory, {advice(limit)}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)
    os._exit(code if code >= 0 else 128 - code)


def advice(limit: float) -> str:
    """Return the end of an error message: the limit, and how to avoid it."""
    return f"which is limited to {limit:.1f} GB; raise the limit (ulimit -v), or {SMALLER}"


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
