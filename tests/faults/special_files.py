"""A named pipe, a device or a loop of links in the place of a file: no command waits or crashes."""

import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from os import mkfifo
from pathlib import Path

from tests.faults.io_errors import error_lines, first_and_last
from tests.faults.verbs import VERBS, Verb, Workshop

KINDS = ("pipe", "device", "loop")
# Without this file a run is not finished, so that `train` resumes.
RESUMED = {"train": "run/sweep.csv"}


@dataclass(frozen=True)
class Case:
    """A command whose folder has a special file, and what happened."""

    verb: str
    kind: str
    file: str
    outcome: str  # "refused" or "read" as promised, or what is wrong
    stderr: str

    @property
    def is_good(self) -> bool:
        return self.outcome in ("refused", "read")

    def __str__(self) -> str:
        return f"{self.verb}: {self.kind} {self.file}: {self.outcome}"


def replace_by(kind: str, path: Path) -> None:
    """Put a special file in the place of a file."""
    path.unlink()
    if kind == "pipe":
        mkfifo(path)  # nobody writes to it, so that opening it waits
    elif kind == "device":
        path.symlink_to("/dev/null")
    else:
        path.symlink_to(path.name)


def attempt(workshop: Workshop, verb: Verb, kind: str, file: str) -> Case:
    """Run a command in a folder with all its inputs and outputs, one of them a special file."""
    folder = workshop.folder
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(workshop.finished(verb), folder)
    if verb.name in RESUMED:
        (folder / RESUMED[verb.name]).unlink()
    replace_by(kind, folder / file)
    result = workshop.run(verb)
    return Case(verb.name, kind, file, judge(result.code, result.stderr), result.stderr)


def judge(code: int | None, stderr: str) -> str:
    """Return "refused" or "read", or what is wrong."""
    if code is None:
        return "hangs"
    if code == 0:
        return "read"
    lines = error_lines(stderr)
    if code != 2 or len(lines) != 1 or not lines[0].startswith("error: "):
        return f"exit code {code}, {len(lines)} lines"
    return "refused"


def sweep(
    workshop: Workshop, verb: Verb, every: int = 1, distinct: bool = False, part: str = "0/1"
) -> Iterator[Case]:
    """Yield a case for each kind and file, or for every n-th of these.

    distinct: of files whose names differ in numbers only the first and the last one. part: "i/n"
    for the i-th of n processes.
    """
    finished = workshop.finished(verb)
    paths = [path for path in sorted(finished.rglob("*")) if path.is_file()]
    files = [path.relative_to(finished).as_posix() for path in paths]
    if verb.name in RESUMED:
        files.remove(RESUMED[verb.name])
    if distinct:
        files = [files[i] for i in first_and_last(files)]
    index, parts = map(int, part.split("/"))
    cases = [(kind, file) for file in files for kind in KINDS]
    for i, (kind, file) in enumerate(cases[::every]):
        if i % parts == index:
            yield attempt(workshop, verb, kind, file)


def table(cases: list[Case]) -> str:
    """Return a line for each verb: how many were tried and what happened."""
    lines = []
    for verb in VERBS:
        outcomes = Counter(
            case.outcome if case.is_good else "BAD" for case in cases if case.verb == verb
        )
        if outcomes:
            counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
            lines.append(f"{verb}: {outcomes.total()} tried, {counts}")
    return "\n".join(lines)
