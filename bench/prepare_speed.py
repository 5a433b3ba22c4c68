"""Time prepare.py on text of many documents, and its encoder in turns with tiktoken's own batches on as many threads.

python -m bench.prepare_speed
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import tiktoken

import configurator
import prepare
from bench.common import markdown, origin, show, spread, write_result
from bench.peer import resident_mb
from configurator import ConfigError, bounds
from robopoet.errors import DataError
from robopoet.machine import find_machine
from robopoet.text import corpus, tokenizer
from robopoet.text.batches import read_meta
from robopoet.text.tokenizer import BPETokenizer


@dataclass(frozen=True)
class PrepareSpeedConfig:
    """The keys of bench.prepare_speed."""

    corpus: str = "data/robopoet"  # folder of a corpus whose train text is cut into documents, again and again
    document_chars: int = 2000  # characters of a document
    megabytes: float = 200.0  # text that is prepared (MB = 10**6 bytes)
    lap_megabytes: float = 20.0  # text that is encoded in a lap
    vocab_size: int = 6725  # ids in all
    repeats: int = 5  # laps, of which the median counts
    out: str = ""  # name of the result (prepare_speed_DEVICE unless given)

    def problems(self) -> list[str]:
        """What is wrong with these values, a line each."""
        found = bounds(self, "document_chars repeats", 1) + bounds(self, "vocab_size", 1, 65_536)
        return found + bounds(self, "megabytes lap_megabytes", 0)


def documents(cfg: PrepareSpeedConfig, megabytes: float) -> Iterator[str]:
    """The corpus's train text as documents of equal length, from its start again where it ends, up to `megabytes`."""
    manifest = corpus.read_manifest(Path(cfg.corpus))
    works = list(corpus.documents(manifest))
    parts = [part for work in works for part in corpus.split(work, len(works), manifest.splits, exact=False)]
    text = "".join(part for split, part in parts if split == "train")
    size, n = 0.0, cfg.document_chars
    for start in cycle(range(0, len(text), n)):
        if size >= 1e6 * megabytes:
            return
        yield text[start : start + n]
        size += len(text[start : start + n].encode())


def write_lines(path: Path, cfg: PrepareSpeedConfig) -> tuple[int, int]:
    """Write the documents as lines of JSON; returns how many they are and how many bytes of text they hold."""
    count, size = 0, 0
    with open(path, "w", encoding="utf-8") as lines:
        for text in documents(cfg, cfg.megabytes):
            lines.write(json.dumps({"text": text}) + "\n")
            count, size = count + 1, size + len(text.encode())
    return count, size


def run_prepare(path: Path, out: Path, cfg: PrepareSpeedConfig) -> tuple[float, float]:
    """Seconds that prepare.py takes from start to end in a process of its own, and its peak memory in MB."""
    command = [sys.executable, prepare.__file__, f"--input={path}", f"--out={out}", f"--vocab_size={cfg.vocab_size}"]
    start, peak_mem_mb = time.perf_counter(), 0.0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        while process.poll() is None:
            peak_mem_mb = max(peak_mem_mb, resident_mb(process.pid, "VmHWM"))
            time.sleep(0.02)
        elapsed_s = time.perf_counter() - start
        printed = process.stdout.read() if process.stdout else ""
    if process.returncode:
        raise ConfigError(f"prepare.py failed: {(printed.splitlines() or ['it printed nothing'])[-1]}")
    return elapsed_s, peak_mem_mb


def time_encoders(tok: BPETokenizer, texts: list[str], repeats: int) -> tuple[list[float], list[float]]:
    """Tokens per second in laps of prepare.py's encoder and of tiktoken's encode_ordinary_batch, made in turns."""
    ranks, threads = {token: id for id, token in enumerate(tok.tokens)}, os.cpu_count() or 1
    peer = tiktoken.Encoding("peer", pat_str=tok.pattern, mergeable_ranks=ranks, special_tokens={})
    ours, theirs = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        n_tokens = sum(len(ids) for _, ids in tokenizer.encode_all(tok, enumerate(texts)))
        ours.append(n_tokens / (time.perf_counter() - start))
        start = time.perf_counter()
        batch = peer.encode_ordinary_batch(texts, num_threads=threads)
        theirs.append(n_tokens / (time.perf_counter() - start))
        assert sum(map(len, batch)) == n_tokens
    return ours, theirs


def main(cfg: PrepareSpeedConfig) -> None:
    """Prepare the text once, time the encoders on some of it, print the figures and keep them."""
    with tempfile.TemporaryDirectory() as scratch:
        path, out = Path(scratch) / "many.jsonl", Path(scratch) / "out"
        count, size = write_lines(path, cfg)
        seconds, peak_mem_mb = run_prepare(path, out, cfg)
        tok = tokenizer.from_json(read_meta(out).tokenizer)
    ours, theirs = time_encoders(tok, list(documents(cfg, cfg.lap_megabytes)), cfg.repeats)
    result = origin("prepare_speed", find_machine("cpu", "float32")) | {
        "documents": count,
        "megabytes": size / 1e6,
        "vocab_size": cfg.vocab_size,
        "seconds": seconds,
        "mb_per_s": size / 1e6 / seconds,
        "peak_mem_mb": peak_mem_mb,
        "encoding_threads": os.cpu_count() or 1,
        "tok_per_sec": spread(ours),
        "tiktoken_tok_per_sec": spread(theirs),
        "ratio": spread([mine / its for mine, its in zip(ours, theirs, strict=True)]),
    }
    print(table([result]))
    write_result(result, cfg.out or "prepare_speed_DEVICE")


def table(results: list[dict[str, Any]]) -> str:
    """The Markdown table that shows these results."""
    header = ["Device", "Text", "In all", "Peak memory", "Threads", "Encoder", "Tokens/s", "Ours is faster"]
    rows = []
    for r in results:
        whole = [f"{r['megabytes']:,.0f} MB in {r['documents']:,} documents", f"{r['mb_per_s']:,.1f} MB/s"]
        whole += [f"{r['peak_mem_mb']:,.0f} MB", str(r["encoding_threads"])]
        rows.append([r["machine"]["device"], *whole, "RoboPoet", show(r["tok_per_sec"]), ""])
        rows.append([*[""] * 5, "tiktoken", show(r["tiktoken_tok_per_sec"]), show(r["ratio"], ".2f")])
    return markdown(header, rows)


if __name__ == "__main__":
    configurator.launch(main, PrepareSpeedConfig, DataError)
