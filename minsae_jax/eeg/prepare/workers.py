"""Worker processes of `prepare --jobs`: their start, and their end with the main process.

Importing MNE and its dependencies takes a second, as long as preparing five recordings. On Linux,
one process, the fork server, imports them while the main process finds the recordings, and the
workers are forks of it. The main process is not forked itself, since it may run threads of JAX.
"""

import multiprocessing
import os
import signal
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import forkserver, resource_tracker

# MNE imports the last three when it reads and resamples its first recording.
MODULES = ["minsae_jax.eeg.prepare.recording", "scipy.signal", "mne.epochs", "joblib"]


def start_imports() -> None:
    """Start importing the modules of workers in another process, and return at once."""
    forkserver.set_forkserver_preload(MODULES)
    _has_fork_server()


def worker_pool(n_workers: int) -> ProcessPoolExecutor:
    """Return a pool of processes that end with this one, and that Ctrl-C does not interrupt."""
    method = "forkserver" if _has_fork_server() else "spawn"
    context = multiprocessing.get_context(method)
    return ProcessPoolExecutor(n_workers, context, initializer=_start_worker)


def _has_fork_server() -> bool:
    """Start the fork server unless it runs, and return whether it does."""
    # On macOS, a process that has used libraries of the system cannot be forked safely.
    if sys.platform != "linux":
        return False
    # Started on its own, since starting it unblocks the signal.
    resource_tracker.ensure_running()
    # A new process inherits blocked signals: Ctrl-C during its imports prints no traceback.
    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    # The path of the temporary folder is too long for a socket, or there is none.
    except OSError:
        return False
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier)
    return True


def _start_worker() -> None:
    # On Ctrl-C, the main process lets recordings that were started finish.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A worker would wait forever if its main process was killed.
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
