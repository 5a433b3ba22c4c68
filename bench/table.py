"""Write every table of results into bench/RESULTS.md and a summary into README.md, from the files in bench/results.

python -m bench.table              # print what RESULTS.md shows
python -m bench.table --write
python -m bench.table --check
"""

import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import configurator
from bench import (
    books,
    books_read,
    common,
    copying,
    demo,
    finetune,
    gpu,
    html,
    learn,
    memory,
    prepare_speed,
    ranks,
    sample_speed,
    scaling,
    search,
    serve,
    summary,
    torture,
    train_speed,
    window,
    writing,
)
from bench.summary import Results
from robopoet.errors import ConfigError

LOSSES = "Where it loses, or proves little"
SECTIONS: dict[str, tuple[str, str, Callable[[Results], str]]] = {  # a result's kind -> heading, introduction, table
    "demo": ("Finished runs", "Losses in nats per token.", demo.table),
    "books": (
        "Your own books",
        "prepare.py, then train.py --minutes, nothing else. Nothing was tuned on these books, with one exception: the "
        "rate of a start from smollm2 was chosen on 60 KB of the lectures and of Paradise Lost, its passes and the "
        "length of its rows on Botchan. val, test: bits/byte of the best step; PPMd and KN, Kneser-Ney, need theirs "
        "for the test split after they have read the rest. best: where in the run the best step was; s: seconds from "
        "start to end; shape: layers x width. The base model, of data/base, has read Shakespeare's play before, in "
        "another edition.",
        books.table,
    ),
    "settings": (
        "Settings by hand",
        "The same, with some of what --minutes chooses given by hand. Bits/byte of the best step on the val split; the "
        "lowest in bold. One thread, one seed.",
        books.settings_table,
    ),
    "search": (
        "A search over settings",
        "What docs/search.py found from nothing, beside what --minutes alone chose: bits/byte of the best step on the "
        "val split and on the test split, medians over seeds that no trial had, with their range.",
        search.table,
    ),
    "learn": (
        "Learning",
        "Lowest val loss in nats per token, and seconds until RoboPoet has nanoGPT's; medians over seeds.",
        learn.table,
    ),
    "train_speed": ("Training speed", "Medians over alternating laps; speed-ups with their range.", train_speed.table),
    "finetune": (
        "Fine-tuning speed",
        "Steps from a pretrained model, in turns with transformers' eager loop under autocast, with the same rows and "
        "optimizer, and with PEFT's LoRA on every matrix, trained by AdamW. Medians; speed-ups with their range.",
        finetune.table,
    ),
    "memory": (
        "Memory",
        "Peak memory of train.py's steps at GPT-2's sizes, without --recompute and with it: of a process on a CPU, "
        "PyTorch itself (0.4 GB) included.",
        memory.table,
    ),
    "scaling": (
        "Scaling",
        "Four times the batch; four times the text, read from disk. Medians over alternating laps.",
        scaling.table,
    ),
    "ranks": (
        "Ranks",
        "The same batch on one rank and on several, a core each. Medians over alternating runs.",
        ranks.table,
    ),
    "gpu": ("On a GPU", "What `python -m bench.gpu` expects of an H100, and what it saw.", gpu.table),
    "sample_speed": (
        "Sampling speed",
        "Medians over alternating rounds; speed-ups with their range.",
        sample_speed.table,
    ),
    "serve": (
        "Serving",
        "serve.py and llama.cpp's server (the wheel of xllamacpp, built without AVX-512; float16 weights) in turns; "
        "Poet's batch is that of as many passages as clients, in the same run. Times: median / 99th percentile; ours "
        "sends a stream's text at most every 20 ms.",
        serve.table,
    ),
    "html": (
        "The page of --export=poet.html",
        "In V8 on one core, in seconds of its processor, and in browsers; the limit: see bench/html.py. ms: to the "
        "first text, from the click on Write.",
        html.table,
    ),
    "prepare_speed": (
        "Preparing text",
        "From JSON lines to bins; and the encoder beside tiktoken's.",
        prepare_speed.table,
    ),
    "books_read": (
        "Reading books",
        "Words of HTML pages and EPUBs that are lost and added, as a share of those of the checked texts, and words "
        "that stand glued together. books: EPUBs in packages of Debian, npm and PyPI, by eight makers in nine "
        "languages; pages: documentation in HTML; cases: pages of tests/, by which ours was written. A checked text is "
        "what the maker's own element for the work holds, without contents and marks of notes. Seconds of one core.",
        books_read.table,
    ),
    "writing": (
        "Writing",
        "Bits per byte of the test split, beside an n-gram model and compressors that have read the rest. Then what "
        "was measured of passages, and of people's text from the test split: means, and the range that 98% of "
        "people's passages lie in. The last row: the share of passages that lie in it by every measure.",
        writing.table,
    ),
    "copying": (
        "Copying",
        "The longest run of words of the training text in passages without --max_copy and with it, in turns; speed as "
        "medians with their range.",
        copying.table,
    ),
    "window": (
        "Beyond the first block",
        "Val loss in nats per token of stretches longer than a block. They are read token by token, as sample.py "
        "generates; and with a window that moves on by half a block and is then read again. The time is that of a step "
        "for all rows, its mean over a block.",
        window.table,
    ),
    "torture": ("Torture", "A run that is killed, stopped and damaged, compared with an unbroken one.", torture.table),
}


@dataclass(frozen=True)
class TableConfig:
    """The keys of bench.table."""

    write: bool = False  # write the tables into both files
    check: bool = False  # fail unless both files show them already
    readme: str = "README.md"  # has the lines <!-- results -->, <!-- /results -->, <!-- files -->, <!-- /files -->
    results: str = "bench/RESULTS.md"  # has the lines <!-- results --> and <!-- /results -->

    def problems(self) -> list[str]:
        """What is wrong with these values, a line each."""
        return ["write, check: choose one"] if self.write and self.check else []


def read_results() -> Results:
    """Every result in bench/results, by file name."""
    return [common.read_result(path) for path in sorted(common.RESULTS.glob("*.json"))]


def tables() -> str:
    """Contents, then a section for each kind of result: a device's table, remarks, and the commands behind it."""
    results = read_results()
    headings = [LOSSES] + [
        heading for kind, (heading, *_) in SECTIONS.items() if any(r["kind"] == kind for r in results)
    ]
    links = ", ".join(f"[{heading}](#{anchor(heading)})" for heading in headings)
    parts = [textwrap.fill(f"{links}.", 100, break_on_hyphens=False, break_long_words=False) + "\n"]
    parts.append(f"## {LOSSES}\n\n{common.bullets(summary.losses(results))}\n")
    for kind, (heading, introduction, table) in SECTIONS.items():
        found = [r for r in results if r.get("kind") == kind]
        if found:
            parts.append(f"## {heading}\n\n{textwrap.fill(introduction, 100)}\n")
        devices = list(dict.fromkeys(r["machine"]["device"] for r in found))
        for device in devices:
            of_device = [r for r in found if r["machine"]["device"] == device]
            parts += [f"### {device}\n"] * (len(devices) > 1) + [table(of_device) + "\n", *remarks(kind, of_device)]
            parts.append("\n".join(["```sh", *map(command, of_device), "```\n"]))
    return "\n".join(parts)


def anchor(heading: str) -> str:
    """The link to a heading, as GitHub makes it."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def remarks(kind: str, results: Results) -> list[str]:
    """What results of a kind show beside their table, as one list; empty if nothing."""
    lines = []
    for r in results:
        if kind == "sample_speed":
            lines += sample_speed.remarks(r)
        elif kind == "train_speed" and "robopoet" in r["config"]:  # the targets are the reference model's
            met = "; ".join(f"{target}: {'met' if holds else 'not met'}" for target, holds in r["targets"].items())
            lines.append(f"{r['config']}, {r['machine']['dtype']}: {met} ({train_speed.card(r)})")
    return [common.bullets(lines) + "\n"] if lines else []


def command(result: dict[str, Any]) -> str:
    """The command that measured a result, below a comment on where and when."""
    machine = result["machine"]
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] > 1)}"
    where = f"# {machine['device']}, {threads}, torch {machine['torch']}, {result['date']}"
    return f"{where}\n{common.wrap_command(result['command'])}"


def split(text: str, name: str, path: Path) -> tuple[str, str, str]:
    """The text up to a marked block, the block, and the text after it; raises ConfigError without the marks."""
    before, begin, rest = text.partition(f"<!-- {name} -->\n")
    block, end, after = rest.partition(f"<!-- /{name} -->")
    if not begin or not end:
        raise ConfigError(
            f"{path}: lacks the lines <!-- {name} --> and <!-- /{name} -->, which enclose what is written"
        )
    return before + begin, block, end + after


def main(cfg: TableConfig) -> None:
    """Print the tables, write them into both files, or check these; raises ConfigError when they differ."""
    if not cfg.write and not cfg.check:
        return print(tables(), end="")
    blocks = [
        (cfg.readme, "results", summary.results_block(read_results())),
        (cfg.readme, "files", summary.files_block()),
        (cfg.results, "results", tables()),
    ]
    for name, mark, wanted in blocks:
        path = Path(name)
        before, block, after = split(path.read_text(encoding="utf-8"), mark, path)
        if cfg.write:
            path.write_text(before + wanted + after, encoding="utf-8")
        elif block != wanted and not (mark == "files" and summary.alike(block, wanted)):
            raise ConfigError(f"{path}: its {mark} are out of date; run python -m bench.table --write")


if __name__ == "__main__":
    configurator.launch(main, TableConfig)
