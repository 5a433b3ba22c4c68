"""What sample.py, a session and a replay share: prompts as typed, passages as printed, files checked beforehand."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from robopoet import files
from robopoet.errors import ConfigError, warn
from robopoet.writing.passage import Passage
from robopoet.writing.poet import MAX_PROMPT, Poet

BOLD, RED = 1, 31  # codes of paint()


def unescape(text: str) -> str:
    """Replace \\n and \\t, which are easy to type, by a line break and a tab."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


def read_prompt(prompt: str) -> str:
    """The text that the key `prompt` stands for.

    Raises ConfigError if a file or stdin is not UTF-8 or has over 10 MB.
    """
    if prompt.startswith("FILE:"):
        raw, where = files.read_bytes(Path(prompt[5:]), ConfigError, MAX_PROMPT), prompt[5:]
    elif prompt == "-":
        raw, where = sys.stdin.buffer.read(MAX_PROMPT + 1), "stdin"
        if len(raw) > MAX_PROMPT:
            raise ConfigError(f"prompt: stdin has more than {MAX_PROMPT:,} bytes")
    else:
        return unescape(prompt)
    try:
        return raw.decode()
    except UnicodeDecodeError as e:
        raise ConfigError(f"prompt: {where}: byte {e.start} is not UTF-8") from None


def paint(text: str, code: int) -> str:
    """`text` bold or red, if stdout is a terminal that shows it and NO_COLOR is not set (https://no-color.org)."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or os.name == "nt"
    return text if plain or not text or not sys.stdout.isatty() else f"\033[{code}m{text}\033[0m"


def print_passages(
    poet: Poet, passages: list[Passage], stream: Iterator[list[str]], check: bool = False, echo: bool = True
) -> None:
    """Run `stream` and print its passages: a single one as it grows, several at the end.

    An interrupt ends it early; those of several that are finished are printed.

    check: also print how original each one is. echo: print the prompt first, in bold, and warn of its unknown
    characters.
    """
    prompt = passages[0].prompt if echo else ""
    if warning := poet.unknown(prompt):
        warn(warning)
    alone = len(passages) == 1
    if alone:
        print(paint(prompt, BOLD), end="", flush=True)
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
                print("" if alone else paint(prompt, BOLD) + passage.text)
                if passage.is_stuck:
                    n = passage.settings.max_copy
                    warn(f"max_copy: passage {passage.number} ends where every token would copy {n} words; allow more")
                if check:
                    print(f"\n{poet.originality.check(passage.text).describe()}")
                if not alone:
                    print("-" * 15)


def check_writable(key: str, path: Path, is_new: bool = False) -> None:
    """Raise ConfigError unless `path`, the value of `key`, can be created or appended to; is_new: only created."""
    parent = path.absolute().parent
    try:
        if not path.exists():
            if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
                raise ConfigError(f"{key}: {path} can't be created: {parent} is not a folder that can be written to")
        elif is_new:
            raise ConfigError(f"{key}: {path} exists; choose another name, or remove it")
        elif not (path.is_file() and os.access(path, os.W_OK)):
            raise ConfigError(f"{key}: {path} can't be written to; name another file")
    except OSError as e:
        raise ConfigError(f"{key}: {str(path)[:100]}: {e.strerror}") from None
