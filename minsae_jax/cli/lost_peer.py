"""Ends a process of a cluster with a one-line error when another one is lost.

Two events follow, in either order. The collective that waits for the lost process raises if the
connection is closed. JAX's coordination client prints many lines and aborts: at once if the first
process is lost, to which all are connected, otherwise after a time without a heartbeat. JAX accepts
a callback instead, but cannot call one in Python (in jaxlib 0.10 it ends with std::bad_cast). The
abort is therefore caught as the signal SIGABRT.
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

# Python's own handlers run in the main thread, and not before a native call in it returns. This one
# runs in the thread that aborts.
Handler = ctypes.CFUNCTYPE(None, ctypes.c_int)
_handlers: list[object] = []  # must outlive the call that installs them
_ending = threading.Lock()  # taken by the first thread with an error, and never released


def watch() -> None:
    """End this process with one line and exit code 2 when JAX aborts because of a lost process.

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
            end(_lost_process(messages))
        os.write(stderr, messages.encode())
        faulthandler.dump_traceback()

    handler = Handler(on_abort)
    _handlers.append(handler)
    install = ctypes.CDLL(None).signal
    install.argtypes = (ctypes.c_int, Handler)
    install(signal.SIGABRT, handler)


def end(process: str) -> None:
    """End with exit code 2 and one line about a lost process, even if threads still wait."""
    print_error(f"{process} of the cluster has ended; see its message, then rerun")
    os._exit(2)


def print_error(message: str) -> None:
    """Print the error that ends this process; a thread that comes second prints nothing."""
    if _handlers:
        _ending.acquire()
    print(f"error: {message}", file=sys.stderr, flush=True)


def is_lost(error: Exception) -> bool:
    """Return whether a collective failed because another process has ended."""
    # Gloo is XLA's library for CPUs. Some of its errors are ValueErrors.
    return isinstance(error, RuntimeError | ValueError) and "Gloo" in str(error)


def _lost_process(messages: str) -> str:
    """Return the name of the process that JAX's messages are about.

    >>> _lost_process("tasks are unhealthy (stopped sending heartbeats):\\n1\\nThe tasks")
    'process 1'
    """
    silent = re.search(r"stopped sending heartbeats\):\s*(?:\S*task:)?(\d+)", messages)
    if silent:
        return f"process {silent[1]}"
    # The service runs in the first process.
    of_service = ("Failed to send RPC to coordination service", "CoordinationService/Heartbeat")
    return "process 0" if any(text in messages for text in of_service) else "another process"
