"""What sample.py, a session and a replay share: prompts as typed, passages as printed, files checked beforehand."""

import os
from collections.abc import Iterator
from pathlib import Path

from configurator import ConfigError, warn
from robopoet.errors import CheckpointError
from robopoet.writing.passage import Passage
from robopoet.writing.poet import Poet


def unescape(text: str) -> str:
    """Replace \\n and \\t, which are easy to type, by a line break and a tab."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


def print_passages(
    poet: Poet, passages: list[Passage], stream: Iterator[list[str]], check: bool = False, echo: bool = True
) -> None:
    """Run `stream` and print its passages: a single one as it grows, several at the end.

    An interrupt ends it early; those of several that are finished are printed.

    check: also print how original each one is. echo: print the prompt first, and warn of its unknown characters.
    """
    prompt = passages[0].prompt if echo else ""
    if warning := poet.unknown(prompt):
        warn(warning)
    alone = len(passages) == 1
    if alone:
        print(prompt, end="", flush=True)
    try:
        for pieces in stream:
            if alone:
                print(pieces[0], end="", flush=True)
    except KeyboardInterrupt:
        if not alone:
            warn(f"interrupted; {sum(passage.done for passage in passages)} of {len(passages)} passages are finished")
        raise
    finally:
        for passage in passages:
            if passage.done:
                print("" if alone else prompt + passage.text)
                if passage.is_stuck:
                    n = passage.settings.max_copy
                    warn(f"max_copy: passage {passage.number} ends where every token would copy {n} words; allow more")
                if check:
                    print(f"\n{poet.originality.check(passage.text).describe()}")
                if not alone:
                    print("-" * 15)


def check_save(path: Path) -> None:
    """Raise ConfigError unless `path` can be appended to."""
    if _exists("save", path):
        if not path.is_file() or not os.access(path, os.W_OK):
            raise ConfigError(f"save: {path} can't be written to; name another file")
    else:
        _check_parent("save", path)


def check_export(path: Path) -> None:
    """Raise CheckpointError if `path` exists, ConfigError if it can't be created."""
    if _exists("export", path):
        raise CheckpointError(f"export: {path} exists; choose another name, or remove it")
    _check_parent("export", path)


def _exists(key: str, path: Path) -> bool:
    try:
        return path.exists()
    except OSError as e:
        raise ConfigError(f"{key}: {str(path)[:100]}: {e.strerror}") from None


def _check_parent(key: str, path: Path) -> None:
    parent = path.absolute().parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(f"{key}: {path} can't be created: {parent} is not a folder that can be written to")
