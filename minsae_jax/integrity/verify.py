"""`verify`: read every file of stores, runs, evaluations and so on, and report damage."""

import os
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from minsae_jax.errors import UserError
from minsae_jax.integrity.config import VerifyConfig
from minsae_jax.integrity.folders import Check, KnownFolder, find_folders
from minsae_jax.locks import lock_folder
from minsae_jax.monitor import Bar, progress, table


@dataclass(frozen=True)
class Verified:
    """The result for one folder."""

    folder: Path
    kind: str  # a key of REMEDIES, such as "store"
    n_files: int
    without_checksum: tuple[Path, ...]  # only read, so that not every change is found
    problems: tuple[str, ...]  # a line each, with the file and the remedy
    is_in_use: bool = False  # another command writes it, so that it was not read


@dataclass(frozen=True)
class Verification:
    """The results for all folders."""

    folders: tuple[Verified, ...]

    @property
    def problems(self) -> list[str]:
        """The problems of all folders."""
        return [problem for verified in self.folders for problem in verified.problems]

    def summary(self) -> str:
        """Return the folders as a table for the terminal."""
        rows = []
        for verified in self.folders:
            n_files = f"{verified.n_files:,}"
            n_without = f"{len(verified.without_checksum):,}"
            status = "damaged" if verified.problems else "fine"
            if verified.is_in_use:
                status = "in use"
            rows.append([str(verified.folder), verified.kind, n_files, n_without, status])
        return table(["folder", "kind", "files", "no checksum", "status"], rows)


def verify(config: VerifyConfig) -> Verification:
    """Read all files of the known folders in the given ones, and compare their checksums.

    A folder that another command writes is not read, but reported. Raises UserError if there is no
    folder of these kinds.
    """
    folders = [known for path in config.path for known in find_folders(Path(path))]
    checks = [known.checks() for known in folders]
    n_files = sum(map(len, checks))
    with (
        # Threads run in parallel here: hashlib releases the GIL.
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
        progress("verify", n_files, "files", delay=1.0) as bar,
    ):
        verified = []
        for known, of_folder in zip(folders, checks, strict=True):
            try:
                with lock_folder(known.folder, shared=True):
                    verified.append(_verify(known, of_folder, pool, bar))
            except UserError as e:  # of the lock: `_verify` returns problems
                bar.advance(len(of_folder))
                problems = (str(e),)
                in_use = Verified(known.folder, known.kind, 0, (), problems, is_in_use=True)
                verified.append(in_use)
    return Verification(tuple(verified))


def _verify(known: KnownFolder, checks: Sequence[Check], pool: Executor, bar: Bar) -> Verified:
    problems = []
    results = pool.map(lambda check: check.find_problem(), checks)
    for check, problem in zip(checks, results, strict=True):
        bar.advance(1)
        if problem is not None:
            problems.append(f"{check.path} {problem}: {known.remedy(check.path)}")
    # Otherwise it would report the same file again.
    if not problems:
        try:
            known.check_whole()
        except UserError as e:
            problems = [str(e)]
    without = tuple(check.path for check in checks if not check.has_checksum)
    # Names of files can contain line breaks.
    lines = tuple(str(UserError(problem)) for problem in problems)
    return Verified(known.folder, known.kind, len(checks), without, lines)
