"""What --max_copy costs, and the longest run of words that passages copy with it and without, by a plain search.

Words are those of originality.fold: without case and punctuation.

python -m bench.copying out/demo/best.pt --max_copy=8
"""

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import configurator
from bench.common import markdown, origin, progress, show, spread, write_result
from robopoet.errors import bounds
from robopoet.text.dataset import find_dataset
from robopoet.writing.originality import fold, read_texts
from robopoet.writing.passage import Settings
from robopoet.writing.poet import Poet


@dataclass(frozen=True)
class CopyingConfig(Settings):
    """The keys of a passage, and those of the measurement."""

    # measurement
    checkpoint: str = "out/demo/best.pt"  # ours, with its dataset prepared
    passages: int = 200  # with max_copy, and as many without
    together: int = 25  # passages of a batch; with and without take turns
    device: str = "auto"  # auto (cuda, then mps, then cpu), cpu, cuda, cuda:N, mps
    out: str = ""  # name of the result (copying_DEVICE unless given)

    def problems(self) -> list[str]:
        """What is wrong with these values, a line each."""
        found = [] if self.max_copy else ["max_copy: is missing; how many words in a row are too many?"]
        return super().problems() + bounds(self, "together", 1) + bounds(self, "passages", self.together) + found


def main(cfg: CopyingConfig) -> None:
    """Generate in turns, search every passage, print a table and write the result."""
    poet = Poet(cfg.checkpoint, cfg.device)
    works = [f" {' '.join(fold(text).split())} " for text in read_texts(find_dataset(poet.dataset), "train")]
    settings = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(Settings)}
    runs: dict[int, Any] = {0: [], cfg.max_copy: []}
    poet.write(n=cfg.together, **settings)  # the index is built, and all is warm
    for first in progress(range(0, cfg.passages, cfg.together), "turns"):
        for max_copy, found in runs.items():
            passages = poet.begin("", cfg.together, first, **settings | {"max_copy": max_copy})
            begin = time.perf_counter()
            for _ in poet.stream(passages):
                pass
            rate = sum(len(passage.ids) for passage in passages) / (time.perf_counter() - begin)
            longest = max(longest_copy(passage.text, works) for passage in passages)
            found.append({"tok_per_sec": rate, "longest": longest, "stuck": sum(p.is_stuck for p in passages)})
    pairs = zip(runs[cfg.max_copy], runs[0], strict=True)
    result = origin("copying", poet.machine) | {
        "run": Path(cfg.checkpoint).parent.name,
        "passages": cfg.passages,
        "together": cfg.together,
        "max_copy": cfg.max_copy,
        "longest": [max(turn["longest"] for turn in runs[key]) for key in (0, cfg.max_copy)],
        "stuck": sum(turn["stuck"] for turn in runs[cfg.max_copy]),
        "tok_per_sec": [spread([turn["tok_per_sec"] for turn in runs[key]]) for key in (0, cfg.max_copy)],
        "ratio": spread([limited["tok_per_sec"] / free["tok_per_sec"] for limited, free in pairs]),
    }
    print(table([result]))
    write_result(result, cfg.out or "copying_DEVICE")


def longest_copy(text: str, works: list[str]) -> int:
    """The words of the longest run in `text` that stands in a work."""
    words, longest = fold(text).split(), 0
    for i in range(len(words)):
        while i + longest < len(words) and any(f" {' '.join(words[i : i + longest + 1])} " in work for work in works):
            longest += 1
    return longest


def table(results: list[dict[str, Any]]) -> str:
    """The Markdown table of these results, a row for each."""
    rows = []
    for r in results:
        free, limited = r["longest"]
        cells = [f"{r['passages']}, {r['together']} together", str(r["max_copy"]), str(free), str(limited)]
        rows.append([r["run"], *cells, str(r["stuck"]), show(r["ratio"], ".2f")])
    header = ["run", "passages", "max_copy", "copied without", "with", "stuck", "times as fast"]
    return markdown(header, rows)


if __name__ == "__main__":
    configurator.launch(main, CopyingConfig, positional="checkpoint")
