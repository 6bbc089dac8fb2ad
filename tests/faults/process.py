"""Commands as processes with faults, started from a warm server."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.compiler import COMPILER_FLAGS

ROOT = Path(__file__).parents[2]
SOURCE = Path(__file__).with_name("preload.c")
SHORT_WRITE = -1  # in the place of an errno
KINDS = ("open", "write", "flush", "rename", "unlink", "stat", "mkdir")  # as in `preload.c`
TIMEOUT = 120.0  # seconds; a command that takes longer hangs


@dataclass(frozen=True)
class Fault:
    """The call-th call (from 0) of a kind fails, and those after it if `on`."""

    kind: str  # one of KINDS
    call: int
    error: int  # errno, or SHORT_WRITE
    on: bool = False


@dataclass(frozen=True)
class Result:
    """How a command ended; code: None if it was killed after its time."""

    code: int | None
    stdout: str
    stderr: str
    counts: dict[str, int]  # calls of each kind on files in the command's folder
    failed: bool  # whether the fault has happened


def compiler() -> str | None:
    """Return the path of a C compiler for Linux, if there is one."""
    if sys.platform != "linux":
        return None
    return shutil.which("cc") or shutil.which("gcc")


def build(folder: Path) -> Path:
    """Compile the library. Raises RuntimeError if there is no compiler or it fails."""
    program = compiler()
    if program is None:
        raise RuntimeError("fault injection requires Linux and a C compiler")
    library = folder / "preload.so"
    flags = ("-O1", "-shared", "-fPIC", "-Wall", "-Wno-nonnull-compare", "-U_FORTIFY_SOURCE")
    command = [program, *flags, "-o", str(library), str(SOURCE), "-ldl", "-lpthread"]
    subprocess.run(command, check=True)
    return library


def read_trace(path: Path, folder: Path) -> dict[str, list[str]]:
    """Return for each kind of call the paths of all calls, relative to the folder.

    Threads may write their lines in another order than that of their calls.
    """
    calls: dict[str, dict[int, str]] = {kind: {} for kind in KINDS}
    for line in path.read_text().splitlines():
        kind, number, name = line.split("\t")
        calls[KINDS[int(kind)]][int(number)] = name.removeprefix(str(folder))
    return {kind: [paths[i] for i in sorted(paths)] for kind, paths in calls.items()}


class Server:
    """A warm process that runs commands, one at a time."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="faults")
        self.folder = Path(self._folder.name)
        environment = os.environ | {
            "LD_PRELOAD": str(build(self.folder)),
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "1",
            "XLA_FLAGS": COMPILER_FLAGS,
            "OPENBLAS_NUM_THREADS": "1",
            "MPLBACKEND": "agg",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        # Compiled programs are shared by all runs, since each would compile the same ones.
        environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(self.folder / "compiled"))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.server"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answer()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()
        self._folder.cleanup()

    def _answer(self) -> str:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the server of the fault injection has ended")
        return line

    def run(
        self,
        program: str,
        args: tuple[str, ...],
        folder: Path,
        fault: Fault | None = None,
        record: Path | None = None,
        trace: Path | None = None,
        timeout: float = TIMEOUT,
        whole_exit: bool = False,
    ) -> Result:
        """Run a command in `folder` and wait for it.

        record: file for the writes of the command, see `power_cuts.read_record`.
        trace: file for all calls that count, see `read_trace`.
        timeout: seconds after which it is killed.
        whole_exit: leave by the whole exit of the interpreter, which takes 0.3 s.
        """
        out = self.folder / "stdout"
        err = self.folder / "stderr"
        request = {
            "program": program,
            "args": args,
            "folder": str(folder),
            "stdout": str(out),
            "stderr": str(err),
            "fault": list(asdict(fault).values()) if fault else None,
            "record": str(record) if record else None,
            "trace": str(trace) if trace else None,
            "timeout": timeout,
            "whole_exit": whole_exit,
        }
        assert self._process.stdin
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer = json.loads(self._answer())
        texts = [path.read_text(errors="replace") for path in (out, err)]
        return Result(answer["code"], *texts, answer["counts"], answer["failed"])
