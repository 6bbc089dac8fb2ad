"""Signals during training, among them those of Ctrl-C and of a closed terminal."""

import ctypes
import os
import signal
import subprocess
import sys
import threading

import pytest

from minsae_jax.sae.stop_signals import AGAIN, STOPPING, stop_signals
from tests.cluster import minsae, wait_until


def send_later(number: int) -> None:
    threading.Timer(0.1, os.kill, (os.getpid(), number)).start()


@pytest.mark.parametrize(
    ("number", "line"),
    [
        (signal.SIGINT, f"{STOPPING}; {AGAIN}"),
        (signal.SIGTERM, STOPPING),
        (signal.SIGUSR1, STOPPING),
        (signal.SIGHUP, STOPPING),
    ],
)
def test_line_is_shown_while_native_code_runs(number, line):
    """The native code is a read of a pipe, into which the line is written."""
    read_end, write_end = os.pipe()
    # Otherwise a failure would never end.
    give_up = threading.Timer(10, os.write, (write_end, b"not shown"))
    give_up.start()
    buffer = ctypes.create_string_buffer(200)
    with stop_signals(lambda text: os.write(write_end, text.encode())) as signals:
        signal.siginterrupt(number, False)  # the read continues after the signal
        send_later(number)
        ctypes.CDLL(None).read(read_end, buffer, len(buffer))
        assert buffer.value.decode() == line
        assert signals == [number]
    give_up.cancel()
    os.close(read_end)
    os.close(write_end)


def test_second_ctrl_c_interrupts():
    lines = []
    with stop_signals(lines.append) as signals:
        signal.raise_signal(signal.SIGINT)
        assert signals == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert lines == [f"{STOPPING}; {AGAIN}"]


def test_repeated_sigterm_does_not_interrupt_the_save():
    with stop_signals(print) as signals:
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
            signal.raise_signal(number)
    assert signals[0] == signal.SIGUSR1


def test_first_ctrl_c_after_sigterm_does_not_interrupt_the_save():
    with stop_signals(print) as signals:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signals == [signal.SIGTERM, signal.SIGINT]


def test_hangup_stays_ignored_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with stop_signals(print) as signals:
        signal.raise_signal(signal.SIGHUP)
        assert signals == []
    assert signal.signal(signal.SIGHUP, before) == signal.SIG_IGN


# Runs a command in a terminal, which is closed when its input ends. A process of its own, since
# JAX forbids to fork this one.
IN_TERMINAL = """
import os, pty, select, sys
process, terminal = pty.fork()
if process == 0:
    os.execv(sys.argv[1], sys.argv[1:])
while sys.stdin not in select.select([terminal, sys.stdin], [], [])[0]:
    os.read(terminal, 10_000)
os.close(terminal)
_, status = os.waitpid(process, 0)
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.slow
def test_closed_terminal_saves_a_checkpoint(small_store, tmp_path):
    run = tmp_path / "run"
    steps = ("--num_steps", 10**6, "--eval_window", 8, "--checkpoint_every", 10**6)
    sizes = ("--batch_size", 32, "--feature_dim_factor", 1)
    command = minsae("train", "--store", small_store, "--run_dir", run, *steps, *sizes)
    in_terminal = [sys.executable, "-c", IN_TERMINAL, *command]
    with subprocess.Popen(in_terminal, stdin=subprocess.PIPE) as process:
        wait_until(
            lambda: any(len(p.read_text().splitlines()) > 2 for p in run.rglob("metrics.csv"))
        )
    assert process.returncode == 128 + signal.SIGHUP
    assert [path.name.isdecimal() for path in (run / "checkpoints").iterdir()] == [True]


def test_other_signals_show_nothing():
    lines = []
    before = signal.signal(signal.SIGUSR2, lambda *_: None)
    with stop_signals(lines.append) as signals:
        signal.raise_signal(signal.SIGUSR2)
    signal.signal(signal.SIGUSR2, before)
    assert lines == signals == []


def test_handlers_are_restored():
    handler = signal.getsignal(signal.SIGINT)
    n_threads = threading.active_count()
    with stop_signals(print):
        assert signal.getsignal(signal.SIGINT) is not handler
    assert signal.getsignal(signal.SIGINT) is handler
    assert signal.set_wakeup_fd(-1) == -1
    assert threading.active_count() == n_threads
