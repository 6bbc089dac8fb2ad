"""Ends a process of a cluster with a one-line error when another one is lost or does not start.

When a process is lost, two events follow, in either order. The collective that waits for it raises
if the connection is closed. JAX's coordination client prints many lines and aborts: at once if the
first process is lost, to which all are connected, otherwise after a time without a heartbeat. JAX
accepts a callback instead, but cannot call one in Python (in jaxlib 0.10 it ends with
std::bad_cast). The abort is therefore caught as the signal SIGABRT.
"""

import ctypes
import faulthandler
import os
import re
import signal
import sys
import tempfile
import threading

from minsae_jax.cli.memory import redirect_native_output

MAX_BYTES = 1_000_000  # of native messages that are read
LOST = "{} of the cluster has ended; see its message, then rerun"
NOT_STARTED = "a process of the cluster did not start; start all with the same command"

# Python's own handlers run in the main thread, and not before a native call in it returns. This one
# runs in the thread that aborts.
Handler = ctypes.CFUNCTYPE(None, ctypes.c_int)
_handlers: list[object] = []  # must outlive the call that installs them
_printing = threading.Lock()
_has_printed = False


def watch() -> None:
    """End this process with one line and exit code 2 when JAX aborts because of another process.

    Output of native code to stderr goes to a temporary file, and is shown only if the process
    aborts for another reason. With --debug nothing changes.
    """
    if "--debug" in sys.argv:
        return
    native = tempfile.TemporaryFile()  # noqa: SIM115
    stderr = redirect_native_output(native)
    faulthandler.enable()

    def on_abort(_: int) -> None:
        messages = os.pread(native.fileno(), MAX_BYTES, 0).decode(errors="replace")
        if "distributed service detected fatal errors" in messages:
            end(_reason(messages))
        os.write(stderr, messages.encode())
        faulthandler.dump_traceback()

    handler = Handler(on_abort)
    _handlers.append(handler)
    install = ctypes.CDLL(None).signal
    install.argtypes = (ctypes.c_int, Handler)
    install(signal.SIGABRT, handler)


def end(message: str) -> None:
    """End with exit code 2 and one line, even if threads still wait for a lost process."""
    print_error(message)
    os._exit(2)


def print_error(message: str) -> None:
    """Print the error that ends this process; in a cluster, a thread that comes second does not."""
    global _has_printed
    with _printing:
        if not (_handlers and _has_printed):
            print(f"error: {message}", file=sys.stderr, flush=True)
        _has_printed = True


def is_lost(error: Exception) -> bool:
    """Return whether a collective failed because another process has ended."""
    # Gloo is XLA's library for CPUs. Some of its errors are ValueErrors.
    return isinstance(error, RuntimeError | ValueError) and "Gloo" in str(error)


def _reason(messages: str) -> str:
    """Return what JAX's messages say of another process.

    >>> _reason("tasks are unhealthy (stopped sending heartbeats):\\n1\\nThe tasks")
    'process 1 of the cluster has ended; see its message, then rerun'
    """
    # The call by which a process joins, and waits for the others.
    if "CoordinationService/RegisterTask" in messages:
        return NOT_STARTED
    silent = re.search(r"stopped sending heartbeats\):\s*(?:\S*task:)?(\d+)", messages)
    if silent:
        return LOST.format(f"process {silent[1]}")
    # The service runs in the first process.
    of_service = ("Failed to send RPC to coordination service", "CoordinationService/Heartbeat")
    is_first = any(text in messages for text in of_service)
    return LOST.format("process 0" if is_first else "another process")
