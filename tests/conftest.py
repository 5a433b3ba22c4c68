"""Small corpora, prepared once, and small configs that train on them in seconds; what several test files share."""

import contextlib
import gc
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_flatten

import configurator
import prepare
import train
from bench import common
from model import GPT, GPTConfig
from robopoet.machine import Machine, find_machine
from robopoet.text import corpus
from robopoet.text.dataset import read_meta
from robopoet.text.tokenizer import END, BPETokenizer, CharTokenizer, Tokenizer
from robopoet.training.plan import SHAPE
from robopoet.training.report import RunReport
from robopoet.weights import bases, checkpoint
from sample import Poet
from train import TrainConfig

torch.set_num_threads(1)  # the suite has as many processes as its machine has cores, or one more


def pytest_collection_finish() -> None:
    """Let no garbage collection walk over what stays until the end: all that the test files have imported."""
    gc.collect()
    gc.freeze()


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


def run_with_hooks(source: str, folder: Path, code: str) -> subprocess.CompletedProcess:
    """Run Python code in a process whose torch finds the hooks of tests/`source`, built in `folder`."""
    here, torch_dir, library = Path(__file__).parent, Path(torch.__file__).parent, folder / "hooks.so"
    headers = [f"-I{torch_dir}/include", f"-I{torch_dir}/include/torch/csrc/api/include"]
    links = [f"-L{torch_dir}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch_dir}/lib"]
    build = ["g++", "-shared", "-fPIC", "-std=c++20", str(here / source), "-o", str(library)]
    subprocess.run([*build, *headers, *links], check=True)
    code = f"import ctypes; ctypes.CDLL({str(library)!r}, mode=ctypes.RTLD_GLOBAL)\n{code}"
    environment = os.environ | {"PYTHONPATH": str(here.parent), "OMP_NUM_THREADS": "1"}
    keys = {"env": environment, "capture_output": True, "text": True, "timeout": 300}
    return subprocess.run([sys.executable, "-c", code], **keys)


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


def records(out_dir: str | Path) -> list[dict]:
    return [json.loads(line) for line in (Path(out_dir) / "metrics.jsonl").read_text().splitlines()]


def assert_equal(ours: object, other: object) -> None:
    """Two checkpoints hold the same, and tensors the same bits."""
    (leaves, shape), (others, its) = tree_flatten(ours), tree_flatten(other)
    assert shape == its
    for found, wanted in zip(leaves, others, strict=True):
        assert torch.equal(found, wanted) if isinstance(wanted, torch.Tensor) else found == wanted


def at_step(monkeypatch, step: int, act) -> None:
    """Call `act()` in the middle of a step."""
    train_step = train.train_step

    def acting(state, windows, number):
        if number == step:
            act()
        return train_step(state, windows, number)

    monkeypatch.setattr(train, "train_step", acting)


class Threaded(checkpoint.Saver):
    """A run's saver that writes in a thread, as on CUDA."""

    def __init__(self, machine: Machine):
        super().__init__(machine)
        self.in_background = True


@pytest.fixture(params=["at once", "in a thread"])
def saver(request, monkeypatch) -> str:
    """How the runs of a test write their checkpoints: both ways, as it is run twice."""
    if request.param == "in a thread":
        monkeypatch.setattr(checkpoint, "Saver", Threaded)
    return request.param


@pytest.fixture(autouse=True)
def base(tmp_path_factory, monkeypatch) -> Path:
    """Where the base model would be: the one that the developer may have made stays out of the tests."""
    path = tmp_path_factory.mktemp("base") / "best.pt"
    monkeypatch.setattr(bases, "BASE", path)
    monkeypatch.setattr(bases, "at_hand", lambda: "")
    return path


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
        "sample_tokens": 0,
    }


def report_of(keys: dict) -> RunReport:
    """The report of a run with those keys of a TrainConfig, before its first record."""
    found = RunReport(read_meta(Path(keys["dataset"])), find_machine("cpu", "float32"))
    found.config, found.settings = configurator.values_of(TrainConfig(**keys)), keys
    return found


@pytest.fixture
def shapeless(small: dict) -> dict:
    """Those keys without the model's shape, which a checkpoint has."""
    return {key: value for key, value in small.items() if key not in SHAPE}


@pytest.fixture
def small_config(small: dict) -> TrainConfig:
    """That config."""
    return TrainConfig(**small)


LETTERS = CharTokenizer("\n !abcdefghijklmnopqrstuvwxyz", [END, "<|alice|>", "<|bard|>", "<|unk|>"])


LLAMA = {"positions": "rotary", "norm": "rmsnorm", "mlp": "swiglu", "bias": False, "n_kv_head": 1}
KINDS = {"learned": {}, "rotary": {"positions": "rotary"}, "llama": LLAMA}  # what a GPTConfig has of each


def save_random(path: Path, tok: Tokenizer = LETTERS, seed: int = 3, scale: float = 5, **shape) -> Path:
    """A checkpoint of random weights, `scale` times as large as a new model's, so that its text varies."""
    torch.manual_seed(seed)
    keys = {"block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 32} | shape
    model = GPT(GPTConfig(**keys, vocab_size=tok.vocab_size))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale)
    checkpoint.save(path, {**checkpoint.model_entries(model), "tokenizer": tok.to_json()})
    return path


@pytest.fixture(scope="session")
def random_pt(tmp_path_factory) -> Path:
    """A checkpoint of random weights that generates characters, in two styles."""
    return save_random(tmp_path_factory.mktemp("model") / "best.pt")


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


@pytest.fixture
def browser():
    """Chromium without a network, which logs every request."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="requirements-slow.txt has it")
    if not (chromium := shutil.which("chromium")) or not (driver := shutil.which("chromedriver")):
        pytest.skip("needs Chromium and its driver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless=new", "--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND", "--window-size=1100,900"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with webdriver.Chrome(options, webdriver.ChromeService(driver)) as browser:
        yield browser


# --- what the tests of tokenizers share


SPECIALS = [END, "<|a|>", "<|b|>"]
MIXED_WORDS = "The and rose queen's heart HE'LL 1599 42 -- night! «été» naïve 東京 🙂👩‍👩‍👧 nevermore".split()


def make_text(n_words: int, seed: int = 0) -> str:
    """Words, numbers, punctuation, other scripts, paragraphs and indents, in no order."""
    rng, gaps = random.Random(seed), ["", " ", " ", " ", ",  ", "\n", "\n\n", ".\n  "]
    return "".join(rng.choice(MIXED_WORDS) + rng.choice(gaps) for _ in range(n_words))


TEXT = make_text(3000)


@pytest.fixture(scope="session")
def bpe() -> BPETokenizer:
    return BPETokenizer.train([TEXT], 340, SPECIALS)


@pytest.fixture(scope="session")
def char() -> CharTokenizer:
    return CharTokenizer.train([TEXT], SPECIALS)


# --- what the tests of bench share


REPO = Path(__file__).parents[1]
TINY = ["--block_size=16", "--batch_size=4", "--n_layer=1", "--n_head=2", "--n_embd=16", "--device=cpu"]
TINY += ["--dtype=float32", "--compile=false", "--max_iters=4", "--warmup_iters=0"]


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A folder that holds tiny data and a finished run on it, made as a user makes them."""
    folder = tmp_path_factory.mktemp("bench")
    for style in ("day", "night"):
        (folder / f"{style}.txt").write_text(f"To be or not to be, by {style}.\n\n" * 100, encoding="utf-8")
    data = str(folder / "data")
    prepare.main(prepare.PrepareConfig(input=(f"{folder}/*.txt",), out=data, tokenizer="char"))
    (folder / "tiny.yaml").write_text(f"dataset: {data}\nout_dir: {folder}/out\n", encoding="utf-8")
    train.main(configurator.parse(train.TrainConfig, [f"{folder}/tiny.yaml", *TINY]))
    return folder


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


STAND_IN = """
import os, sys, torch
from model import GPT, GPTConfig
args = dict(arg[2:].split("=") for arg in sys.argv[1:])
assert sorted(os.listdir("data/" + args["dataset"])) == ["meta.pkl", "train.bin", "val.bin"]
torch.manual_seed(1337)
keys = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "vocab_size": int(open("vocab").read())}
model = GPT(GPTConfig(**keys))
os.makedirs(args["out_dir"])
for i in range(int(args["max_iters"]) + 1):
    if i and i % int(args["eval_interval"]) == 0:
        content = {"model": model.state_dict(), "model_args": keys | {"bias": True, "dropout": 0.0}, "iter_num": i}
        config = {"batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": args.get("learning_rate")}
        torch.save(content | {"best_val_loss": 1.0, "optimizer": {}, "config": config}, args["out_dir"] + "/ckpt.pt")
    slow = i % int(args["eval_interval"]) == 0  # it counts its evaluations
    print(f"iter {i}: loss 3.0, time {500 if slow else 10}.00ms, mfu 1.00%")
"""


WRITES = """
class GPT(GPT):
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        for _ in range(max_new_tokens):
            logits = self(idx[:, -self.config.block_size :])[0][:, -1] / temperature
            kept = logits.topk(min(top_k, logits.shape[1]))
            chosen = kept.indices.gather(1, torch.multinomial(kept.values.softmax(-1), 1))
            idx = torch.cat([idx, chosen], dim=1)
        return idx
"""


OURS = "from robopoet.ops import Dropout, Linear, cross_entropy, linear, scaled_dot_product_attention\n"
TORCHS = """from torch.nn import Dropout, Linear
from torch.nn.functional import cross_entropy, linear, scaled_dot_product_attention
"""


@pytest.fixture
def peer(run, tmp_path):
    """A checkout that is laid out as nanoGPT's and talks like it; our own model has its names and shapes."""
    folder = tmp_path / "peer"
    (folder / "config").mkdir(parents=True)
    vocab_size = read_meta(run / "data").vocab_size
    train_py = STAND_IN.replace('open("vocab").read()', f'"{vocab_size}"')
    (folder / "train.py").write_text(train_py, encoding="utf-8")
    (folder / "configurator.py").write_text("", encoding="utf-8")
    model_py = (REPO / "model.py").read_text(encoding="utf-8")
    assert OURS in model_py
    (folder / "model.py").write_text(model_py.replace(OURS, TORCHS) + WRITES, encoding="utf-8")
    return folder


def start(monkeypatch, script, cls, *args, positional=None):
    """Run a script's main on a command line; returns what it wrote."""
    monkeypatch.setattr(sys, "argv", [script.__file__, *args])
    script.main(configurator.parse(cls, list(args), positional))
    (path,) = common.RESULTS.glob("*.json")
    text = path.read_text(encoding="utf-8")
    assert text.endswith("}\n")
    result = json.loads(text)
    assert text == json.dumps(result, indent=2, sort_keys=True) + "\n"
    assert str(Path(args[0]).parent) not in text  # no absolute path
    return result, path.stem


def ordered(figure):
    return 0 < figure["min"] <= figure["median"] <= figure["max"]
