"""Signals that stop training, such as Ctrl-C: the run saves a checkpoint first."""

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Slurm can send SIGUSR1 before a time limit (--signal=USR1@120); a closed terminal sends SIGHUP.
# Windows has neither.
NAMES = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
NUMBERS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
STOPPING = "stopping after this step"
AGAIN = "press Ctrl-C again to stop without saving a checkpoint"


@contextmanager
def stop_signals(show: Callable[[str], None]) -> Iterator[list[int]]:
    """Yield a list to which these signals are added; only a second Ctrl-C interrupts at once.

    Schedulers send SIGTERM more than once: to the processes of a job, and to srun, which passes it
    on. SIGHUP stays ignored if it is, as by nohup.

    show: called with a line at the first signal, in another thread.
    """
    received: list[int] = []
    # Python allows signal handlers in the main thread only.
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def handle(number: int, _: object) -> None:
        if number == signal.SIGINT and number in received:
            raise KeyboardInterrupt
        received.append(number)

    with _shown_at_once(show):
        before = {n: signal.signal(n, handle) for n in NUMBERS if not _is_nohup(n)}
        try:
            yield received
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _is_nohup(number: int) -> bool:
    return signal.Signals(number).name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN


@contextmanager
def _shown_at_once(show: Callable[[str], None]) -> Iterator[None]:
    """Call `show` at the first signal, also while native code runs, such as XLA's compiler.

    Python calls handlers only when native code has returned to the main thread. But it writes the
    number of a signal into a socket at once, which another thread reads.
    """
    reader, writer = socket.socketpair()

    def wait() -> None:
        while received := reader.recv(1):
            number = received[0]
            # Others are those for which the caller has handlers.
            if number in NUMBERS:
                show(f"{STOPPING}; {AGAIN}" if number == signal.SIGINT else STOPPING)
                return

    thread = threading.Thread(target=wait, daemon=True)
    with reader, writer:
        writer.setblocking(False)
        before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        thread.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            # Ends `recv` without a signal.
            writer.close()
            thread.join()
