"""Every kind of input file, mutated: it is read, or refused in one line, soon and in little memory.

A door is whatever reads a file or folder. A mutation changes values, keys, structure or bytes of the file. The door
then reads it, or raises ConfigError, DataError or CheckpointError and no other exception. For mutated weights see
test_checkpoint.py.
"""

import copy
import functools
import gzip
import json
import pickle
import random
import re
import resource
import signal
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from conftest import report_of

import configurator
import sample
import train
from robopoet import files
from robopoet.errors import CheckpointError, ConfigError, DataError
from robopoet.machine import Machine
from robopoet.text import corpus, dataset, windows
from robopoet.text.windows import EvalPlan, eval_batches
from robopoet.training.log import Log
from robopoet.training.run import Progress
from robopoet.weights import checkpoint, huggingface
from robopoet.writing import terminal

EXPECTED = (ConfigError, DataError, CheckpointError)
SECONDS, BYTES = 5, 2**30
CPU = Machine(torch.device("cpu"), torch.float32)
DEEP = "@deep@"  # replaced by deeply nested brackets
VALUES = (None, True, -1, 0, 1, 7, 255, 2**16, 10**5, 10**9, 2**31, 2**63, 10**30, -(10**30), 0.5, 1e-300, 1e308)
VALUES += ("", "x", "\0", "a\nb", "é" * 1000, "\ud800", "/dev/zero", "../../../etc/passwd", "nan", "1e999", "(a*)*b")
VALUES += ([], [[]], {}, {"a": 1}, [0] * 1000, "[", DEEP)
BITS = (b"\0", b"\xff\xfe", b"[" * 10**5, b"{", b'"', b"\n\n", b" " * 10**4, b"9" * 400)


class Door(NamedTuple):
    """A file, its valid content, `dump` which turns that into bytes, and `read` which reads the file."""

    path: Path
    content: Any
    dump: Callable[[Any], bytes]
    read: Callable[[], Any]


def mutated(content: Any, rng: random.Random) -> Any:
    """A copy of a tree of dicts and lists that differs in one to three places."""
    content = copy.deepcopy(content)
    for _ in range(rng.choice([1, 1, 1, 3])):
        if not keys_of(content):
            return rng.choice(VALUES)
        parent, key = place_in(content, rng)
        value, what = parent[key], rng.randrange(5)
        if what == 0:
            del parent[key]
        elif what == 1 and isinstance(parent, dict):
            parent[rng.choice(["x", "", "__class__", f"{key}s"])] = parent.pop(key)
        elif what == 2 and isinstance(value, int | float) and not isinstance(value, bool):
            parent[key] = rng.choice([-value, value + 1, value * 10**6, value + 0.5])
        elif what == 3:
            other, its_key = place_in(content, rng)
            parent[key] = copy.deepcopy(other[its_key])
        else:
            parent[key] = copy.deepcopy(rng.choice(VALUES))
    return content


def place_in(value: Any, rng: random.Random) -> tuple[Any, Any]:
    """A random container in the tree, and one of its keys; large branches are no more likely than small ones."""
    key = rng.choice(keys_of(value))
    return place_in(value[key], rng) if keys_of(value[key]) and rng.random() < 0.6 else (value, key)


def keys_of(value: Any) -> list[Any]:
    return list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []


def mutated_bytes(raw: bytes, rng: random.Random) -> bytes:
    """A copy with bytes changed, removed, repeated or inserted."""
    damaged = bytearray(raw)
    for _ in range(rng.choice([1, 3, 30])):
        at = rng.randrange(len(damaged) + 1)
        part = slice(at, at + rng.randrange(1, 100))
        what = rng.randrange(4)
        if what == 0:
            damaged[at : at + 1] = bytes([rng.randrange(256)])
        elif what == 1:
            del damaged[part]
        else:
            damaged[at:at] = damaged[part] if what == 2 else rng.choice(BITS)
    return bytes(damaged)


def as_json(content: Any) -> bytes:
    deep = "[" * 10**5 + "]" * 10**5
    return json.dumps(content).replace(f'"{DEEP}"', deep).encode()


def as_yaml(content: Any) -> bytes:
    return yaml.dump(content).replace(DEEP, "[" * 10**4).encode("utf-8", "surrogatepass")


# --- the doors


def config_yaml(small: dict, folder: Path) -> Door:
    path = folder / "config.yaml"
    keys = {key: str(value) for key, value in small.items()}
    return Door(path, keys, as_yaml, lambda: configurator.parse(train.TrainConfig, [str(path)]))


def corpus_yaml(small: dict, folder: Path) -> Door:
    (folder / "a.txt").write_text("To be, or not to be.\n\nThat is the question.\n" * 9)
    source = {"style": "a", "licence": "none", "file": "a.txt", "clean": "prose", "remove": ["[0-9]+", "x y"]}
    source |= {"sha256": files.sha256(DataError, folder / "a.txt")}
    content = {"sources": [source], "splits": ["0.8", "0.1", "0.1"], "tags": "true", "text_sha256": "0" * 64}
    return Door(folder / "corpus.yaml", content, as_yaml, lambda: read_corpus(folder))


def read_corpus(folder: Path) -> None:
    manifest = corpus.read_manifest(folder)
    if any(source.url or source.package for source in manifest.sources):
        return  # the network is no part of this
    for _ in corpus.documents(manifest):
        pass


def text(small: dict, folder: Path) -> Door:
    path = folder / "a.txt"
    book = (
        "\ufeff*** START OF THE PROJECT GUTENBERG EBOOK A ***\n\nProduced by B\n\n# ACT I\n\n**ROMEO**\n_[Aside]_ O!\n"
    )
    (folder / "corpus.yaml").write_bytes(as_yaml({"sources": [{"style": "a", "file": "a.txt", "clean": "drama"}]}))
    return Door(path, None, lambda content: (book * 9).encode(), lambda: read_corpus(folder))


def json_lines(small: dict, folder: Path) -> Door:
    path = folder / "a.jsonl"
    (folder / "corpus.yaml").write_bytes(as_yaml({"sources": [{"style": "a", "file": "a.jsonl"}]}))
    lines = [{"text": "To be, or not to be.", "more": 1}, {"text": "That is the question."}]
    return Door(path, lines, lambda content: as_lines(content), lambda: read_corpus(folder))


def as_lines(content: Any) -> bytes:
    return b"\n".join(map(as_json, content if isinstance(content, list) else [content]))


def zipped_lines(small: dict, folder: Path) -> Door:
    door = json_lines(small, folder)
    (folder / "corpus.yaml").write_bytes(as_yaml({"sources": [{"style": "a", "file": "a.jsonl.gz"}]}))
    return door._replace(path=folder / "a.jsonl.gz", dump=lambda content: gzip.compress(as_lines(content), 1))


def meta_json(small: dict, folder: Path) -> Door:
    source = Path(small["dataset"])
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    content = json.loads((folder / "meta.json").read_text())
    del content["sha256"]

    def dump(content: Any) -> bytes:
        body = as_json(content).removesuffix(b"}")
        return body + dataset._seal(body)  # a valid hash, so that the content is read

    return Door(folder / "meta.json", content, dump, lambda: read_dataset(folder))


def read_dataset(folder: Path) -> None:
    meta = dataset.read_meta(folder)
    for name in ("train", "val", "test"):
        split = windows.open_split(folder, name, meta, 16, CPU.device)
        for _ in eval_batches(split, EvalPlan(16, 8), CPU.device):
            pass


TRAINED: dict[str, bytes] = {}  # positions -> a best.pt


def trained(small: dict, positions: str = "learned") -> Path:
    """The best.pt of a run of two steps, which is made once."""
    best = Path(small["out_dir"]) / "best.pt"
    if positions not in TRAINED:
        keys = {"n_layer": 1, "n_embd": 8, "max_iters": 2, "eval_interval": 2, "positions": positions}
        train.main(train.TrainConfig(**small | keys))
        TRAINED[positions] = best.read_bytes()
    best.parent.mkdir(exist_ok=True)
    best.write_bytes(TRAINED[positions])
    return best


def arguments(small: dict, folder: Path) -> Door:
    saved = checkpoint.load(trained(small))
    path = folder / "best.pt"
    keys = (
        "model_args",
        "model_extra",
        "tokenizer",
        "config",
        "iter_num",
        "best_val_loss",
        "licences",
        "text_sha256",
        "identity",
    )
    content = {key: saved[key] for key in keys if key in saved}

    def dump(content: Any) -> bytes:
        checkpoint.save(path, {"model": saved["model"], **content} if isinstance(content, dict) else content)
        return path.read_bytes()

    return Door(path, content, dump, lambda: sample.Poet(str(path), "cpu", "float32").write("O", max_new_tokens=2))


def exported(name: str, **keys: str) -> Callable[[dict, Path], Door]:
    def door(small: dict, folder: Path) -> Door:
        export, loaded = folder / "poet", checkpoint.load_model(trained(small, **keys), CPU.device, CPU.dtype)
        huggingface.export(*loaded, "O", export)
        content = json.loads((export / name).read_text())
        return Door(export / name, content, as_json, lambda: checkpoint.load_model(export, CPU.device, CPU.dtype))

    return door


def safetensors_header(small: dict, folder: Path, **keys: str) -> Door:
    door = exported("config.json", **keys)(small, folder)
    path = door.path.with_name("model.safetensors")
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]

    def dump(content: Any) -> bytes:
        header = as_json(content)
        return struct.pack("<Q", len(header)) + header + raw[8 + size :]

    return Door(path, json.loads(raw[8 : 8 + size]), dump, door.read)


def nanogpt_meta(small: dict, folder: Path) -> Door:
    content = checkpoint.load(trained(small))
    for key in ("tokenizer", "model_extra"):
        del content[key]
    checkpoint.save(folder / "ckpt.pt", content)
    itos = dict(enumerate("".join(map(chr, range(32, 32 + content["model_args"]["vocab_size"])))))
    stoi = {char: id for id, char in itos.items()}
    meta = {"vocab_size": len(itos), "itos": itos, "stoi": stoi}
    read = lambda: checkpoint.load_model(folder / "ckpt.pt", CPU.device, CPU.dtype)  # noqa: E731
    return Door(folder / "meta.pkl", meta, pickle.dumps, read)


def passages(small: dict, folder: Path) -> Door:
    poet, path = sample.Poet(str(trained(small)), "cpu", "float32"), folder / "passages.jsonl"
    written = poet.begin("O", 2, max_new_tokens=5)
    for _ in poet.stream(written, logprobs=True):
        pass
    sample.save_passages(path, poet, written)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return Door(path, lines, as_lines, lambda: sample.replay(path))


def metrics(small: dict, folder: Path) -> Door:
    path = folder / "metrics.jsonl"
    lines = [{"kind": "train", "iter": i, "loss": 1.0, "lr": 0.1, "seconds": 1.0 * i, "run": "a"} for i in range(4)]
    result = {"loss": 1.0, "bpb": 2.0, "loss_by_style": {"a": 1.0, "b": 2.0}, "text": "O", "copied_words": 1}
    lines.insert(3, {"kind": "eval", "iter": 2, "run": "a", **result})

    def read() -> None:
        report = report_of(small)
        Log(lambda: folder, Progress(2, run_id="a"), CPU, [], report)
        report.page()

    return Door(path, lines, as_lines, read)


def prompt(small: dict, folder: Path) -> Door:
    return Door(
        folder / "p", None, lambda content: "O Romeo é\n".encode(), lambda: terminal.read_prompt(f"FILE:{folder}/p")
    )


DOORS = {
    "a config": config_yaml,
    "corpus.yaml": corpus_yaml,
    "a text": text,
    "JSON lines": json_lines,
    "JSON lines, zipped": zipped_lines,
    "meta.json": meta_json,
    "a checkpoint's arguments": arguments,
    "config.json": exported("config.json"),
    "config.json, rotary": exported("config.json", positions="rotary"),
    "tokenizer.json": exported("tokenizer.json"),
    "safetensors": safetensors_header,
    "safetensors, rotary": functools.partial(safetensors_header, positions="rotary"),
    "meta.pkl": nanogpt_meta,
    "passages": passages,
    "metrics.jsonl": metrics,
    "a prompt": prompt,
}


def attack(door: Door, seed: int, times: int) -> int:
    """Read `times` mutations; returns how many were refused."""
    rng, refused = random.Random(seed), 0
    door.path.write_bytes(door.dump(door.content))
    door.read()
    for number in range(times):
        if door.content is None or rng.random() < 0.25:
            raw = mutated_bytes(door.dump(door.content), rng)
        else:
            try:
                raw = door.dump(mutated(door.content, rng))
            except Exception:  # the format can't hold this value
                continue
        door.path.write_bytes(raw)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            door.read()
        except EXPECTED as e:
            refused += 1
            assert str(e) and len(str(e)) < 2000, number
            assert all(len(line) < 1000 for line in str(e).splitlines()), number
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    return refused


@pytest.fixture
def bounded_memory():
    """Limit memory to BYTES more than now; beyond it Python raises MemoryError, which fails the test."""
    now = int(re.search(r"VmData:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (now + BYTES, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_DATA, before)


@pytest.fixture(autouse=True)
def without_hub(monkeypatch):
    def fetch(name: str) -> Path:
        raise CheckpointError(f"{name}: not fetched in a test")

    monkeypatch.setattr(huggingface, "fetch", fetch)


@pytest.fixture
def bounded_time():
    """A door that takes longer than SECONDS raises TimeoutError, which fails the test."""

    def late(number: int, frame: Any) -> None:
        raise TimeoutError(f"over {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    yield
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", DOORS)
def test_mutated_input_ends_in_one_line(name, small, tmp_path, bounded_time, bounded_memory):
    (tmp_path / "door").mkdir()
    refused = attack(DOORS[name](small, tmp_path / "door"), 0, 80)
    assert refused or name in ("metrics.jsonl", "JSON lines")  # their bad lines are dropped, with a warning


@pytest.mark.slow
@pytest.mark.parametrize("name", DOORS)
def test_thousands_of_mutations_end_in_one_line(name, small, tmp_path, bounded_time, bounded_memory):
    (tmp_path / "door").mkdir()
    attack(DOORS[name](small, tmp_path / "door"), 1, 1430)
