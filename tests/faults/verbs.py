"""A small run of each verb: its inputs, its command, and the files that it must write."""

import hashlib
import shutil
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from tests.faults.process import ROOT, TIMEOUT, Fault, Result, Server

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


DEMO = ("demo", "--root_path", "data", "--patients", "10", "--minutes", ".5")
EDF = ("demo", "--root_path", "source", "--patients", "10", "--minutes", ".5", "--edf")
PREPARE = ("prepare", "source", "--out", "recordings", "--reference", "none")
ENCODER = ("encoder", "checkpoint.pth", "--out", "encoder")
EVALUATE = ("evaluate", "--run", "run", "--root_path", "data")
SAE = ("sae", "run/members/lambda=1", "--to", "saelens", "--out", "sae")
EXTRACT = (
    *("extract", "--root_path", "data", "--checkpoint_path", "encoder", "--out", "store"),
    *("--split", "train", "val", "test", "--batch_size", "4", "--max_batches", "6"),
)
TRAIN = (
    *("train", "--store", "store", "--checkpoint_path", "encoder", "--run_dir", "run"),
    *("--lambda_sparsity", "0.1", "1", "--feature_dim_factor", "0.5", "--lr", "3e-3"),
    *("--num_steps", "8", "--batch_size", "256", "--eval_window", "4"),
    *("--checkpoint_every", "4", "--eval_every", "8"),
)
VERBS = {
    verb.name: verb
    for verb in (
        Verb("demo", "minsae", DEMO),
        Verb("edf", "minsae", EDF),
        Verb("prepare", "minsae", PREPARE, ("edf",)),
        Verb("convert encoder", "convert", ENCODER, ("checkpoint.pth",)),
        Verb("extract", "minsae", EXTRACT, ("demo", "convert encoder")),
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
        self.counts: dict[str, dict[str, int]] = {}  # verb -> calls of each kind, when it finished

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
        timeout: float = TIMEOUT,
    ) -> Result:
        """Run a command in the folder; it is killed after `timeout` seconds."""
        return self.server.run(verb.program, verb.args, self.folder, fault, record, timeout)

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
        return folder

    def finished(self, verb: Verb) -> Path:
        """Return a folder as the undisturbed command leaves it."""
        folder = self.base / f"{verb.name} finished"
        if not folder.exists():
            self.fresh(verb)
            result = self.run(verb)
            assert result.code == 0, result.stderr
            self.counts[verb.name] = result.counts
            shutil.copytree(self.folder, folder)
        return folder


def contents(folder: Path) -> dict[str, str]:
    """Return name -> hash of all files that must be the same in every run."""
    hashes = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not any(fnmatch(name, pattern) for pattern in VARYING):
            hashes[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return hashes


def temporary_files(folder: Path) -> list[str]:
    """Return the names of files and folders that a command must not leave behind."""
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*")]
    return sorted(name for name in names if any(fnmatch(name, each) for each in TEMPORARY))
