"""Power cuts after every write of a command: the same command then finishes, or says what to do.

A command is recorded once. Its writes are replayed on a model of a disk, on which only flushed
contents are safe. Names are worse or better off, depending on the file system: either every name is
safe at once, or those of a folder are safe once that folder is flushed. Both are tried.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tests.faults.io_errors import error_lines
from tests.faults.verbs import Verb, Workshop, differing, temporary_files


class Record(NamedTuple):
    """One successful call, see `preload.c`."""

    kind: str
    path: Path
    other: Path
    offset: int
    data: bytes


@dataclass
class File:
    content: bytearray
    flushed: bytes = b""


@dataclass
class Folder:
    entries: dict[str, "File | Folder"] = field(default_factory=dict)
    flushed: dict[str, "File | Folder"] = field(default_factory=dict)


State = dict[str, bytes | None]  # relative path -> content, None for a folder


def read_record(path: Path) -> list[Record]:
    """Read what the library recorded."""
    records = []
    with path.open("rb") as file:
        while head := file.readline():
            kind, name, other, offset, size = head.decode().rstrip("\n").split("\t")
            data = file.read(int(size))
            records.append(Record(kind, Path(name), Path(other), int(offset), data))
    return records


class Disk:
    """The files below a folder, and what of them would survive a power cut."""

    def __init__(self, root: Path):
        self.root_path = root
        self.root = self._load(root)

    def _load(self, path: Path) -> Folder:
        """Everything there before the command is flushed."""
        folder = Folder()
        for child in path.iterdir():
            if child.is_dir():
                folder.entries[child.name] = self._load(child)
            else:
                content = child.read_bytes()
                folder.entries[child.name] = File(bytearray(content), content)
        folder.flushed = dict(folder.entries)
        return folder

    def _find(self, path: Path) -> File | Folder | None:
        node: File | Folder | None = self.root
        for name in path.relative_to(self.root_path).parts:
            node = node.entries.get(name) if isinstance(node, Folder) else None
        return node

    def _parent(self, path: Path) -> dict[str, File | Folder]:
        folder = self._find(path.parent)
        assert isinstance(folder, Folder), path
        return folder.entries

    def apply(self, record: Record) -> None:
        """Make one change."""
        path = record.path
        node = self._find(path)
        match record.kind:
            case "d":
                self._parent(path)[path.name] = Folder()
            case "u":
                del self._parent(path)[path.name]
            case "r":
                self._parent(record.other)[record.other.name] = self._parent(path).pop(path.name)
            case "c" | "t":
                if node is None:
                    self._parent(path)[path.name] = File(bytearray())
                elif record.kind == "t" and isinstance(node, File):
                    node.content.clear()
            case "f":
                if isinstance(node, File):
                    node.flushed = bytes(node.content)
                elif isinstance(node, Folder):
                    node.flushed = dict(node.entries)
            case "s":
                if isinstance(node, File):
                    missing = record.offset - len(node.content)
                    node.content[record.offset :] = bytes(max(missing, 0))
            case "w":
                # A file without a name cannot survive.
                if isinstance(node, File):
                    missing = record.offset - len(node.content)
                    node.content += bytes(max(missing, 0))
                    node.content[record.offset : record.offset + len(record.data)] = record.data

    def survivors(self, names_survive: bool) -> State:
        """Return the files after a power cut."""
        state: State = {}
        folders = [("", self.root)]
        while folders:
            prefix, folder = folders.pop()
            entries = folder.entries if names_survive else folder.flushed
            for name, node in entries.items():
                if isinstance(node, Folder):
                    state[prefix + name] = None
                    folders.append((f"{prefix}{name}/", node))
                else:
                    state[prefix + name] = node.flushed
        return state


def restore(state: State, folder: Path, inputs: Path) -> None:
    """Write a state into an empty folder; inputs keep their times, which `prepare` compares."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in sorted(state.items()):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            path.mkdir(exist_ok=True)
        else:
            path.write_bytes(content)
            if (inputs / name).is_file():
                shutil.copystat(inputs / name, path)


@dataclass(frozen=True)
class Cut:
    """A power cut after a number of calls, and what happened after it."""

    verb: str
    calls: int
    names_survive: bool
    outcome: str  # "same bytes" or "advice" as promised, or what is wrong
    stderr: str = ""

    @property
    def is_good(self) -> bool:
        return self.outcome in ("same bytes", "advice")

    def __str__(self) -> str:
        names = "names survive" if self.names_survive else "names are lost"
        return f"{self.verb}: after {self.calls} calls, {names}: {self.outcome}"


def record(workshop: Workshop, verb: Verb) -> tuple[Disk, list[Record]]:
    """Return the disk before a command, and its calls."""
    workshop.finished(verb)
    disk = Disk(workshop.fresh(verb))
    path = workshop.base / "record"
    result = workshop.run(verb, record=path)
    assert result.code == 0, result.stderr
    return disk, read_record(path)


def sweep(workshop: Workshop, verb: Verb, every: int = 1, part: str = "0/1") -> Iterator[Cut]:
    """Yield a cut for each distinct state of the disk, or for every n-th of them."""
    disk, records = record(workshop, verb)
    index, parts = map(int, part.split("/"))
    seen = set()
    n_states = 0
    for calls, each in enumerate(records, 1):
        disk.apply(each)
        for names_survive in (True, False):
            state = disk.survivors(names_survive)
            key = hash(frozenset(state.items()))
            is_last = calls == len(records)
            if key in seen and not is_last:
                continue
            seen.add(key)
            n_states += 1
            if is_last or (n_states % every == 0 and n_states // every % parts == index):
                yield cut(workshop, verb, state, calls, names_survive, is_last)


def cut(
    workshop: Workshop, verb: Verb, state: State, calls: int, names_survive: bool, is_last: bool
) -> Cut:
    """Run the command on what survived, and judge it."""
    folder = workshop.folder
    restore(state, folder, workshop.inputs(verb))
    expected = workshop.expected[verb.name]
    lost = differing(folder, expected) if is_last else []
    if lost:
        outcome = f"lost after the end: {lost}"
        return Cut(verb.name, calls, names_survive, outcome)
    result = workshop.run(verb)
    different = differing(folder, expected)
    outcome = "same bytes"
    if result.code == 2 and len(error_lines(result.stderr)) == 1:
        outcome = "advice"
    elif result.code != 0:
        outcome = f"exit code {result.code}"
    elif different:
        outcome = f"other bytes: {different}"
    elif temporary_files(folder):
        outcome = f"left behind: {temporary_files(folder)}"
    return Cut(verb.name, calls, names_survive, outcome, result.stderr)


def table(cuts: list[Cut]) -> str:
    """Return a line for each verb: how many states were tried and what happened."""
    lines = []
    for verb in dict.fromkeys(each.verb for each in cuts):
        of_verb = [each for each in cuts if each.verb == verb]
        same = sum(each.outcome == "same bytes" for each in of_verb)
        advice = sum(each.outcome == "advice" for each in of_verb)
        bad = len(of_verb) - same - advice
        lines.append(
            f"{verb:16} {len(of_verb):5} tried: {same} same bytes, {advice} advice, {bad} BAD"
        )
    return "\n".join(lines)
