"""A Modelfile, which tells Ollama how prompts and texts of a GGUF file are to be handled."""

import re
import shlex
from pathlib import Path

from model import GPTConfig
from robopoet.text.chat import go_template, is_chatml
from robopoet.text.tokenizer import CHAT, Tokenizer, style_token, styles
from robopoet.weights.header import SAMPLING

MOST_TOKENS = 300  # sample.py's max_new_tokens: a model of books hardly ever ends a text


def modelfile(file: str, config: GPTConfig, tok: Tokenizer) -> str:
    """The content of a Modelfile beside the GGUF file of this name."""
    tags = ", ".join(map(style_token, styles(tok)))
    parameters = {"num_ctx": config.block_size, "num_predict": MOST_TOKENS, "repeat_penalty": 1.0, **SAMPLING}
    lines = [f"# A prompt may begin with a style's tag: {tags}"] if tags else []
    lines += [f"FROM ./{file}", f'TEMPLATE """{go_template(tok)}"""']
    lines += [f"PARAMETER {name} {value}" for name, value in parameters.items()]
    lines += [f'PARAMETER stop "{name}"' for name in CHAT if is_chatml(tok)]
    return "\n".join([*lines, ""])


def commands(path: Path) -> str:
    """What gives the model to Ollama, by this Modelfile, and runs it: a line each."""
    name = re.sub(r"[^a-z0-9_]+", "-", path.stem.lower()).strip("-")[:80] or "poet"
    return f"ollama create {name} -f {shlex.quote(str(path))}\nollama run {name}"
