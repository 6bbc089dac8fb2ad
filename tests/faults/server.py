"""A warm process that forks one child for each command, so that imports are paid once.

It imports everything but uses no JAX device, since XLA's threads would not survive the fork. The
child is a whole process. It waits for its threads and calls the functions registered for the exit,
as the interpreter does. The rest of that exit, to take down all modules, costs more than most
commands (0.3 s, in which the kernel copies the memory of this process), so it is left out unless
the request asks for it.
"""

import atexit
import ctypes
import gc
import io
import json
import os
import select
import signal
import sys
import threading

import jax
import matplotlib.pyplot as plt
import orbax.checkpoint  # noqa: F401
import torch  # noqa: F401
from mne.io import read_raw  # noqa: F401
from tensorboard.plugins.hparams import summary_v2  # noqa: F401

import convert.__main__
import convert.braindecode
import convert.encoder
import minsae_jax.__main__
import minsae_jax.eeg.prepare.prepare
import minsae_jax.encoder.extract
import minsae_jax.encoder.live
import minsae_jax.evaluation.evaluate
import minsae_jax.report.report
import minsae_jax.sae.trainer
from minsae_jax import cli
from minsae_jax.cli import process
from minsae_jax.encoder.patchtst.encoder import PatchTSTEncoder
from tests.faults.process import KINDS, ROOT

process.EXIT_SECONDS = 5  # of threads that wait for ever
PROGRAMS = {"minsae": minsae_jax.__main__.main, "convert": convert.__main__.main}


def warm_up() -> None:
    """Do what all commands do first: draw, and trace the encoder, without a device."""
    figure = plt.figure()
    figure.add_subplot().set_title("title")
    figure.savefig(io.BytesIO())
    plt.close(figure)
    source = convert.encoder.read_source(ROOT / "tests/fixtures/tuhab_patch_100/checkpoint.pth")
    PatchTSTEncoder.abstract_params(source.architecture)
    assert not jax._src.xla_bridge.backends_are_initialized()


def serve() -> dict | None:
    """Answer requests until stdin ends; in a child, return its request."""
    library = ctypes.CDLL(None)
    # Other than print, it cannot be redirected by what the imports did to stdout.
    answers = os.fdopen(os.dup(1), "w")
    warm_up()
    gc.collect()
    gc.freeze()
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        library.faults_reset()
        child = os.fork()
        if child == 0:
            return request
        counts = {}
        code = wait(child, request["timeout"])
        for i, kind in enumerate(KINDS):
            counts[kind] = library.faults_count(i)
        failed = bool(library.faults_count(len(KINDS)))
        answer = {"code": code, "counts": counts, "failed": failed}
        print(json.dumps(answer), file=answers, flush=True)
    return None


def wait(child: int, timeout: float) -> int | None:
    """Return the exit code, negative after a signal, or None if the child hangs."""
    process = os.pidfd_open(child)
    ended, _, _ = select.select([process], [], [], timeout)
    os.close(process)
    if not ended:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) if ended else None


def prepare(request: dict) -> None:
    """Give a child its folder, streams and fault."""
    os.chdir(request["folder"])
    streams = {0: os.devnull, 1: request["stdout"], 2: request["stderr"]}
    for number, path in streams.items():
        flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        os.dup2(os.open(path, flags, 0o600), number)
    library = ctypes.CDLL(None)
    library.faults_watch(os.getcwd().encode())
    if request["trace"]:
        library.faults_trace(request["trace"].encode())
    if request["record"]:
        library.faults_record(request["record"].encode())
    if request["fault"]:
        kind, call, error, on = request["fault"]
        library.faults_fail(KINDS.index(kind), call, error, on)


def leave(code: int) -> None:
    """End this process after its threads, without taking down the modules."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run(request: dict) -> None:
    """Run a command in a child."""
    prepare(request)
    try:
        cli.run(PROGRAMS[request["program"]], request["args"])
    except SystemExit as e:
        if request["whole_exit"]:
            raise
        leave(int(e.code or 0))
    if not request["whole_exit"]:
        leave(0)


if __name__ == "__main__":
    request = serve()
    if request is not None:
        run(request)
