"""The process of a command: exit codes, and one line for every error and warning."""

import contextlib
import faulthandler
import io
import logging
import os
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator

from minsae_jax.cli import lost_peer
from minsae_jax.cli.memory import SMALLER, advice, memory_limit, run_in_child
from minsae_jax.errors import Stopped, UserError, brief
from minsae_jax.interrupts import INTERRUPTED, INTERRUPTED_CODE

EXIT_SECONDS = 30  # that other threads may take to end after an error
_is_command = False


def is_command() -> bool:
    """Return whether this process runs a command, and not a program that imports the package."""
    return _is_command


def run(main: Callable[[list[str]], None], args: list[str] | None = None) -> None:
    """Call `main` with the arguments and exit: 0 on success, 2 after an error, 130 on Ctrl-C.

    Errors that a user can fix (UserError, OSError, too little memory) are printed as one line;
    `--debug` adds the traceback. Warnings are one line each.
    """
    if args is None:
        args = sys.argv[1:]
    debug = "--debug" in args
    _open_missing_streams()
    limit = memory_limit()
    if limit is not None and not debug:
        run_in_child(limit)
    for stream in (sys.stdout, sys.stderr):
        # Some terminals cannot print λ; in tests these are other streams.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    warnings.showwarning = _print_warning
    if not debug:
        _silence_libraries()
    if limit is None or debug:
        # If native code crashes, print where Python was; needs a real stderr.
        with contextlib.suppress(io.UnsupportedOperation, AttributeError):
            faulthandler.enable()
    try:
        with _as_command():
            main([argument for argument in args if argument != "--debug"])
        # Flushed here, so that a closed pipe raises inside this block.
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of our output has closed it, as `head` does. Python would fail again when it
        # flushes stdout at exit, so the rest goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Stopped as e:
        try:
            print(e, file=sys.stderr)
        except OSError:
            # After SIGHUP there is no terminal any more, and Python would fail again at exit.
            os._exit(e.exit_code)
        sys.exit(e.exit_code)
    except KeyboardInterrupt:
        print(INTERRUPTED, file=sys.stderr)
        sys.exit(INTERRUPTED_CODE)
    except Exception as e:
        if debug:
            traceback.print_exc()
        if lost_peer.is_lost(e):
            lost_peer.end(lost_peer.LOST.format("another process"))
        message = _user_message(e)
        if message is None and limit is not None:
            # Imports fail in many ways without memory.
            reason = f"{type(e).__name__}: {brief(e, 150)}"
            message = f"{reason}, perhaps for lack of memory, {advice(limit)}"
        if message is None and not debug:
            raise
        lost_peer.print_error(message or brief(e))
        _leave_cluster()
        _limit_exit()
        sys.exit(2)


@contextlib.contextmanager
def _as_command() -> Iterator[None]:
    global _is_command
    _is_command = True
    try:
        yield
    finally:
        _is_command = False


def _open_missing_streams() -> None:
    """Replace closed streams, such as those of a service, by ones that discard output.

    Otherwise files get the numbers of these streams, and native code prints into them.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # The lowest free number is that of the stream.
            descriptor = os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, os.fdopen(descriptor, mode))


def _silence_libraries() -> None:
    """Turn off messages of libraries about errors that they also raise.

    Orbax and asyncio log them with tracebacks, and threads and destructors print them, also while
    the interpreter exits.
    """
    logging.disable()
    # Of a save that Orbax has given up.
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    # XLA's own, which it reads when it is loaded.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    threading.excepthook = _ignore
    sys.unraisablehook = _ignore


def _ignore(_: object) -> None:
    pass


def _leave_cluster() -> None:
    """End a process of a cluster after an error, in which threads may wait for other processes."""
    jax = sys.modules.get("jax")
    if jax is None or not jax.distributed.is_initialized():
        return
    sys.stdout.flush()
    sys.stderr.flush()
    # Waits for the other processes, so that they can print their errors too.
    with contextlib.suppress(Exception):
        jax.distributed.shutdown()
    os._exit(2)


def _limit_exit() -> None:
    """End this process some time after its main thread, even if other threads never end.

    Python waits for them. Orbax's wait for one another if the clock jumps while it saves.
    """
    main = threading.main_thread()
    if all(thread is main or thread.daemon for thread in threading.enumerate()):
        return
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()

    def end() -> None:
        main.join()
        time.sleep(EXIT_SECONDS)
        os._exit(2)

    try:
        threading.Thread(target=end, daemon=True).start()
    except RuntimeError:
        # There is no memory for another thread.
        os._exit(2)


def _print_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _user_message(error: Exception) -> str | None:
    """Return the message for the user, or None if the error is a bug."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        place = f": {error.filename}" if error.filename else ""
        return f"{error.strerror or error}{place}"
    # XLA's errors are RuntimeErrors that begin with a status code, or the C++ error's name.
    is_out_of_memory = isinstance(error, MemoryError) or "std::bad_alloc" in str(error)
    if is_out_of_memory or "RESOURCE_EXHAUSTED" in str(error):
        reason = brief(error, 150) or type(error).__name__
        return f"out of memory ({reason}); {SMALLER}"
    return None
