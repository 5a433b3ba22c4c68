"""Typed lines: what is kept of them, where, and for whom."""

import os
import stat
import types
from pathlib import Path

import pytest

from robopoet.writing import editing
from robopoet.writing.editing import edit_lines, history_file, keep_line


@pytest.fixture
def path(tmp_path, monkeypatch) -> Path:
    """The history's file, in a folder of the test's."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return history_file()


def test_the_history_is_in_the_users_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "x"))
    assert history_file() == tmp_path / "x" / "robopoet" / "history"
    for ignored in ("", "not/absolute"):
        monkeypatch.setenv("XDG_STATE_HOME", ignored)
        assert history_file() == tmp_path / ".local" / "state" / "robopoet" / "history"


def test_lines_are_kept_for_their_owner_alone(path):
    before = os.umask(0)
    try:
        for line in ("To be", "a\nb", "a\nb", " ", "x" * 10_001, "存在", "a\nb"):
            keep_line(path, line)
    finally:
        os.umask(before)
    assert path.read_text("utf-8") == "To be\na\\nb\n存在\na\\nb\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert os.listdir(path.parent) == ["history"]


def test_the_history_is_bounded(path, monkeypatch):
    monkeypatch.setattr(editing, "HISTORY_LINES", 3)
    for i in range(5):
        keep_line(path, str(i))
    assert path.read_text() == "2\n3\n4\n"


def test_a_failure_leaves_the_history_as_it_was(path, monkeypatch):
    keep_line(path, "kept")

    def fail(*_):
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as m:
            m.setattr(os, name, fail)
            keep_line(path, "lost")
        assert path.read_text() == "kept\n" and os.listdir(path.parent) == ["history"]


def test_a_history_that_is_linked_elsewhere_stays_linked(path, tmp_path):
    path.parent.mkdir(parents=True)
    path.symlink_to(os.devnull)
    keep_line(path, "never")
    assert path.is_symlink() and not Path(os.devnull).is_file()
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    keep_line(path, "one")
    keep_line(path, "two")
    assert path.is_symlink() and (tmp_path / "elsewhere").read_text() == "one\ntwo\n"


@pytest.mark.parametrize("terminals", [("stdin", "stdout"), ("stdin",), ("stdout",), ()])
def test_only_a_terminals_lines_are_edited(path, monkeypatch, terminals):
    readline = pytest.importorskip("readline")
    keep_line(path, "earlier")
    for name in ("stdin", "stdout"):
        is_terminal = name in terminals
        monkeypatch.setattr(f"sys.{name}", types.SimpleNamespace(isatty=lambda found=is_terminal: found))
    readline.clear_history()
    assert edit_lines(lambda line: []) == (path if len(terminals) == 2 else None)
    assert readline.get_current_history_length() == (len(terminals) == 2)
    readline.clear_history()
    readline.set_completer(None)
    monkeypatch.setitem(__import__("sys").modules, "readline", None)  # as on Windows
    assert edit_lines(lambda line: []) is None


@pytest.mark.parametrize("content", [b"\0\n\xff\xfe\nlast\n", b"last", b"\n\n\nlast\n\n"])
def test_a_damaged_history_is_read_as_far_as_it_can_be(path, monkeypatch, content):
    readline = pytest.importorskip("readline")
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    for name in ("stdin", "stdout"):
        monkeypatch.setattr(f"sys.{name}", types.SimpleNamespace(isatty=lambda: True))
    readline.clear_history()
    edit_lines(lambda line: [])
    assert readline.get_history_item(readline.get_current_history_length()) == "last"
    readline.clear_history()
    readline.set_completer(None)
