"""The documents' commands run in a copy of the tree, in their order, as they stand but for what is put in here."""

import glob
import gzip
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from commands import DOCUMENTS, REPO, made, shown, text_of
from conftest import make_book
from scripts import Script, run_script
from test_books import epub
from test_commands import GIVEN, POEM
from test_ecosystem import save_nanogpt

pytestmark = pytest.mark.slow

SHORT = "--n_layer=1 --n_head=1 --n_embd=8 --block_size=32 --batch_size=4 --gradient_accumulation_steps=2 --epochs=0"
SHORT += " --max_iters=2 --eval_iters=2 --sample_tokens=4 --sampled_softmax=0 --device=cpu"
PUT_IN = {  # what a command matches -> the words that it gets
    r"train\.py": SHORT,
    r"train\.py --out_dir=out/demo --init_from=auto": "--max_iters=4",  # it goes on
    r"torchrun": "--dtype=float32",
    r"sample\.py(?!.*--replay)": "--max_new_tokens=4 --device=cpu",
    r"serve\.py": "--port=0 --device=cpu",
    r"prepare\.py.*--tokenizer=gpt2": "--tokenizer=char",  # GPT-2's table would be downloaded
    r"bench\.copying": "--passages=2 --together=1 --max_new_tokens=20 --device=cpu",
    r"bench\.demo": "--device=cpu",
    r"bench\.html": "--tokens=3 --repeats=1",
    r"bench\.window": "--blocks=2 --rows=2 --device=cpu",
}
TYPED = {r"--interactive": b"/help\n/quit\n"}
NOT_RUN = {  # what a document's name and a command match -> why it is not run here
    r": (make|--\w|export)": "has its commands below it, or is none",
    r": (pip|\S+/activate|python -m venv)": "changes the environment",
    r": (python -m pytest|ruff check|pyrefly check)": "is how these tests are run",
    r": (docker|ollama|llama-quantize)": "a program that is not ours",
    r": (sbatch|torchrun --nnodes)": "takes two machines; test_ranks.py has two that are one",
    r"(gpt2\.yaml|train\.py): torchrun": "the README's is run, which is like it; ranks take long to start",
    r"smollm2|--init_from=gpt2|load_dataset|: mkdir": "downloads from the Hub",
    r"--screenshot": "takes a browser; test_html_page.py has one",
    r"wandb sweep|docs/search\.py": "takes an account, or long; test_search.py has short ones",
    r"PATH_TO_NANOGPT|FOLDER": "takes what no one ships; test_bench_peer.py and test_bench_books_read.py have some",
    r"bench\.(books|search|finetune|learn|memory|ranks|scaling|prepare_speed|serve|torture|gpu|train_speed)\b|"
    r"bench\.(sample_speed|writing)\b": "takes long, as most start processes that import torch; each has a short test",
}
SHOWN_ELSEWHERE = ("bench/PASSAGES.md", "bench/RESULTS.md", "tests/README.md")  # by docstrings, with other settings


def runnable(name: str) -> list[list[str]]:
    """The commands of a document that are run here."""
    lines = [(f"{name}: {shlex.join(words)}", words) for words in shown(name, text_of(name))]
    return [words for line, words in lines if not any(re.search(what, line) for what in NOT_RUN)]


def copied_tree(folder: Path) -> Path:
    """A copy of what is committed and runs, whose corpora have the same styles with texts of a few pages."""
    for name in ("robopoet", "bench", "config"):
        shutil.copytree(REPO / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (*REPO.glob("*.py"), *REPO.glob("*.md"), REPO / "pyproject.toml"):
        shutil.copy(path, folder)
    for path in REPO.glob("data/*/corpus.yaml"):
        (target := folder / "data" / path.parent.name).mkdir(parents=True)
        content = yaml.safe_load(path.read_text())
        styles = [source["style"] for source in content["sources"]]
        for i, style in enumerate(styles):
            (target / f"{style}.txt").write_text(make_book(i, 60))
        sources = [{"style": style, "file": f"{style}.txt"} for style in styles]
        kept = {key: content[key] for key in ("splits", "tags")} | {"sources": sources, "vocab_size": 300}
        (target / "corpus.yaml").write_text(yaml.dump(kept))
    return folder


def bring(name: str, folder: Path, poem: Path) -> None:
    """Give a reader's folder a file; runs and bins are those of `poem`, a folder where make poem has run."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if name.startswith("nanoGPT/"):
        save_nanogpt(folder / "nanoGPT", path.parent.name, "\n :EMOR")
    elif name.startswith(("data/", "out/")):
        here = "data/robopoet" if name.startswith("data/") else "out/demo"
        shutil.copytree(poem / here, path.parent, dirs_exist_ok=True)
    elif name.endswith(".epub"):
        path.write_bytes(epub({"OEBPS/text/one.xhtml": f"<html><body><p>{make_book(5, 60)}</p></body></html>"}))
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(json.dumps({"text": make_book(6, 60)}).encode()))
    else:
        path.write_text(make_book(7, 60))


class Shell:
    """Runs commands in a folder. port: of the server that runs, if one does."""

    def __init__(self, folder: Path):
        self.folder, self.port, self.servers = folder, "", []
        self.environment = {"HF_HOME": str(folder / "hub"), "OMP_NUM_THREADS": "1", "ROBOPOET_API_KEY": ""}

    def run(self, words: list[str]) -> None:
        """Run a command to its end, with what is put in; a server goes on."""
        line = shlex.join(words)
        words = [*words, *(word for what, put in PUT_IN.items() if re.search(what, line) for word in put.split())]
        program, *args = words
        if program == "python" and args[0] == "serve.py" and "--help" not in args:
            return self.serve(args)
        if program == "python":
            args = [path for arg in args for path in sorted(glob.glob(arg, root_dir=self.folder)) or [arg]]
            args[0] = args[0] if args[0] in ("-c", "-m") else str(self.folder / args[0])
            typed = next((keys for what, keys in TYPED.items() if re.search(what, line)), b"")
            done = run_script(*args, stdin=typed, cwd=self.folder, **self.environment)
        else:
            words = [word.replace("nproc_per_node=8", "nproc_per_node=2").replace(":8000", self.port) for word in words]
            path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
            environment = os.environ | self.environment | {"PATH": path}
            done = subprocess.run(words, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"

    def serve(self, args: list[str]) -> None:
        """Start a server, and wait until it listens."""
        reading, writing = os.pipe()
        args[0] = str(self.folder / args[0])
        self.servers.append(Script(*args, stdin=0, stdout=writing, stderr=writing, cwd=self.folder, **self.environment))
        os.close(writing)
        said = ""
        while not (found := re.search(r"at http://[\d.]+(:\d+)/", said)):
            said += (more := os.read(reading, 4096).decode())
            assert more, said
        self.port = found[1]

    def end(self) -> None:
        """End the servers as their users do."""
        for server in self.servers:
            server.signal(signal.SIGTERM)
            assert server.wait() == 0


@pytest.fixture(scope="module")
def poem(tmp_path_factory) -> Path:
    """A copy of the tree where make poem has run."""
    folder = copied_tree(tmp_path_factory.mktemp("poem"))
    for words in made("poem"):
        Shell(folder).run(words)
    return folder


@pytest.mark.parametrize("name", [name for name in DOCUMENTS if name not in SHOWN_ELSEWHERE and runnable(name)])
def test_the_commands_of_a_document_run(name, poem, tmp_path):
    shell = Shell(copied_tree(tmp_path))
    for path in GIVEN.get(name, POEM).split():
        bring(path, tmp_path, poem)
    try:
        for words in runnable(name):
            shell.run(words)
    finally:
        shell.end()


def test_what_is_not_run_and_what_is_put_in_are_of_commands_that_are_there():
    names = [name for name in DOCUMENTS if name not in SHOWN_ELSEWHERE]
    lines = [f"{name}: {shlex.join(words)}" for name in names for words in shown(name, text_of(name))]
    assert [what for what in NOT_RUN | PUT_IN | TYPED if not any(re.search(what, line) for line in lines)] == []
