"""Exports: every ending that a name after --export may have, with what checks a model for it and what writes it.

To add one, give a new module a `check` and an `export` like gguf.py's, and EXPORTS a line.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from model import GPT, GPTConfig
from robopoet.errors import did_you_mean
from robopoet.text.tokenizer import Tokenizer
from robopoet.weights import gguf, html, huggingface
from robopoet.weights.header import ExportDtype


class Export(NamedTuple):
    """What exports a model in one format.

    check: raises CheckpointError for a model or tokenizer that the format can't hold, so that nothing is generated in
    vain. write: writes a new file or folder from a model in float32 on the CPU, its tokenizer, the checkpoint, a sample
    and the dtype of the weights; returns what to print about it.
    """

    check: Callable[[GPTConfig, Tokenizer], None]
    write: Callable[[GPT, Tokenizer, dict[str, Any], str, Path, ExportDtype], str]


EXPORTS = {
    ".html": Export(html.check, html.export),  # browsers
    ".gguf": Export(gguf.check, gguf.export),  # llama.cpp
    "": Export(huggingface.check, huggingface.export),  # a folder: transformers
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
