"""A model as one HTML file that generates text offline: weights, tokenizer, poet.js and poet.html.

Nothing in it comes from a checkpoint or a prompt but base64 and JSON without a "<", and text that is escaped. Its
Content-Security-Policy forbids the network and every script but ours, known by their hashes.
"""

import base64
import dataclasses
import hashlib
import html
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from model import GPT, GPTConfig
from robopoet import files
from robopoet.errors import CheckpointError
from robopoet.text import tokenizer
from robopoet.weights.architectures import architecture_of, is_as_wide_as_gpt2
from robopoet.weights.header import ExportDtype
from robopoet.weights.layout import in_dtype, without_memory

HERE = Path(__file__).parent
MOST_PARAMETERS = 30_000_000  # a page with so many makes some ten tokens a second
SCRIPT = re.compile(r"<script>(.*?)</script>", re.S)
STYLE = re.compile(r"<style>(.*?)</style>", re.S)


def check(config: GPTConfig, tok: tokenizer.Tokenizer) -> None:
    """Raise CheckpointError for a model that is too large for a page, or whose blocks are not GPT-2's.

    Any tokenizer will do.
    """
    is_bpe = isinstance(tok, tokenizer.BPETokenizer)
    instead = "a GGUF for llama.cpp: --export=poet.gguf" if is_bpe else "a folder for transformers: --export=poet"
    if config.norm != "layernorm" or config.mlp != "gelu" or not is_as_wide_as_gpt2(config):
        kind = architecture_of(config).title
        raise CheckpointError(f"export: a page computes GPT-2's blocks, not this {kind}'s; write {instead}")
    n = without_memory(config, config.n_layer).num_params()
    if n > MOST_PARAMETERS:
        raise CheckpointError(
            f"export: the model has {n:,} parameters, a page can take {MOST_PARAMETERS:,}; write {instead}"
        )


def export(
    model: GPT,
    tok: tokenizer.Tokenizer,
    content: dict[str, Any],
    passage: str,
    path: Path,
    dtype: ExportDtype = "float16",
    picture: str = "",
) -> str:
    """Write a new HTML file that generates text in a browser; returns a line that says how large it is.

    The arguments are those of make_page(), but for `picture`, which is unused. Raises OSError if the file exists or
    can't be written, and as make_page() does.
    """
    with files.creating(path) as part, open(part, "w", encoding="utf-8", newline="\n") as f:
        f.writelines(make_page(model, tok, content, passage, dtype))
        f.flush()
        os.fsync(f.fileno())
    return f"{path.stat().st_size / 1e6:,.1f} MB; open it in a browser, offline too"


def make_page(
    model: GPT, tok: tokenizer.Tokenizer, content: dict[str, Any], passage: str, dtype: ExportDtype = "float16"
) -> Iterator[str]:
    """The page's text, part by part, so that a large model is never one string.

    content: the checkpoint. passage: a sample that the page shows at first. Raises CheckpointError if a weight is
    too large for float16, and as check() does.
    """
    check(model.config, tok)
    about = {
        "title": title(tok, content),
        "styles": list(tokenizer.styles(tok)),
        "licences": list(content.get("licences") or ()),
        "sample": passage,
        "parameters": model.num_params(),
        "dtype": dtype,
        "config": dataclasses.asdict(model.config),
        "tokenizer": tok.to_json(),
    }
    page = (HERE / "poet.html").read_text(encoding="utf-8")
    parts = {
        "policy": policy(page),
        "title": html.escape(about["title"]),
        "about": json.dumps(about).replace("<", "\\u003c"),
        "engine": (HERE / "poet.js").read_text(encoding="utf-8"),
    }
    before, after = (re.sub(r"\{\{(\w+)\}\}", lambda slot: parts[slot[1]], part) for part in page.split("{{weights}}"))
    yield before
    yield from _weights(model, dtype)
    yield after


def title(tok: tokenizer.Tokenizer, content: dict[str, Any]) -> str:
    """The page's title: the model's styles, else the name of the dataset that it was trained on."""
    names = list(tokenizer.styles(tok)) or [Path(content.get("config", {}).get("dataset", "")).name or "RoboPoet"]
    names = [name.replace("_", " ").title() if name.islower() else name for name in names[:4]]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def policy(page: str) -> str:
    """The Content-Security-Policy of poet.html: no network, no script or style but its own, no text taken as HTML.

    WebAssembly, which poet.js multiplies with, is a script that JavaScript makes.
    """
    return (
        f"default-src 'none'; script-src {hashes(SCRIPT, page)} 'wasm-unsafe-eval'; "
        f"style-src {hashes(STYLE, page)}; worker-src blob:; base-uri 'none'; form-action 'none'; "
        "require-trusted-types-for 'script'; trusted-types engine"
    )


def hashes(element: re.Pattern[str], page: str) -> str:
    """A policy's sources that allow what the page's elements of a kind hold, and nothing else."""
    found = [hashlib.sha256(text.encode()).digest() for text in element.findall(page)]
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in found)


def _weights(model: GPT, dtype: ExportDtype) -> Iterator[str]:
    """A line for each tensor of the state dict: an element that holds it in base64, row by row, little-endian."""
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":  # the embedding's own
            continue
        numbers = in_dtype(weight, name, dtype).numpy()
        raw = numbers.astype(numbers.dtype.newbyteorder("<")).tobytes()
        yield f'<script type="text/plain" data-name="{name}">{base64.b64encode(raw).decode()}</script>\n'
