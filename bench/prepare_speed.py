"""Time prepare.py on many documents, and its encoder in turns with tiktoken's encode_ordinary_batch.

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
from bench.common import last_line, origin, progress, reporting, show, side_by_side, spread, write_result
from bench.peer import resident_mb
from robopoet.errors import ConfigError, bounds
from robopoet.machine import find_machine
from robopoet.text import corpus, tokenizer
from robopoet.text.dataset import MAX_VOCAB_SIZE, read_meta
from robopoet.text.tokenizer import BPETokenizer

SPEEDS = ("tok_per_sec", "tiktoken_tok_per_sec")  # the keys of both encoders


@dataclass(frozen=True)
class PrepareSpeedConfig:
    """The keys of bench.prepare_speed."""

    corpus: str = "data/robopoet"  # folder of the corpus whose train text is cut into documents, over and over
    document_chars: int = 2000  # characters of a document
    megabytes: float = 200.0  # text to prepare (MB = 10**6 bytes)
    lap_megabytes: float = 20.0  # text to encode in a lap
    vocab_size: int = 6725  # ids in all
    repeats: int = 5  # laps; the median counts
    out: str = ""  # name of the result (prepare_speed_DEVICE unless given)

    def problems(self) -> list[str]:
        """What is wrong with these values, a line each."""
        found = bounds(self, "document_chars repeats", 1) + bounds(self, "vocab_size", 1, MAX_VOCAB_SIZE)
        return found + bounds(self, "megabytes lap_megabytes", 0)


def documents(cfg: PrepareSpeedConfig, megabytes: float) -> Iterator[str]:
    """The corpus's train text, repeated, as documents of equal length, up to `megabytes`."""
    manifest = corpus.read_manifest(Path(cfg.corpus))
    works = list(corpus.documents(manifest))
    parts = corpus.parts(works, manifest, corpus.survey(works))
    text = "".join(text for part, text in parts if part.split == "train")
    size, n = 0.0, cfg.document_chars
    for start in cycle(range(0, len(text), n)):
        if size >= 1e6 * megabytes:
            return
        yield text[start : start + n]
        size += len(text[start : start + n].encode())


def write_lines(path: Path, cfg: PrepareSpeedConfig) -> tuple[int, int]:
    """Write the documents as lines of JSON; returns their number and their bytes of text."""
    count, size = 0, 0
    with open(path, "w", encoding="utf-8") as lines:
        for text in documents(cfg, cfg.megabytes):
            lines.write(json.dumps({"text": text}) + "\n")
            count, size = count + 1, size + len(text.encode())
    return count, size


def run_prepare(path: Path, out: Path, cfg: PrepareSpeedConfig) -> tuple[float, float]:
    """Run prepare.py in a process of its own; returns its seconds from start to end and its peak memory in MB."""
    command = [sys.executable, prepare.__file__, f"--input={path}", f"--out={out}", f"--vocab_size={cfg.vocab_size}"]
    start, peak_mem_mb = time.perf_counter(), 0.0
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with reporting(lambda: "prepare.py"), subprocess.Popen(command, **pipes) as process:
        while process.poll() is None:
            peak_mem_mb = max(peak_mem_mb, resident_mb(process.pid, "VmHWM"))
            time.sleep(0.02)
        elapsed_s = time.perf_counter() - start
        printed = process.stdout.read() if process.stdout else ""
    if process.returncode:
        raise ConfigError(f"prepare.py failed: {last_line(printed)}")
    return elapsed_s, peak_mem_mb


def time_encoders(tok: BPETokenizer, texts: list[str], repeats: int) -> tuple[list[float], list[float]]:
    """Tokens per second of prepare.py's encoder and of tiktoken's encode_ordinary_batch, in laps taken in turns."""
    ranks, threads = {token: id for id, token in enumerate(tok.tokens)}, os.cpu_count() or 1
    peer = tiktoken.Encoding("peer", pat_str=tok.pattern, mergeable_ranks=ranks, special_tokens={})
    ours, theirs = [], []
    for _ in progress(range(repeats), "laps"):
        start = time.perf_counter()
        n_tokens = sum(len(ids) for _, ids in tokenizer.encode_all(tok, enumerate(texts)))
        ours.append(n_tokens / (time.perf_counter() - start))
        start = time.perf_counter()
        batch = peer.encode_ordinary_batch(texts, num_threads=threads)
        theirs.append(n_tokens / (time.perf_counter() - start))
        assert sum(map(len, batch)) == n_tokens
    return ours, theirs


def main(cfg: PrepareSpeedConfig) -> None:
    """Prepare the text once, time the encoders on part of it, print a table and write the result."""
    with tempfile.TemporaryDirectory() as scratch:
        path, out = Path(scratch) / "many.jsonl", Path(scratch) / "out"
        count, size = write_lines(path, cfg)
        seconds, peak_mem_mb = run_prepare(path, out, cfg)
        tok = read_meta(out).load_tokenizer()
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
    """The Markdown table of these results."""
    blocks = []
    for r in results:
        rows = [
            ["prepare.py, MB/s from start to end", f"{r['mb_per_s']:,.1f}"],
            ["its peak memory, MB", f"{r['peak_mem_mb']:,.0f}"],
            ["encoder threads", *[f"{r['encoding_threads']}"] * 2],
            ["encoder, million tokens/s", *(f"{r[key]['median'] / 1e6:.1f}" for key in SPEEDS)],
            ["ours is faster", "", show(r["ratio"], ".2f")],
        ]
        blocks.append((f"{r['megabytes']:,.0f} MB in\n{r['documents']:,} documents", rows))
    return side_by_side(["RoboPoet", "tiktoken"], blocks)


if __name__ == "__main__":
    configurator.launch(main, PrepareSpeedConfig)
