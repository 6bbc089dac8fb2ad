"""Atomic writes, folder replacement and locks, also of processes that are killed."""

import hashlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from minsae_jax.errors import UserError
from minsae_jax.files import (
    atomic_write,
    foreign_entries,
    lock_folder,
    regular_file,
    replaced_folder,
    sha256_of,
)

LOCK_AND_WAIT = """
import sys
from pathlib import Path
from minsae_jax.files import lock_folder

import filelock
if sys.argv[2] == "windows":
    sys.modules["fcntl"] = None
with lock_folder(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_atomic_write_replaces_only_on_success(tmp_path):
    path = tmp_path / "x.txt"
    with atomic_write(path) as temporary:
        temporary.write_text("first")
        assert not path.exists()

    def fail_half_way():
        with atomic_write(path) as temporary:
            temporary.write_text("half of the sec")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert path.read_text() == "first"
    assert names(tmp_path) == ["x.txt"]


def test_shared_atomic_write_has_a_name_of_its_process(tmp_path):
    with atomic_write(tmp_path / "x.txt", shared=True) as temporary:
        assert str(os.getpid()) in temporary.name
        temporary.write_text("x")
    assert names(tmp_path) == ["x.txt"]


def test_folder_is_made_and_replaced(tmp_path):
    folder = tmp_path / "parent" / "folder"
    for content in ("first", "second"):
        with replaced_folder(folder) as temporary:
            assert names(temporary) == []
            (temporary / content).write_text(content)
        assert names(folder) == [content]
    assert names(folder.parent) == ["folder"]


def test_folder_stays_on_error(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "before").touch()

    def fail_half_way():
        with replaced_folder(folder) as temporary:
            (temporary / "after").touch()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert names(folder) == ["before"]
    assert names(tmp_path) == ["folder"]


REPLACE_AND_DIE = """
import os, signal, sys
from pathlib import Path
from minsae_jax.files import replaced_folder

renames_left = int(sys.argv[2])
rename = Path.rename

def dying(self, target):
    global renames_left
    if renames_left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    renames_left -= 1
    return rename(self, target)

Path.rename = dying
with replaced_folder(Path(sys.argv[1])) as temporary:
    (temporary / "after").touch()
"""


@pytest.mark.parametrize("renames", [0, 1])
def test_folder_of_killed_process_is_restored(tmp_path, renames):
    """Killed before the first rename or between the two, at most the new content is lost."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "before").touch()
    command = [sys.executable, "-c", REPLACE_AND_DIE, str(folder), str(renames)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert folder.exists() == (renames == 0)
    with replaced_folder(folder) as temporary:
        assert names(folder) == ["before"]
        assert names(temporary) == []
        (temporary / "after").touch()
    assert names(tmp_path) == ["folder"]
    assert names(folder) == ["after"]


def test_foreign_entries_match_no_pattern(tmp_path):
    for name in ("b0001.npy", "manifest.json", "thesis.tex", "notes.md"):
        (tmp_path / name).touch()
    assert foreign_entries(tmp_path, ("b*.npy", "manifest.json")) == ["notes.md", "thesis.tex"]
    assert foreign_entries(tmp_path, ("*",)) == []
    assert foreign_entries(tmp_path / "nowhere", ()) == []


def test_sha256(tmp_path):
    (tmp_path / "x").write_bytes(b"abc" * 100_000)
    assert sha256_of(tmp_path / "x") == hashlib.sha256(b"abc" * 100_000).hexdigest()


@pytest.fixture(params=["posix", "windows"])
def system(request, monkeypatch):
    """Lock as this system does, or with a lock file as Windows does."""
    if request.param == "windows":
        import filelock  # noqa: F401  (before fcntl is hidden, of which it makes use here)

        monkeypatch.setitem(sys.modules, "fcntl", None)
    return request.param


def test_lock_leaves_nothing_in_the_folder(tmp_path, system):
    folder = tmp_path / "run"
    folder.mkdir()
    for _ in range(2):
        with lock_folder(folder):
            assert names(folder) == []
    assert names(folder) == []


def test_lock_of_missing_folder_fails(tmp_path, system):
    with pytest.raises(FileNotFoundError), lock_folder(tmp_path / "nowhere"):
        pass


def test_error_inside_the_lock_is_passed_on(tmp_path, system):
    with pytest.raises(OSError, match="disk full"), lock_folder(tmp_path):
        raise OSError("disk full")
    with lock_folder(tmp_path):  # released
        pass


def test_killed_process_releases_its_lock(tmp_path, system):
    folder = tmp_path / "run"
    folder.mkdir()
    command = [sys.executable, "-c", LOCK_AND_WAIT, str(folder), system]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"locked\n"
        in_use = pytest.raises(UserError, match="is being written by another process")
        with in_use, lock_folder(folder):
            pass
        process.kill()
        process.wait()
    with lock_folder(folder):
        pass


def test_only_regular_files_are_read(tmp_path):
    """Opening a named pipe waits for ever; a device may never end."""
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "device").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as unix_socket:
        unix_socket.bind(str(tmp_path / "socket"))
    for name in ("file", "link"):
        assert regular_file(tmp_path / name) == tmp_path / name
    for name in ("pipe", "device", "socket"):
        with pytest.raises(OSError, match=f"not a regular file.*{name}"):
            regular_file(tmp_path / name)
    with pytest.raises(OSError, match=r"symbolic links.*loop"):
        regular_file(tmp_path / "loop")
    with pytest.raises(FileNotFoundError):
        regular_file(tmp_path / "nothing")
