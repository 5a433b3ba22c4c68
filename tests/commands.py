"""Every command and every key that the documents show, in their order, as a shell reads them."""

import ast
import itertools
import re
import shlex
import subprocess
import textwrap
from collections.abc import Iterator
from pathlib import Path

REPO = Path(__file__).parents[1]
PATTERNS = "README.md CHANGELOG.md CONTRIBUTING.md docs/*.md bench/*.md tests/README.md"
PATTERNS += " *.py bench/*.py docs/*.py config/* bench/*.yaml data/*/corpus.yaml"  # docstrings, headers
DOCUMENTS = [
    path.relative_to(REPO).as_posix()
    for pattern in PATTERNS.split()
    for path in sorted(REPO.glob(pattern))
    if path.name != "LOG.md"  # tells of what was tried with the code of its day
]
FOREIGN = "pip mkdir docker export curl ruff pyrefly wandb ollama llama-quantize .venv/Scripts/activate".split()
PROGRAMS = {"python", "torchrun", "sbatch", "make", *FOREIGN}
KEY = re.compile(r"(?<![\w-])--[a-z]\w*(?:=[^\s`,;)]*[^\s`,;).:])?")
STRING_OR_COMMENT = re.compile(r"""("[^"]*"|'[^']*')|(?<!\S)#[^\n]*""")


def text_of(name: str) -> str:
    """What a document says: a Markdown file, a script's docstring, or the header of YAML or a shell script."""
    text = (REPO / name).read_text(encoding="utf-8")
    if name.endswith(".py"):
        return ast.get_docstring(ast.parse(text)) or ""
    if name.endswith(".md"):
        return text
    header = itertools.takewhile(re.compile(r"#(?!SBATCH)").match, text.removeprefix("#!/bin/bash\n").splitlines())
    return "\n".join(re.sub("^# ?", "", line) for line in header)


def blocks(text: str, indent: str) -> Iterator[tuple[bool, str]]:
    """The text in pieces: what is fenced or indented (True), and what is not; with indent "", its paragraphs."""
    fenced = False

    def kind(line: str) -> tuple[bool, bool]:
        nonlocal fenced
        fence = line.startswith("```")
        fenced ^= fence
        return (fenced or (not indent and bool(line.strip())) or (bool(indent) and line.startswith(indent))), fence

    for (is_block, fence), lines in itertools.groupby(text.splitlines(), kind):
        if not fence:
            yield is_block, textwrap.dedent("\n".join(lines))


def is_command(text: str, least: int = 1) -> bool:
    """Whether a piece of shell begins with one of PROGRAMS, and has at least so many words."""
    words = without_comments(text).split()
    return len(words) >= least and words[0].removeprefix(".venv/bin/") in PROGRAMS


def without_comments(text: str) -> str:
    return STRING_OR_COMMENT.sub(lambda found: found[1] or "", text)


def shown(name: str, text: str) -> Iterator[list[str]]:
    """The words of each command in a document's text; what make does follows make. A key without a command is one too.

    Lines of Python are shown as the command that would run them.
    """
    for words in written_out(name, text):
        yield words
        if words[0] == "make":
            yield from made(*words[1:])


def written_out(name: str, text: str) -> Iterator[list[str]]:
    """The same, without what make does."""
    suffix = name.rpartition(".")[2]
    indent = {"md": "    ", "py": ""}.get(suffix, "  ")
    for is_block, piece in blocks(text, indent):
        if is_block and is_command(piece):
            yield from simple_commands(piece)
        elif is_block and re.match(r"from \w+ import ", piece):
            yield ["python", "-c", piece]
        elif not is_block or not indent:  # else a passage
            for i, span in enumerate(re.split("`([^`]+)`" if suffix == "md" else "(?!)", " ".join(piece.split()))):
                command = re.sub(r"^(\w+\.py) ", r"python \1 ", span)
                if i % 2 and is_command(command, least=2):
                    yield from simple_commands(command)
                else:
                    yield from ([key] for key in (span.split() if i % 2 else KEY.findall(span)) if key[:2] == "--")


def simple_commands(text: str) -> Iterator[list[str]]:
    """The commands of a piece of shell, without comments, lists and pipes taken apart."""
    text = text.replace("\\\n", "")
    lexer = shlex.shlex(without_comments(text), posix=True, punctuation_chars=";&|\n")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t", True, ""
    for is_separator, words in itertools.groupby(lexer, lambda word: not set(word) - set(";&|\n") and word != ""):
        if not is_separator:
            command = list(words)
            command[0] = command[0].removeprefix(".venv/bin/")
            yield command


def made(*targets: str) -> Iterator[list[str]]:
    """The commands that make runs once all is installed."""
    installed = [word for name in ("", "-dev", "-slow") for word in ("-o", f".venv/installed{name}")]
    done = subprocess.run(
        ["make", "--no-print-directory", "-n", *installed, *targets], cwd=REPO, capture_output=True, text=True
    )
    if done.returncode:
        raise ValueError(f"make {' '.join(targets)}: {done.stderr}")
    yield from simple_commands(done.stdout)
