"""Train on books that nothing was tuned on, as a user would: prepare.py, then train.py --minutes, and nothing else.

python -m bench.books data/unseen --minutes=2
python -m bench.books data/unseen --minutes=2 --tokenizer=bpe   # from nothing
python -m bench.books bench/by_hand.yaml                        # beside ten settings by hand
"""

import math
import shlex
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import configurator
from bench.coders import Texts, bits_per_byte
from bench.common import evaluate_test, last_line, markdown, origin, progress, write_result
from robopoet import files
from robopoet.errors import ConfigError, bounds, warn
from robopoet.machine import find_machine
from robopoet.text import corpus
from robopoet.text.dataset import SPLITS, read_meta
from robopoet.training.history import read_records
from train import TrainConfig

CODERS = ("RoboPoet", "PPMd", "Kneser-Ney")  # their bits per byte of the test split are compared
CHOSEN = ("init_from", "n_layer", "n_embd", "dropout", "max_iters")


@dataclass(frozen=True)
class BooksConfig:
    """The keys of bench.books."""

    corpus: str = "data/unseen"  # folder of a corpus.yaml; each of its texts is a book of its own
    only: tuple[str, ...] = ()  # the styles of the texts to take (default: all)
    bytes: int = 0  # how much of each text, from its start (0: all)
    minutes: float = 2.0  # how long each run trains
    tokenizer: str = "auto"  # prepare.py's; bpe: from nothing
    settings: tuple[str, ...] = ("",)  # train each book with each of these too: keys such as "--epochs=2 --dropout=0.3"
    out: str = ""  # name of the result (books_DEVICE unless given)

    def problems(self) -> list[str]:
        """What is wrong with these values, a line each."""
        return bounds(self, "bytes minutes", 0)


def main(cfg: BooksConfig) -> None:
    """Prepare and train on each book, print a table and write the result."""
    machine, books = find_machine("cpu", "auto"), []
    with tempfile.TemporaryDirectory() as folder:
        for doc in progress(corpus.documents(corpus.read_manifest(Path(cfg.corpus))), "texts"):
            if doc.style in (cfg.only or (doc.style,)):
                path = Path(folder) / f"{doc.style}.txt"
                path.write_bytes(doc.text.encode()[: cfg.bytes or None])
                for setting in cfg.settings:
                    try:
                        books.append({"book": doc.style, "bytes": path.stat().st_size} | run(cfg, path, setting))
                        print(books[-1], flush=True)
                    except ConfigError as e:
                        if len(cfg.settings) == 1:
                            raise
                        warn(f"{doc.style} with {setting}: {e}")  # the others count
    if not books:
        raise ConfigError(f"only: found {', '.join(cfg.only)}; no text of {cfg.corpus} has that style, or none trained")
    kind, show = ("books", table) if cfg.settings == ("",) else ("settings", settings_table)
    result = origin(kind, machine) | {"minutes": cfg.minutes, "tokenizer": cfg.tokenizer, "books": books}
    print(show([result]))
    write_result(result, cfg.out or f"{kind}_DEVICE")


def run(cfg: BooksConfig, path: Path, setting: str) -> dict[str, Any]:
    """What prepare.py and train.py choose for the text at `path` beside a setting, and what the run reaches."""
    data, out = path.with_name(f"{path.stem}_bins"), path.with_name(f"{path.stem}_run")
    shutil.rmtree(out, ignore_errors=True)
    words = [f"--tokenizer={cfg.tokenizer}", *shlex.split(setting)]
    of_prepare = [word for word in words if word.startswith(("--tokenizer=", "--vocab_size="))]
    call("prepare.py", path, f"--out={data}", *of_prepare)
    keys = [f"--dataset={data}", f"--out_dir={out}", f"--minutes={cfg.minutes}", "--sample_tokens=0"]
    begin = time.perf_counter()
    call("train.py", *keys, *(word for word in words if word not in of_prepare))
    seconds = time.perf_counter() - begin
    kept = yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8"))
    best = min((r for r in read_records(out) if r.kind == "eval"), key=lambda r: r.bpb)
    chosen = {key: kept.get(key, getattr(TrainConfig, key)) for key in CHOSEN}
    found = {"setting": setting, "vocab_size": read_meta(data).vocab_size, "seconds": seconds}
    return found | {"bpb": best.bpb, "best": best.iter, "test": tested(out / "best.pt", data)} | chosen


def tested(path: Path, data: Path) -> dict[str, float]:
    """The bits per byte of the test split in `data`: the model's at `path`, and those of coders that know its text."""
    meta, evaluated = read_meta(data), evaluate_test(path, find_machine("cpu", "auto"))
    texts = (Texts(data, name, meta, meta.load_tokenizer()) for name in SPLITS)
    found = bits_per_byte(*texts, evaluated, meta.vocab_size)
    return {coder["coder"].split(",")[0]: coder["bpb"] for coder in found}


def call(script: str, *args: Any, cwd: Path | None = None) -> None:
    """Run a script of ours, in the folder `cwd` if given; raises ConfigError with its last line if it fails."""
    command = [sys.executable, str(files.HOME / script), *map(str, args)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"{script} failed: {last_line(done.stderr)}")


def table(results: list[dict[str, Any]]) -> str:
    """The Markdown table of these results, a row for each book."""
    rows = []
    for r in results:
        for book in r["books"]:
            start = Path(book["init_from"])  # out/base/best.pt, scratch or smollm2
            start = start.parent.name or start.name.replace("scratch", "")
            shape = f"{book['n_layer']}x{book['n_embd']}"
            figures = [f"{book['best'] / book['max_iters']:.0%}", f"{book['seconds']:.0f}", f"{book['bpb']:.3f}"]
            figures += [f"{bpb:.3f}" if (bpb := book.get("test", {}).get(coder)) else "" for coder in CODERS]
            rows.append([book["book"], f"{book['bytes'] / 1000:.0f}", f"{r['minutes']:g}", start, shape, *figures])
    header = ["book", "KB", "min", "from", "shape", "best", "s", "val", "test", "PPMd", "KN"]
    return markdown(header, rows)


def settings_table(results: list[dict[str, Any]]) -> str:
    """The Markdown tables of these results: a row for each setting, a column for each book, the lowest loss in bold."""
    tables = []
    for r in results:
        bpb = {(book["setting"], book["book"]): book["bpb"] for book in r["books"]}
        settings = {setting: setting.split() for setting, _ in bpb}
        shared = [word for word in next(iter(settings.values())) if all(word in words for words in settings.values())]
        sizes = {book["book"]: book["bytes"] for book in r["books"]}
        lowest = {name: min(loss for (_, book), loss in bpb.items() if book == name) for name in sizes}
        rows = []
        for setting, words in settings.items():
            cells = [(bpb.get((setting, name), math.nan), lowest[name]) for name in sizes]
            shown = [f"**{loss:.3f}**" if loss == low else f"{loss:.3f}" for loss, low in cells]
            own = " ".join(word for word in words if word not in shared)
            rows.append([f"`{own}`" if own else "nothing else", *shown])
        about = [f"{name}: {size:,} bytes" for name, size in sizes.items()]
        about += [f"minutes: {r['minutes']:g}, tokenizer: {r['tokenizer']}", *(f"`{word}`" for word in shared)]
        tables.append(textwrap.fill("; ".join(about), 100) + "\n\n" + markdown(["", *sizes], rows))
    return "\n\n".join(tables)


if __name__ == "__main__":
    configurator.launch(main, BooksConfig, positional="corpus")
