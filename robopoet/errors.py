"""Errors that are no bug, and how they are told: each names the file or key, what was found and what to do."""

import contextlib
import difflib
import itertools
import math
import os
import sys
from collections.abc import Iterable
from typing import Any

SHOWN_CHARS = 300  # longest line of a message; some quote user input
MOST_COMPARED = 1000  # characters of a word, and words, among which the most similar is looked for


class Mistake(Exception):
    """What is no bug: a script prints its message, one line that says what to do, and exits with code 2."""


class ConfigError(Mistake, ValueError):
    """A setting can't be used."""


class DataError(Mistake, ValueError):
    """A corpus, tokenizer or bin can't be used."""


class CheckpointError(Mistake, ValueError):
    """A checkpoint can't be read, or does not fit."""


class RankError(Mistake, RuntimeError):
    """Another of torchrun's ranks is gone, or does not answer."""


class DivergedError(Mistake, ArithmeticError):
    """A loss or gradient is not finite; the message names the step, the ranks and their rows."""


def warn(message: str) -> None:
    """Print a warning to stderr, as tell() does."""
    tell(f"warning: {message}")


def tell(message: str) -> None:
    """Print a line to stderr, on a machine's first rank alone; does nothing if stderr is closed."""
    if is_other_rank():
        return
    with contextlib.suppress(OSError):
        print(message, file=sys.stderr, flush=True)


def is_other_rank() -> bool:
    """Whether torchrun started this process and it is not the first one of its machine."""
    return "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("LOCAL_RANK") != "0"


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a GPU has too little memory: PyTorch has a type of its own for CUDA's error, but not for MPS's."""
    return "out of memory" in str(error)


def describe(e: Exception) -> str:
    """An exception's message, shortened; an operating system's names its file first, as ours do."""
    if isinstance(e, OSError) and e.strerror:
        return f"{e.filename}: {e.strerror}" if e.filename else e.strerror
    return shorten(str(e)) or type(e).__name__


def shorten(text: str) -> str:
    """`text` on one line of at most SHOWN_CHARS characters; a longer one loses its middle."""
    line = " ".join(text.split())
    return line if len(line) <= SHOWN_CHARS else f"{line[:200]} ... {line[-90:]}"


def bounds(cfg: Any, keys: str, low: float, high: float = math.inf) -> list[str]:
    """A problem for each of the space-separated `keys` whose value lies outside [low, high]; None, auto, never does."""
    wanted = f"at least {low:g}" + (f" and at most {high:,}" if high < math.inf else "")
    values = {key: value for key in keys.split() if (value := getattr(cfg, key)) is not None}
    outside = {key: value for key, value in values.items() if not low <= value <= high or value == math.inf}
    auto = {key: ", or auto" for key in outside if getattr(type(cfg), key, "") is None}  # the key's default
    return [f"{key}: found {value}, must be {wanted}{auto.get(key, '')}" for key, value in outside.items()]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """What a message adds about a `word` that is not among the `known` ones: the most similar of them, if any is."""
    return f"; did you mean {near}?" if (near := nearest(word, known)) else ""


def nearest(word: str, known: Iterable[str]) -> str:
    """The most similar of the `known` words, or "" if none is similar."""
    first = [*itertools.islice(known, MOST_COMPARED)]
    return next(iter(difflib.get_close_matches(word[:MOST_COMPARED], first, n=1)), "")
