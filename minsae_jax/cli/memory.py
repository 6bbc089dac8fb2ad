"""Commands under a limit of memory (`ulimit -v`), where native code ends the process.

XLA and the C library abort with their own stack traces or messages where Python would raise
MemoryError. Under a limit, a command therefore runs in a child process without native output, and
its parent reports the error in one line.
"""

import os
import signal
import sys

# How native code ends a process that gets no memory; 127 is the dynamic loader.
FAILURES = (-signal.SIGABRT, -signal.SIGSEGV, -getattr(signal, "SIGBUS", 0), 127)
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
    """Return in a new process; this one waits for it and exits with its code."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        _silence_native_code()
        return
    # Ctrl-C reaches the child by itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, _: os.kill(child, number))
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code in FAILURES:
        message = f"error: native code crashed, probably for lack of memory, {advice(limit)}"
        print(message, file=sys.stderr, flush=True)
        os._exit(2)
    os._exit(code if code >= 0 else 128 - code)


def advice(limit: float) -> str:
    """Return the end of an error message: the limit, and how to avoid it."""
    return f"which is limited to {limit:.1f} GB; raise the limit (ulimit -v), or {SMALLER}"


def _silence_native_code() -> None:
    """Discard the output of native code to descriptor 2; Python's stderr stays."""
    stderr = os.dup(2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    sys.stderr = open(stderr, "w", buffering=1, errors="replace")  # noqa: SIM115
