"""Lines typed in a terminal: completed with Tab, and kept in a history that lasts."""

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

from robopoet import files
from robopoet.errors import ConfigError, Mistake

HISTORY_LINES, HISTORY_CHARS = 1000, 10_000  # lines that are kept, and characters of the longest


def edit_lines(complete: Callable[[str], list[str]]) -> Path | None:
    """Let input() edit lines, complete them and recall earlier ones, if it reads a terminal and Python has readline.

    complete: called with a line up to the cursor; returns what it may become, each with that line in front. Returns the
    file for keep_line(), or None where no lines are edited.
    """
    try:
        import readline
    except ImportError:  # as on Windows
        return None
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return None
    found: list[str] = []

    def candidate(_text: str, i: int) -> str | None:
        if i == 0:
            start, end = readline.get_begidx(), readline.get_endidx()
            found[:] = [whole[start:] for whole in complete(readline.get_line_buffer()[:end])]
        return found[i] if i < len(found) else None

    readline.set_completer_delims(" ,=")
    readline.set_completer(candidate)
    readline.parse_and_bind("bind ^I rl_complete" if "libedit" in (readline.__doc__ or "") else "tab: complete")
    readline.parse_and_bind("set enable-bracketed-paste on")  # a text of several lines, pasted, is one prompt
    path = history_file()
    with contextlib.suppress(OSError, Mistake):
        for line in _read(path):
            with contextlib.suppress(ValueError):  # a character that the terminal's encoding lacks
                readline.add_history(line)
    return path


def history_file() -> Path:
    """Where typed lines are kept: in the user's folder of programs' state (XDG Base Directory Specification)."""
    state = os.environ.get("XDG_STATE_HOME", "")
    folder = state if os.path.isabs(state) else os.path.expanduser("~/.local/state")
    return Path(folder) / "robopoet" / "history"


def keep_line(path: Path, line: str) -> None:
    """Append a line to the history, its line breaks as \\n, unless it is blank, long or the last again.

    A history that can't be read or written stays as it is.
    """
    line = line.replace("\n", "\\n")
    with contextlib.suppress(OSError, Mistake):
        before = _read(path)
        if line.strip() and len(line) <= HISTORY_CHARS and before[-1:] != [line]:
            kept = "\n".join([*before, line][-HISTORY_LINES:]) + "\n"
            files.replace_private(path.resolve(), kept.encode(errors="replace"))


def _read(path: Path) -> list[str]:
    """The lines of the history, none if there is no file; raises ConfigError if it can't be read."""
    text = files.read_bytes(path, ConfigError).decode(errors="replace") if path.exists() else ""
    return [line for line in text.split("\n")[-HISTORY_LINES - 1 :] if line]
