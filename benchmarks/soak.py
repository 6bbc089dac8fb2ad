"""Extract, train and evaluate in a loop, each disturbed again and again until it finishes.

    python -m benchmarks.soak --minutes 60 [--seed 7] [--keep folder]

A cycle starts from recordings and an encoder. Each command of it is started up to four times with a
random disturbance: SIGKILL at a random moment, a disk that is full from a random write on, or an
error at a random call (see `tests.faults`, which this needs: Linux and a C compiler). What one
attempt leaves is what the next one finds. Then it runs undisturbed. An attempt must end with exit
code 0 and the bytes of an undisturbed reference, with exit code 2 and one line, or by the kill.

Prints a line for each cycle with its seed, and a table at the end. At the first difference it stops
with exit code 1, and copies the folder to --keep; `--seed` with the seed of a cycle repeats it,
apart from the moments of kills, which depend on the machine.
"""

import argparse
import errno
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.faults.io_errors import ERRORS, error_lines
from tests.faults.process import SHORT_WRITE, TIMEOUT, Fault, Result, Server
from tests.faults.verbs import VERBS, Verb, Workshop, contents, differing, temporary_files

CHAIN = ("extract", "train", "evaluate")
DISTURBANCES = ("kill", "full disk", "error")
MAX_DISTURBED = 4  # attempts, before the command may run undisturbed


@dataclass(frozen=True)
class Reference:
    """An undisturbed run of a command."""

    verb: Verb
    contents: dict[str, str]  # file -> hash, after it
    counts: dict[str, int]  # calls on files, by kind
    seconds: float


@dataclass(frozen=True)
class Disturbance:
    """What disturbs one attempt: a fault, or a SIGKILL after some seconds."""

    kind: str  # one of DISTURBANCES
    fault: Fault | None = None
    kill_after: float = TIMEOUT

    def __str__(self) -> str:
        if self.fault is None:
            return f"SIGKILL after {self.kill_after:.2f} s"
        fault = self.fault
        name = "SHORT" if fault.error == SHORT_WRITE else errno.errorcode[fault.error]
        return f"{name} at {fault.kind} {fault.call}{' and after' if fault.on else ''}"


@dataclass(frozen=True)
class Attempt:
    """One start of a command."""

    verb: str
    disturbance: Disturbance | None
    outcome: str  # "killed", "one line" or "same bytes" as promised, or what is wrong

    @property
    def is_good(self) -> bool:
        return self.outcome in ("killed", "one line", "same bytes")

    def __str__(self) -> str:
        return f"{self.verb}, {self.disturbance or 'undisturbed'}: {self.outcome}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=None, help="of the first cycle")
    parser.add_argument("--keep", type=Path, default=Path("soak-failure"))
    args = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if args.seed is None else args.seed
    end = time.monotonic() + 60 * args.minutes
    attempts: list[Attempt] = []
    n_cycles = 0
    with tempfile.TemporaryDirectory(prefix="soak") as folder:
        # Compiled programs are shared by all runs, since each would compile the same ones.
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{folder}/compiled")
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        with Server() as server:
            workshop = Workshop(server, Path(folder))
            references = [make_reference(workshop, VERBS[name]) for name in CHAIN]
            try:
                while time.monotonic() < end and all(each.is_good for each in attempts):
                    attempts += run_cycle(workshop, references, seed + n_cycles)
                    n_cycles += 1
            finally:
                # Also after Ctrl-C.
                print(table(attempts, n_cycles), flush=True)
        if not all(each.is_good for each in attempts):
            shutil.copytree(workshop.folder, args.keep)
            print(f"{attempts[-1]}\nthe folder is copied to {args.keep}", file=sys.stderr)
            sys.exit(1)


def make_reference(workshop: Workshop, verb: Verb) -> Reference:
    """Run a command undisturbed, twice, which must give the same bytes."""
    expected = contents(workshop.finished(verb))
    folder = workshop.fresh(verb)
    started = time.monotonic()
    result = workshop.run(verb)
    seconds = time.monotonic() - started
    assert result.code == 0, result.stderr
    assert contents(folder) == expected, differing(folder, expected)
    return Reference(verb, expected, result.counts, seconds)


def run_cycle(workshop: Workshop, references: list[Reference], seed: int) -> list[Attempt]:
    """Run all commands in one folder, print the line of the cycle, and return the attempts."""
    rng = random.Random(seed)
    started = time.monotonic()
    workshop.fresh(references[0].verb)
    attempts: list[Attempt] = []
    parts = []
    for reference in references:
        of_verb = list(run_command(workshop, reference, rng))
        attempts += of_verb
        words = [str(each.disturbance) for each in of_verb if each.disturbance]
        parts.append(f"{reference.verb.name} ({'; '.join(words) or 'undisturbed'})")
        if not attempts[-1].is_good:
            break
    result = "same bytes" if attempts[-1].is_good else "DIFFERENT"
    seconds = time.monotonic() - started
    print(f"seed {seed}: {', '.join(parts)}: {result}, {seconds:.0f} s", flush=True)
    return attempts


def run_command(workshop: Workshop, reference: Reference, rng: random.Random) -> Iterator[Attempt]:
    """Yield attempts until the command succeeds or breaks a promise."""
    verb = reference.verb
    leftover: set[str] = set()
    for _ in range(rng.randint(1, MAX_DISTURBED)):
        disturbance = draw(reference, rng)
        result = workshop.run(verb, fault=disturbance.fault, timeout=disturbance.kill_after)
        outcome = judge(workshop, reference, disturbance, result)
        if disturbance.fault and disturbance.fault.kind == "unlink":
            # What could not be removed stays, also when the command has finished.
            leftover |= set(temporary_files(workshop.folder))
        yield Attempt(verb.name, disturbance, outcome)
        if outcome not in ("killed", "one line"):
            break
    else:
        result = workshop.run(verb)
        outcome = judge(workshop, reference, None, result)
        yield Attempt(verb.name, None, outcome)
    unexpected = sorted(set(temporary_files(workshop.folder)) - leftover)
    if outcome == "same bytes" and unexpected:
        yield Attempt(verb.name, None, f"left behind: {unexpected}")
    for name in leftover:
        remove(workshop.folder / name)


def remove(path: Path) -> None:
    """Remove a file or folder that an injected error has kept from being removed."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def draw(reference: Reference, rng: random.Random) -> Disturbance:
    """Return a random disturbance, within the length of the undisturbed run."""
    kind = rng.choice(DISTURBANCES)
    if kind == "kill":
        return Disturbance(kind, kill_after=rng.uniform(0, reference.seconds))
    if kind == "full disk":
        call = rng.randrange(reference.counts["write"])
        return Disturbance(kind, Fault("write", call, errno.ENOSPC, on=True))
    place = rng.choice([kind for kind in ERRORS if reference.counts[kind]])
    call = rng.randrange(reference.counts[place])
    return Disturbance(kind, Fault(place, call, rng.choice(ERRORS[place])))


def judge(
    workshop: Workshop, reference: Reference, disturbance: Disturbance | None, result: Result
) -> str:
    """Return the outcome of an attempt, see `Attempt`."""
    if result.code is None:
        is_kill = disturbance is not None and disturbance.kind == "kill"
        return "killed" if is_kill else "hangs"
    if result.code == 0:
        different = differing(workshop.folder, reference.contents)
        return f"other bytes: {different}" if different else "same bytes"
    lines = error_lines(result.stderr)
    if result.code == 2 and len(lines) == 1 and result.failed:
        return "one line"
    return f"exit code {result.code}, {len(lines)} lines: {result.stderr[-2000:]}"


def table(attempts: list[Attempt], n_cycles: int) -> str:
    """Return a Markdown table of the outcomes of each command and kind of disturbance."""
    lines = [
        f"{n_cycles} cycles, {len(attempts)} attempts",
        "",
        "| command | disturbance | attempts | killed | one line | same bytes | otherwise |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    groups: dict[tuple[str, str], Counter[str]] = {}
    for each in attempts:
        kind = each.disturbance.kind if each.disturbance else "none"
        counts = groups.setdefault((each.verb, kind), Counter())
        counts[each.outcome if each.is_good else "otherwise"] += 1
    for (verb, kind), counts in sorted(groups.items()):
        columns = [counts[name] for name in ("killed", "one line", "same bytes", "otherwise")]
        cells = " | ".join(map(str, (verb, kind, counts.total(), *columns)))
        lines.append(f"| {cells} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
