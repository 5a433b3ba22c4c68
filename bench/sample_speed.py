"""Time how fast a trained model writes, with its KV cache and without, through the stream that sample.py prints.

python -m bench.sample_speed out/demo/best.pt --device=auto
"""

import collections
import copy
import time
from dataclasses import dataclass
from typing import Any, Literal

import torch

import configurator
from bench.common import markdown, origin, show, spread, write_result
from checkpoint import CheckpointError
from configurator import bounds
from data import DataError
from sample import Poet


@dataclass(frozen=True)
class SampleSpeedConfig:
    """The keys of bench.sample_speed."""

    # what is written
    checkpoint: str = "out/demo/best.pt"  # the model
    prompt: str = "To be or not to be"  # text to go on from
    batch_size: int = 32  # passages of the batch, beside a single one
    max_new_tokens: int = 120  # tokens of each
    long_tokens: int = 1000  # tokens of a single passage that outgrows the window
    check_tokens: int = 200  # tokens of the passage that must be the same with the cache and without
    # timing
    repeats: int = 5  # pairs of runs, cached then naive, of which the median counts
    device: str = "auto"  # auto (cuda, then mps, then cpu), cpu, cuda, cuda:N, mps
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of weights and activations
    out: str = ""  # name of the result (sample_speed_DEVICE unless given)

    def problems(self) -> list[str]:
        """What is wrong with these values, a line each."""
        return bounds(self, "batch_size max_new_tokens long_tokens check_tokens repeats", 1)


def without_cache(poet: Poet) -> Poet:
    """A poet with the same weights that reads its whole window again for every token."""
    naive = copy.copy(poet)
    naive.model = copy.copy(poet.model)
    naive.model.generate = naive.model.generate_naive
    return naive


def write(poet: Poet, prompt: str, sequences: int, tokens: int) -> tuple[float, float]:
    """Seconds until `sequences` passages of `tokens` tokens are written, and until their first token is."""
    poet.machine.synchronize()
    start = time.perf_counter()
    stream = poet.stream(prompt, sequences, max_new_tokens=tokens)
    next(stream)
    first_s = time.perf_counter() - start  # the ids are on the host by then
    collections.deque(stream, maxlen=0)
    return time.perf_counter() - start, first_s


def compare(poet: Poet, naive: Poet, prompt: str, sequences: int, tokens: int, repeats: int) -> dict[str, Any]:
    """Time both in turns, so that a machine that slows down slows both; ratios are taken pair by pair."""
    pairs = [[write(p, prompt, sequences, tokens) for p in (poet, naive)] for _ in range(repeats)]
    return {
        "sequences": sequences,
        "tokens": tokens,
        "tok_per_sec": spread([sequences * tokens / cached_s for (cached_s, _), _ in pairs]),
        "naive_tok_per_sec": spread([sequences * tokens / naive_s for _, (naive_s, _) in pairs]),
        "speedup": spread([naive_s / cached_s for (cached_s, _), (naive_s, _) in pairs]),
        "first_token_ms": spread([1000 * first_s for (_, first_s), _ in pairs]),
        "repeats_s": [{"cached": cached_s, "naive": naive_s} for (cached_s, _), (naive_s, _) in pairs],
    }


def same_text(cfg: SampleSpeedConfig) -> bool:
    """Whether the likeliest text is the same with the cache and without; in float64, where rounding can't tip it."""
    poet = Poet(cfg.checkpoint, "cpu", "float64")
    settings = {"temperature": 0, "max_new_tokens": cfg.check_tokens}
    return poet.write(cfg.prompt, **settings) == without_cache(poet).write(cfg.prompt, **settings)


def main(cfg: SampleSpeedConfig) -> None:
    """Time the three passages, compare the two ways of writing, print the figures and keep them."""
    poet = Poet(cfg.checkpoint, cfg.device, cfg.dtype)
    specials = list(poet.tokenizer.specials.values())  # <|endoftext|> too: every passage has its full length
    poet.forbidden = torch.tensor(specials, dtype=torch.long, device=poet.machine.device)
    naive = without_cache(poet)
    cases = [(1, cfg.max_new_tokens), (cfg.batch_size, cfg.max_new_tokens), (1, cfg.long_tokens)]
    for case in cases:
        write(poet, cfg.prompt, *case)  # warm-up
    peak_mem_mb = poet.machine.peak_mem_mb()  # before the naive way has taken any
    write(naive, cfg.prompt, cfg.batch_size, 8)
    result = origin("sample_speed", poet.machine) | {
        "parameters": poet.model.num_params(),
        "block_size": poet.model.config.block_size,
        "peak_mem_mb": peak_mem_mb,
        "cases": [compare(poet, naive, cfg.prompt, *case, cfg.repeats) for case in cases],
        "same_text": same_text(cfg),
    }
    print(table([result]))
    if not result["same_text"]:
        configurator.warn("greedy text differs with and without the cache")
    write_result(result, cfg.out or "sample_speed_DEVICE")


def table(results: list[dict[str, Any]]) -> str:
    """The Markdown table that shows these results."""
    header = ["Device", "dtype", "Passages x tokens", "Tokens/s", "First token", "Without cache", "Speedup"]
    header += ["Peak memory", "Same greedy text"]
    rows = [
        [
            r["machine"]["device"],
            r["machine"]["dtype"],
            f"{case['sequences']} x {case['tokens']:,}",
            show(case["tok_per_sec"]),
            f"{case['first_token_ms']['median']:,.1f} ms",
            show(case["naive_tok_per_sec"]),
            show(case["speedup"], ".1f"),
            f"{r['peak_mem_mb']:,.0f} MB",
            "yes" if r["same_text"] else "NO",
        ]
        for r in results
        for case in r["cases"]
    ]
    return markdown(header, rows)


if __name__ == "__main__":
    configurator.launch(main, SampleSpeedConfig, DataError, CheckpointError, positional="checkpoint")
