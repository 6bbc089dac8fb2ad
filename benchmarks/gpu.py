"""Measure everything on a GPU in one command: `make bench-gpu`.

    python -m benchmarks.gpu [--minutes 12] [--only steps resume] [--out FILE] [--small]

The parts run in order of importance. Every line is printed, and appended to the file of --out, as
soon as it is measured. What fails takes one line, and the next measurement starts. When the time is
over, nothing is started any more. The last table compares the figures with the goals of the
project. --small is a rehearsal on any device. Exit code 1: something failed, or a result was not
within its limits. Exit code 2: no GPU.
"""

import argparse
import datetime
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from pathlib import Path

import jax

from benchmarks import gpu_checks, gpu_kernels, gpu_rates
from benchmarks.gpu_programs import SMALL, Goals, Lines, Session, Sizes
from benchmarks.timing import copy_bandwidth, matrix_product_flops, row, table_head
from minsae_jax.errors import UserError, brief
from minsae_jax.parallel.processes import start_jax

PARTS: dict[str, Callable[[Session], Lines]] = {
    "encoder": gpu_checks.encoder,
    "first-steps": gpu_checks.first_steps,
    "extraction": gpu_rates.extraction,
    "end-to-end": gpu_rates.end_to_end,
    "steps": gpu_rates.steps,
    "kernels": gpu_kernels.kernels,
    "resume": gpu_checks.resume,
    "pytorch": gpu_rates.pytorch,
    "memory": gpu_rates.memory,
    "several-gpus": gpu_checks.several_gpus,
}


class Report:
    """Prints lines and appends them to a file."""

    def __init__(self, path: str | None):
        self.path = Path(path) if path else None
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, text: str) -> None:
        print(text, flush=True)
        if self.path:
            with self.path.open("a") as file:
                file.write(f"{text}\n")


def main() -> None:
    args = parse_arguments()
    # The parts that start processes share the memory of the card with them.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    try:
        start_jax()
    except UserError as e:
        sys.exit(stop(str(e)))
    if jax.default_backend() != "gpu" and not args.small:
        sys.exit(stop(f"JAX sees no GPU, only {jax.default_backend()}; --small rehearses on it"))
    # So that a command that is stopped still prints the goals.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    end = time.monotonic() + 60 * args.minutes
    report = Report(args.out)
    report.add(f"## {title()}\n")
    session = Session(SMALL if args.small else Sizes())
    try:
        measure_device(session, report)
        for name in args.only or PARTS:
            run_part(name, session, report, end)
    except KeyboardInterrupt:
        session.failures.append("interrupted")
    add_summary(session, report)
    sys.exit(1 if session.failures else 0)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu")
    parser.add_argument("--minutes", type=float, default=12, help="start nothing after this time")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=" ".join(PARTS))
    parser.add_argument("--out", help="file to which every line is appended")
    parser.add_argument("--small", action="store_true", help="rehearse, on any device")
    return parser.parse_args()


def stop(message: str) -> int:
    print(f"benchmarks.gpu: {message}", file=sys.stderr)
    return 2


def title() -> str:
    """Return the devices, the versions and the date, as headings of RESULTS.md have them."""
    device = jax.devices()[0].device_kind
    try:
        torch = f"torch {metadata.version('torch')}"
    except metadata.PackageNotFoundError:
        torch = "without torch"
    python = platform.python_version()
    versions = f"Python {python}, jax {jax.__version__}, {torch}"
    return f"GPU: {jax.device_count()} x {device}, {versions}, {datetime.date.today()}"


def measure_device(session: Session, report: Report) -> None:
    """Measure the device's own rates; without one of them, the shares of it are NaN."""
    measures: dict[str, Callable[[], str]] = {}
    for precision in ("bfloat16", "tf32", "float32"):
        measures[precision] = partial(_product_row, session, precision)
    n_bytes = 2**24 if session.sizes == SMALL else 2**30
    measures["memory"] = lambda: row("memory", f"{copy_bandwidth(n_bytes) / 1e12:.2g} TB/s")
    report.add(table_head("device", "best rate"))
    for line in session.rows(measures):
        report.add(line)


def _product_row(session: Session, precision: str) -> str:
    flops = matrix_product_flops(precision, quick=session.sizes == SMALL)
    session.flops[precision] = flops
    return row(f"{precision} product", f"{flops / 1e12:.3g} TFLOP/s")


def run_part(name: str, session: Session, report: Report, end: float) -> None:
    """Run a part while there is time, and add its lines."""
    part = PARTS[name]
    if time.monotonic() > end:
        report.add(f"\n**{name}**: not measured, no time is left.")
        return
    started = time.monotonic()
    title, _, _ = (part.__doc__ or "").partition("\n")
    report.add(f"\n**{name}**: {title}\n")
    lines = part(session)
    try:
        for line in lines:
            report.add(line)
            if time.monotonic() > end:
                lines.close()
                report.add("\nStopped here, no time is left.")
                break
    except ModuleNotFoundError as e:
        if e.name != "torch":
            raise
        report.add("Skipped: torch is not installed.")
    # One line for whatever a part raises, so that the others are measured.
    except Exception as e:
        report.add(f"\nFailed: {type(e).__name__}: {brief(e, 400)}")
        session.failures.append(f"{name}: {type(e).__name__}")
    report.add(f"\n({time.monotonic() - started:.0f} s)")


def add_summary(session: Session, report: Report) -> None:
    report.add("\n**Goals**\n")
    report.add(table_head("goal", "measured", "met"))
    for line in goal_rows(session.goals):
        report.add(line)
    report.add(f"\nFailures: {'; '.join(session.failures) or 'none'}.")


def goal_rows(goals: Goals) -> Iterator[str]:
    """Yield the goals of the project, and whether each is met."""
    members = "8 members in bfloat16"
    rows = (
        (f"a step of {members}: 25 % of the card's bfloat16 rate", goals.step_share, 0.25),
        (f"a run of {members}: 25 % of the card's bfloat16 rate", goals.run_share, 0.25),
        (f"{members}: 10 times PyTorch's eager loop", goals.over_eager, 10),
        (f"{members}: 3 times torch.compile with autocast", goals.over_compiled, 3),
        (
            "extraction in float32: 5 times PyTorch at its best batch",
            goals.extraction_over_pytorch,
            5,
        ),
        ("a deterministic run that resumes: the same bytes", goals.resumes_equal, 1),
    )
    for goal, measured, least in rows:
        if measured is None:
            yield row(goal, "not measured", "")
        else:
            yield row(goal, f"{measured:.3g}", "yes" if measured >= least else "no")


if __name__ == "__main__":
    main()
