"""Train on books that nothing was tuned on, as a user would: prepare.py, then train.py --minutes, and nothing else.

python -m bench.books data/unseen --minutes=2
python -m bench.books data/unseen --minutes=2 --tokenizer=bpe   # without the base model
"""

import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import configurator
from bench.common import last_line, markdown, origin, read_records, write_result
from configurator import ConfigError, bounds
from robopoet.errors import DataError
from robopoet.machine import find_machine
from robopoet.text import corpus
from robopoet.text.batches import read_meta
from train import TrainConfig

CHOSEN = ("init_from", "n_layer", "n_embd", "dropout", "max_iters")


@dataclass(frozen=True)
class BooksConfig:
    """The keys of bench.books."""

    corpus: str = "data/unseen"  # folder of a corpus.yaml; each of its texts is a book of its own
    only: str = ""  # the style of the only text to take
    bytes: int = 0  # how much of each text, from its start (0: all)
    minutes: float = 2.0  # of each run
    tokenizer: str = "auto"  # prepare.py's; bpe: without the base model
    keys: tuple[str, ...] = ()  # more of train.py's, such as --keys=--n_layer=2
    out: str = ""  # name of the result (books_DEVICE unless given)

    def problems(self) -> list[str]:
        """What is wrong with these values, a line each."""
        return bounds(self, "bytes minutes", 0)


def main(cfg: BooksConfig) -> None:
    """Prepare and train on each book, print a table and write the result."""
    machine, books = find_machine("cpu", "auto"), []
    with tempfile.TemporaryDirectory() as folder:
        for doc in corpus.documents(corpus.read_manifest(Path(cfg.corpus))):
            if cfg.only in ("", doc.style):
                path = Path(folder) / f"{doc.style}.txt"
                path.write_bytes(doc.raw.encode()[: cfg.bytes or None])
                books.append({"book": doc.style, "bytes": path.stat().st_size} | run(cfg, path))
                print(books[-1], flush=True)
    if not books:
        raise ConfigError(f"only: found {cfg.only}, which is no style of {cfg.corpus}")
    result = origin("books", machine) | {"minutes": cfg.minutes, "tokenizer": cfg.tokenizer, "books": books}
    print(table([result]))
    write_result(result, cfg.out or "books_DEVICE")


def run(cfg: BooksConfig, path: Path) -> dict[str, Any]:
    """What prepare.py and train.py choose for the text at `path`, and what the run reaches."""
    data, out = path.with_name(f"{path.stem}_bins"), path.with_name(f"{path.stem}_run")
    call("prepare.py", path, f"--out={data}", f"--tokenizer={cfg.tokenizer}")
    begin = time.perf_counter()
    call(
        "train.py", f"--dataset={data}", f"--out_dir={out}", f"--minutes={cfg.minutes}", "--sample_tokens=0", *cfg.keys
    )
    seconds = time.perf_counter() - begin
    kept = yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8"))
    best = min((r for r in read_records(out) if r.kind == "eval"), key=lambda r: r.bpb)
    chosen = {key: kept.get(key, getattr(TrainConfig, key)) for key in CHOSEN}
    return {"vocab_size": read_meta(data).vocab_size, "seconds": seconds, "bpb": best.bpb, "best": best.iter} | chosen


def call(script: str, *args: Any) -> None:
    """Run a script of ours; raises ConfigError with its last line if it fails."""
    command = [sys.executable, str(configurator.HOME / script), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"{script} failed: {last_line(done.stderr)}")


def table(results: list[dict[str, Any]]) -> str:
    """The Markdown table of these results, a row for each book."""
    rows = []
    for r in results:
        for book in r["books"]:
            base = "" if book["init_from"] == "scratch" else "base"
            shape = f"{book['n_layer']} x {book['n_embd']}"
            figures = [
                f"{book['vocab_size']:,}",
                f"{book['best']:,} of {book['max_iters']:,}",
                f"{book['seconds']:.0f}",
            ]
            rows.append(
                [book["book"], f"{book['bytes']:,}", f"{r['minutes']:g}", base, shape, *figures, f"{book['bpb']:.3f}"]
            )
    header = ["book", "bytes", "minutes", "from", "shape", "ids", "best step", "seconds", "bits/byte"]
    return markdown(header, rows)


if __name__ == "__main__":
    configurator.launch(main, BooksConfig, DataError, positional="corpus")
