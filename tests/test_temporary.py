"""Temporary folders are in memory only where there is enough, and nobody chose another place."""

import sys
import tempfile
from pathlib import Path

import pytest

from tests import temporary


@pytest.fixture
def no_choice(monkeypatch):
    """An environment without TMPDIR, and a process that has not looked for its folder yet."""
    monkeypatch.setenv("TMPDIR", "")  # so that it is restored in any case
    monkeypatch.delenv("TMPDIR")
    monkeypatch.setattr(tempfile, "tempdir", None)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured from /proc")
def test_a_folder_with_enough_room_is_used(no_choice, tmp_path, monkeypatch):
    monkeypatch.setattr(temporary, "MEMORY", tmp_path)
    monkeypatch.setattr(temporary, "ENOUGH", 1)
    temporary.use_memory()
    assert Path(tempfile.gettempdir()) == tmp_path


@pytest.mark.parametrize(("folder", "enough"), [(".", 1 << 60), ("missing", 1)])
def test_without_room_nothing_changes(no_choice, tmp_path, monkeypatch, folder, enough):
    usual = tempfile.gettempdir()
    monkeypatch.setattr(temporary, "MEMORY", tmp_path / folder)
    monkeypatch.setattr(temporary, "ENOUGH", enough)
    temporary.use_memory()
    assert tempfile.gettempdir() == usual


def test_a_folder_of_the_environment_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(temporary, "MEMORY", tmp_path.parent)
    monkeypatch.setattr(temporary, "ENOUGH", 1)
    temporary.use_memory()
    assert Path(tempfile.gettempdir()) == tmp_path
