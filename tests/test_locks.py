"""Locks on folders: by the kernel, and by a file with host and process."""

import errno
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from minsae_jax.errors import UserError
from minsae_jax.locks import lock_folder

LOCK_AND_WAIT = """
import sys
from pathlib import Path
from minsae_jax.locks import lock_folder

import filelock
import fcntl

def no_lock(*_):
    raise OSError(37, "No locks available")

if sys.argv[2] == "windows":
    sys.modules["fcntl"] = None
elif sys.argv[2] == "no flock":
    fcntl.flock = no_lock
with lock_folder(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""
WRITTEN = "is being written by"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def without_flock(monkeypatch, number: int) -> None:
    """Let every lock fail as on a file system that has none."""
    import fcntl

    def fail(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)


@pytest.fixture(params=["posix", "windows", "no flock"])
def system(request, monkeypatch):
    """Lock as this system does, without fcntl as on Windows, or without flock."""
    if request.param == "windows":
        import filelock  # noqa: F401  (before fcntl is hidden, of which it makes use here)

        monkeypatch.setitem(sys.modules, "fcntl", None)
    elif request.param == "no flock":
        without_flock(monkeypatch, errno.ENOLCK)
    return request.param


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "runs" / "demo"
    folder.mkdir(parents=True)
    return folder


def assert_locked(folder: Path) -> None:
    for shared in (False, True):
        with pytest.raises(UserError, match=WRITTEN), lock_folder(folder, shared):
            pass


def assert_free(folder: Path) -> None:
    with lock_folder(folder):
        pass


def test_lock_leaves_nothing_in_the_folder(folder, system):
    for _ in range(2):
        with lock_folder(folder):
            assert names(folder) == []
            assert_locked(folder)
    assert names(folder) == []


def test_lock_of_missing_folder_fails(tmp_path, system):
    with pytest.raises(FileNotFoundError), lock_folder(tmp_path / "nowhere"):
        pass


def test_error_inside_the_lock_is_passed_on(folder, system):
    with pytest.raises(OSError, match="disk full"), lock_folder(folder):
        raise OSError("disk full")
    assert_free(folder)


def test_a_link_has_the_lock_of_its_folder(folder, system):
    link = folder.with_name("link")
    link.symlink_to(folder)
    with lock_folder(folder):
        assert_locked(link)


def test_killed_process_releases_its_lock(folder, system):
    command = [sys.executable, "-c", LOCK_AND_WAIT, str(folder), system]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"locked\n"
        assert_locked(folder)
        process.kill()
        process.wait()
    assert_free(folder)


def test_readers_share_a_lock(folder):
    with (
        lock_folder(folder, shared=True),
        lock_folder(folder, shared=True),
        pytest.raises(UserError, match="is being read by another process"),
        lock_folder(folder),
    ):
        pass
    assert_free(folder)


def test_folder_that_was_replaced_while_it_was_locked_is_refused(folder, monkeypatch):
    import fcntl

    original = fcntl.flock

    def replaced_before(descriptor: int, operation: int) -> None:
        folder.rename(folder.with_name("old"))
        folder.mkdir()
        original(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", replaced_before)
    with pytest.raises(UserError, match=WRITTEN), lock_folder(folder):
        pass


def test_many_readers_start_at_once_without_flock(folder, monkeypatch):
    """They leave no lock file that would be in the way of each other."""
    without_flock(monkeypatch, errno.ENOLCK)
    with lock_folder(folder, shared=True):
        assert names(folder.parent) == ["demo"]
        assert_free(folder)


# A lock file with host and process, where the kernel has no locks.


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EBADF])
def test_lock_file_names_host_and_process(folder, monkeypatch, number):
    without_flock(monkeypatch, number)
    with lock_folder(folder):
        content = folder.with_name(".demo.lock").read_text()
        assert f"pid={os.getpid()}\n" in content
        assert f"host={socket.gethostname()}" in content
        message = f"{WRITTEN} process {os.getpid()} on {socket.gethostname()}; .* remove .*lock"
        with pytest.raises(UserError, match=message), lock_folder(folder):
            pass
    assert names(folder.parent) == ["demo"]


def stale_lock(folder: Path, pid: int, host: str) -> Path:
    """Write the lock file of a process, as it is after a kill, with this host's namespace."""
    with lock_folder(folder):
        content = folder.with_name(".demo.lock").read_text()
    lines = [line for line in content.splitlines() if not line.startswith(("pid=", "start="))]
    content = "\n".join([*lines, f"pid={pid}", ""]).replace(socket.gethostname(), host)
    path = folder.with_name(".demo.lock")
    path.write_text(content)
    return path


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_lock_of_a_dead_process_of_this_host_is_taken_over(folder, monkeypatch):
    without_flock(monkeypatch, errno.ENOLCK)
    path = stale_lock(folder, dead_process(), socket.gethostname())
    with lock_folder(folder):
        assert f"pid={os.getpid()}\n" in path.read_text()
    assert names(folder.parent) == ["demo"]


def test_lock_of_another_host_is_respected(folder, monkeypatch):
    """Whether that process lives cannot be known here; the message says what to do."""
    without_flock(monkeypatch, errno.ENOLCK)
    pid = dead_process()
    path = stale_lock(folder, pid, "elsewhere")
    with (
        pytest.raises(UserError, match=f"process {pid} on elsewhere; .* remove {path}"),
        lock_folder(folder),
    ):
        pass
    path.unlink()
    assert_free(folder)


def test_folder_that_cannot_be_locked_is_a_warning(folder, monkeypatch):
    import filelock

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    without_flock(monkeypatch, errno.ENOLCK)
    monkeypatch.setattr(filelock.MarkerSoftFileLock, "acquire", refused)
    with (
        pytest.warns(UserWarning, match=r"demo cannot be locked \(Permission denied\)"),
        lock_folder(folder),
    ):
        pass
    with lock_folder(folder, shared=True):  # a reader does not need to know
        pass


@pytest.mark.skipif(not Path("/proc/self/mountinfo").exists(), reason="requires Linux")
@pytest.mark.parametrize("remote", ["nfs4", "lustre", "fuse.sshfs"])
def test_lock_file_is_used_on_file_systems_of_other_machines(folder, monkeypatch, remote):
    command = ["df", "--output=fstype", str(folder)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    file_system = result.stdout.split()[-1]
    with lock_folder(folder):
        assert names(folder.parent) == ["demo"]
    read_text = Path.read_text

    def mounts(path: Path, *args, **kwargs) -> str:
        text = read_text(path, *args, **kwargs)
        if path == Path("/proc/self/mountinfo"):
            text = text.replace(f" - {file_system} ", f" - {remote} ")
        return text

    monkeypatch.setattr(Path, "read_text", mounts)
    with lock_folder(folder):
        assert names(folder.parent) == [".demo.lock", "demo"]
        assert_locked(folder)
    assert names(folder.parent) == ["demo"]
