"""Errors of the system at every call on files: each ends in one line, and nothing is lost."""

import errno
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.faults.process import SHORT_WRITE, Fault, Result
from tests.faults.verbs import Verb, Workshop, differing, temporary_files

# A disk stays full; the other errors hit one call.
ERRORS = {
    "open": (errno.EMFILE, errno.EACCES, errno.EIO, errno.EINTR),
    "write": (errno.ENOSPC, errno.EIO, SHORT_WRITE, errno.EINTR),
    "flush": (errno.EIO, errno.ENOSPC),
    "rename": (errno.EIO, errno.EACCES, errno.ENOSPC),
    "unlink": (errno.EACCES, errno.EIO),
    "stat": (errno.EIO, errno.EACCES),
    "mkdir": (errno.ENOSPC, errno.EACCES),
}
WHOLE_EXIT_EVERY = 16  # calls, see `tests.faults.server`
PROGRESS = re.compile(r"[a-z]+( \w+)? +\d+%, ")  # a progress bar that is not on a terminal


@dataclass(frozen=True)
class Case:
    """A command with a fault, and what happened."""

    verb: str
    fault: Fault
    outcome: str  # "error", "success" or "not reached" as promised, or what is wrong
    stderr: str

    @property
    def is_good(self) -> bool:
        return self.outcome in ("error", "success", "not reached")

    def __str__(self) -> str:
        error = "SHORT" if self.fault.error == SHORT_WRITE else errno.errorcode[self.fault.error]
        return f"{self.verb}: {self.fault.kind} {self.fault.call} {error}: {self.outcome}"


def faults(
    calls: dict[str, list[str]], every: int, all_errors: bool, distinct: bool
) -> Iterator[Fault]:
    """Yield a fault for calls of each kind, with one of its errors in turn or all.

    calls: kind -> path of each call. distinct: the first and the last call on each file, where
    files whose names differ in numbers count as one; otherwise every n-th call.
    """
    for kind, errors in ERRORS.items():
        numbers = first_and_last(calls[kind]) if distinct else range(len(calls[kind]))
        for i, call in enumerate(numbers[::every]):
            chosen = errors if all_errors else [errors[i % len(errors)]]
            for error in chosen:
                yield Fault(kind, call, error, on=error == errno.ENOSPC)


def first_and_last(paths: list[str]) -> list[int]:
    """Return the positions at which a path appears first or last, numbers and hashes aside."""
    patterns = [re.sub(r"[0-9a-f]{16,}|[0-9]+", "#", path) for path in paths]
    first = {pattern: i for i, pattern in reversed(list(enumerate(patterns)))}
    last = {pattern: i for i, pattern in enumerate(patterns)}
    return sorted({*first.values(), *last.values()})


def inject(workshop: Workshop, verb: Verb, fault: Fault) -> Case:
    """Run a command with a fault, then the same command without, and judge both."""
    workshop.finished(verb)
    folder = workshop.fresh(verb)
    whole_exit = fault.call % WHOLE_EXIT_EVERY == 0
    result = workshop.run(verb, fault=fault, whole_exit=whole_exit)
    outcome = judge(result, folder, workshop.expected[verb.name], fault)
    if outcome == "error":
        outcome = workshop.resume(verb) or "error"
    return Case(verb.name, fault, outcome, result.stderr)


def judge(result: Result, folder: Path, expected: dict[str, str], fault: Fault) -> str:
    """Return "error", "success" or "not reached", or what is wrong."""
    if result.code == 0:
        different = differing(folder, expected)
        if different:
            return f"success with other bytes: {different}"
        # A file that cannot be removed stays.
        if fault.kind != "unlink" and temporary_files(folder):
            return f"success, but left behind: {temporary_files(folder)}"
        return "success" if result.failed else "not reached"
    if result.code is None:
        return "hangs"
    if result.code != 2:
        return f"exit code {result.code}"
    lines = error_lines(result.stderr)
    if len(lines) != 1 or not lines[0].startswith("error: "):
        return f"{len(lines)} lines instead of one"
    if fault.kind != "unlink" and temporary_files(folder):
        return f"left behind: {temporary_files(folder)}"
    return "error"


def error_lines(stderr: str) -> list[str]:
    """Return the lines that are neither progress nor a warning."""
    lines = [line for line in stderr.splitlines() if not PROGRESS.match(line)]
    return [line for line in lines if not line.startswith("warning: ")]


def sweep(
    workshop: Workshop,
    verb: Verb,
    every: int = 1,
    all_errors: bool = False,
    distinct: bool = False,
    part: str = "0/1",
) -> Iterator[Case]:
    """Yield a case for every fault of a command; part: "i/n" for the i-th of n processes."""
    workshop.finished(verb)
    index, parts = map(int, part.split("/"))
    chosen = faults(workshop.calls[verb.name], every, all_errors, distinct)
    for i, fault in enumerate(chosen):
        if i % parts == index:
            yield inject(workshop, verb, fault)


def sample(workshop: Workshop, verb: Verb, kinds: tuple[str, ...]) -> Iterator[Case]:
    """Yield a case for one call of each kind, with one of its errors; the same in every run."""
    workshop.finished(verb)
    rng = random.Random(verb.name)
    for kind in kinds:
        call = rng.randrange(len(workshop.calls[verb.name][kind]))
        error = rng.choice(ERRORS[kind])
        yield inject(workshop, verb, Fault(kind, call, error, on=error == errno.ENOSPC))


def table(cases: list[Case]) -> str:
    """Return a line for each verb and kind of call: how many were tried and what happened."""
    lines = []
    for verb, kind in dict.fromkeys((case.verb, case.fault.kind) for case in cases):
        of_kind = [case for case in cases if (case.verb, case.fault.kind) == (verb, kind)]
        outcomes = Counter(case.outcome if case.is_good else "BAD" for case in of_kind)
        counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
        lines.append(f"{verb:16} {kind:7} {len(of_kind):5} tried: {counts}")
    return "\n".join(lines)
