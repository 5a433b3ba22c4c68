"""A small corpus of two styles, prepared once, a small config that trains on it in seconds; and a corpus.yaml."""

import contextlib
import hashlib
import random
import signal
from pathlib import Path

import pytest
import torch

import prepare
from model import GPT, GPTConfig
from robopoet.text import corpus
from robopoet.text.tokenizer import END, CharTokenizer, Tokenizer
from robopoet.training import start
from robopoet.weights import checkpoint
from sample import Poet
from train import TrainConfig

torch.set_num_threads(1)  # the suite runs one process a core

WORDS = "the rabbit queen king heart crown rose night love and of to said went home again never more".split()


def make_book(seed: int, n_paragraphs: int) -> str:
    """Paragraphs of random words: enough structure to learn from, none of it anyone's."""
    rng = random.Random(seed)
    lines = [" ".join(rng.choices(WORDS, k=9)).capitalize() + "." for _ in range(3 * n_paragraphs)]
    return "\n\n".join("\n".join(lines[i : i + 3]) for i in range(0, len(lines), 3)) + "\n"


def decode(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text of `ids`; bytes that are not UTF-8 become U+FFFD."""
    return tokenizer.decode_bytes(ids).decode("utf-8", errors="replace")


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextlib.contextmanager
def within(seconds: float):
    """Ends what hangs: regular expressions look for signals too."""

    def refuse(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, refuse)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def read_all(manifest: corpus.Manifest) -> list[tuple[str, str, str]]:
    return [(doc.name, doc.style, doc.text) for doc in corpus.documents(manifest)]


@pytest.fixture(scope="session")
def books(tmp_path_factory) -> Path:
    """A folder of bins: two books, so two styles, with a character tokenizer."""
    folder = tmp_path_factory.mktemp("books")
    (folder / "alpha.txt").write_text(make_book(1, 60))
    (folder / "beta.txt").write_text(make_book(2, 40).upper())
    prepare.main(prepare.PrepareConfig(input=(str(folder / "*.txt"),), out=str(folder / "bins"), tokenizer="char"))
    return folder / "bins"


@pytest.fixture
def small(books: Path, tmp_path: Path) -> dict:
    """Keys of a TrainConfig that trains a small model on `books`, on the CPU in float32."""
    return {
        "dataset": str(books),
        "out_dir": str(tmp_path / "out"),
        "device": "cpu",
        "dtype": "float32",
        "compile": "false",
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 32,
        "block_size": 32,
        "batch_size": 8,
        "dropout": 0.0,
        "warmup_iters": 2,
        "max_iters": 6,
        "eval_interval": 3,
        "log_interval": 1,
    }


@pytest.fixture
def shapeless(small: dict) -> dict:
    """Those keys without the model's shape, which a checkpoint has."""
    return {key: value for key, value in small.items() if key not in start.SHAPE}


@pytest.fixture
def small_config(small: dict) -> TrainConfig:
    """That config."""
    return TrainConfig(**small)


@pytest.fixture(scope="session")
def random_pt(tmp_path_factory) -> Path:
    """A checkpoint of random weights that generates characters, in two styles."""
    torch.manual_seed(3)
    tokenizer = CharTokenizer("\n !abcdefghijklmnopqrstuvwxyz", [END, "<|alice|>", "<|bard|>", "<|unk|>"])
    model = GPT(GPTConfig(block_size=16, vocab_size=tokenizer.vocab_size, n_layer=2, n_head=2, n_embd=32))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5)
    path = tmp_path_factory.mktemp("model") / "best.pt"
    checkpoint.save(path, {**checkpoint.model_entries(model), "tokenizer": tokenizer.to_json()})
    return path


@pytest.fixture(scope="session")
def poet(random_pt: Path) -> Poet:
    """A poet of that checkpoint, in float64."""
    return Poet(str(random_pt), device="cpu", dtype="float64")


@pytest.fixture
def manifest(tmp_path):
    """Writes a corpus.yaml, and files beside it, and reads it."""

    def read(text: str, **files: bytes) -> corpus.Manifest:
        (tmp_path / "corpus.yaml").write_text(text)
        for name, content in files.items():
            (tmp_path / f"{name}.txt").write_bytes(content)
        return corpus.read_manifest(tmp_path)

    return read
