"""Exports: the endings that a name after --export may have.

To add one, write a module whose `check` and `export` take and return what gguf.py's do, and give it a line here.
`check` raises before anything is generated; `export` returns what to print.
"""

from pathlib import Path

from robopoet.errors import did_you_mean
from robopoet.weights import gguf, html, huggingface

EXPORTS = {  # a name's ending -> the module that exports to it
    ".html": html,  # for a browser
    ".gguf": gguf,  # for llama.cpp
    "": huggingface,  # a folder, for transformers
}


def ending_of(name: str) -> str:
    """The ending in EXPORTS that `name` asks for, or an unknown one; a name that ends with a / is a folder's."""
    return "" if name.endswith("/") else Path(name).suffix


def export_problems(name: str) -> list[str]:
    """What is wrong with `name` as one to export to: nothing, or that no export has its ending."""
    if (ending := ending_of(name)) in EXPORTS:
        return []
    files = ", ".join(f"a {known}" for known in EXPORTS if known)
    return [f"export: found {name}, must be {files}, or a folder, such as x.y/{did_you_mean(ending, EXPORTS)}"]
