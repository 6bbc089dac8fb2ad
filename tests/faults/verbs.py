"""A small run of each verb: its inputs, its command, and the files that it must write."""

import hashlib
import re
import shutil
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from tests.faults.process import ROOT, TIMEOUT, Fault, Result, Server, read_trace

FIXTURE = ROOT / "tests/fixtures/tuhab_patch_100"
# Names and times in these differ from run to run.
VARYING = ("*/checkpoints/*", "*events.out.tfevents.*", "encoder/params/*", "encoder/SHA256SUMS")
TEMPORARY = ("*.tmp", "*.tmp[0-9]*", "*/.*.old", "*orbax-checkpoint-tmp*", "*.__lock", ".*.old")


@dataclass(frozen=True)
class Verb:
    """A command, run in a folder with the files that `inputs` puts there."""

    name: str
    program: str
    args: tuple[str, ...]
    inputs: tuple[str, ...] = ()  # verbs whose folders are copied, or files of the repository
    recordings: str = "*"  # pattern of those that are left among the inputs


# As small as each can be and still write every kind of file: two shards, members and checkpoints.
DEMO = ("demo", "--root_path", "data", "--patients", "10", "--minutes", ".5")
EDF = ("demo", "--root_path", "source", "--patients", "10", "--minutes", ".5", "--edf")
PREPARE = ("prepare", "source", "--out", "recordings", "--reference", "none")
ENCODER = ("encoder", "checkpoint.pth", "--out", "encoder")
SAE = ("sae", "run/members/lambda=1", "--to", "saelens", "--out", "sae")
EXTRACT = (
    *("extract", "--root_path", "data", "--checkpoint_path", "encoder", "--out", "store"),
    *("--split", "train", "val", "test", "--batch_size", "3", "--max_batches", "2"),
)
TRAIN = (
    *("train", "--store", "store", "--checkpoint_path", "encoder", "--run_dir", "run"),
    *("--lambda_sparsity", "0.1", "1", "--feature_dim_factor", "0.25", "--lr", "3e-3"),
    *("--num_steps", "4", "--batch_size", "256", "--eval_window", "2"),
    *("--checkpoint_every", "2", "--eval_every", "4"),
)
EVALUATE = (
    *("evaluate", "--run", "run", "--root_path", "data", "--member", "lambda=1"),
    *("--substitution_windows", "2", "--report_features", "2", "--top", "2", "--w", "2"),
)
VERBS = {
    verb.name: verb
    for verb in (
        Verb("demo", "minsae", DEMO),
        Verb("edf", "minsae", EDF),
        Verb("prepare", "minsae", PREPARE, ("edf",), "demo000[01]_*"),
        Verb("convert encoder", "convert", ENCODER, ("checkpoint.pth",)),
        Verb("extract", "minsae", EXTRACT, ("demo", "convert encoder"), "*_t000*"),
        Verb("train", "minsae", TRAIN, ("convert encoder", "extract")),
        Verb("evaluate", "minsae", EVALUATE, ("train",)),
        Verb("plot", "minsae", ("plot", "--run", "run"), ("train",)),
        Verb("convert sae", "convert", SAE, ("train",)),
    )
}


class Workshop:
    """The finished folder of every verb, made once by the verbs themselves.

    All commands run in one folder, since some files contain its path.
    """

    def __init__(self, server: Server, base: Path):
        self.server = server
        self.base = base
        self.folder = base / "work"
        # What is known of a verb since it has finished undisturbed, by its name.
        self.calls: dict[str, dict[str, list[str]]] = {}  # kind of call -> path of each call
        self.expected: dict[str, dict[str, str]] = {}  # see `contents`
        # Verb and state of the folder -> what was wrong after the command was run on it.
        self.resumed: dict[tuple[str, frozenset], str] = {}

    def fresh(self, verb: Verb) -> Path:
        """Return the folder with the inputs of a command only."""
        inputs = self.inputs(verb)
        shutil.rmtree(self.folder, ignore_errors=True)
        return Path(shutil.copytree(inputs, self.folder))

    def run(
        self,
        verb: Verb,
        fault: Fault | None = None,
        record: Path | None = None,
        trace: Path | None = None,
        timeout: float = TIMEOUT,
        whole_exit: bool = False,
    ) -> Result:
        """Run a command in the folder, see `Server.run`."""
        return self.server.run(
            *(verb.program, verb.args, self.folder),
            fault=fault,
            record=record,
            trace=trace,
            timeout=timeout,
            whole_exit=whole_exit,
        )

    def inputs(self, verb: Verb) -> Path:
        """Return a folder as it is before a command."""
        folder = self.base / f"{verb.name} inputs"
        if not folder.exists():
            for name in verb.inputs:
                if name in VERBS:
                    shutil.copytree(self.finished(VERBS[name]), folder, dirs_exist_ok=True)
                else:
                    folder.mkdir(exist_ok=True)
                    shutil.copy(FIXTURE / name, folder)
            folder.mkdir(exist_ok=True)
            remove_recordings(folder, verb.recordings)
        return folder

    def finished(self, verb: Verb) -> Path:
        """Return a folder as the undisturbed command leaves it."""
        folder = self.base / f"{verb.name} finished"
        if not folder.exists():
            self.fresh(verb)
            trace = self.base / "trace"
            result = self.run(verb, trace=trace)
            assert result.code == 0, result.stderr
            self.calls[verb.name] = read_trace(trace, self.folder)
            self.expected[verb.name] = contents(self.folder)
            shutil.copytree(self.folder, folder)
        return folder

    def resume(self, verb: Verb) -> str:
        """Run a command on what an attempt has left, and return what is wrong or "".

        The same state of the folder is tried once.
        """
        key = (verb.name, state(self.folder))
        if key not in self.resumed:
            result = self.run(verb)
            different = differing(self.folder, self.expected[verb.name])
            problem = ""
            if result.code != 0:
                problem = f"the same command fails: {result.stderr.strip()}"
            elif different:
                problem = f"other bytes after the same command: {different}"
            elif temporary_files(self.folder):
                problem = f"left behind after the same command: {temporary_files(self.folder)}"
            self.resumed[key] = problem
        return self.resumed[key]


def remove_recordings(folder: Path, keep: str) -> None:
    """Remove the recordings that do not match a pattern, and their lines in tables."""
    removed = [path for path in folder.glob("*/demo*_s*") if not fnmatch(path.name, keep)]
    stems = {path.name.split("_preprocessed")[0].removesuffix(".edf") for path in removed}
    for table in folder.glob("*/*.csv"):
        lines = table.read_text().splitlines(keepends=True)
        kept = [line for line in lines if not any(stem in line for stem in stems)]
        table.write_text("".join(kept))
    for path in removed:
        path.unlink()


def contents(folder: Path) -> dict[str, str]:
    """Return name -> hash of all files that must be the same in every run."""
    hashes = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not is_varying(name):
            hashes[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return hashes


def is_varying(name: str) -> bool:
    """Return whether a file has other bytes in every run."""
    return any(fnmatch(name, pattern) for pattern in VARYING)


def state(folder: Path) -> frozenset[tuple[str, str]]:
    """Return names and contents of everything in a folder, apart from what differs in every run.

    Of files with varying bytes the size counts, of random names and times in names only that there
    is one.
    """
    entries = []
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        content = ""
        if path.is_file() and is_varying(name):
            content = str(path.stat().st_size)
        elif path.is_file():
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        entries.append((re.sub(r"[0-9a-f]{16,}|[0-9]{9,}", "#", name), content))
    # The same name twice, with the same size, counts once.
    return frozenset(entries)


def differing(folder: Path, expected: dict[str, str]) -> list[str]:
    """Return the names of missing, additional and changed files."""
    actual = contents(folder)
    names = sorted(expected.keys() | actual.keys())
    return [name for name in names if expected.get(name) != actual.get(name)]


def temporary_files(folder: Path) -> list[str]:
    """Return the names of files and folders that a command must not leave behind."""
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*")]
    return sorted(name for name in names if any(fnmatch(name, each) for each in TEMPORARY))
