"""Print the tables of the README from bench/results, so that every figure in it comes from a file.

python -m bench.table
python -m bench.table --write
"""

from dataclasses import dataclass
from pathlib import Path

import configurator
from bench import common, demo, gpu, learn, prepare_speed, ranks, sample_speed, scaling, torture, train_speed, writing
from configurator import ConfigError

SECTIONS = {  # a result's kind -> its heading, and the function that shows all results of that kind
    "demo": ("**Finished runs.** Losses in nats per token.", demo.table),
    "learn": (
        "**Learning.** Lowest val loss in nats per token, and how soon ours has what nanoGPT ended with; medians.",
        learn.table,
    ),
    "train_speed": ("**Training speed.** The median of repeats, and their range.", train_speed.table),
    "scaling": (
        "**Scaling.** Four times the batch; four times the text, read from disk. Ratios of laps in turns.",
        scaling.table,
    ),
    "ranks": (
        "**Ranks.** The same batch on one core, and shared out among ranks with a core each; medians of runs in turns.",
        ranks.table,
    ),
    "gpu": ("**On a GPU.** What `python -m bench.gpu` reckons with, on an H100, and what it saw.", gpu.table),
    "sample_speed": ("**Writing speed.** The median of repeats, and their range.", sample_speed.table),
    "prepare_speed": (
        "**Preparing text.** From JSON lines to bins, start to end; and the encoder beside tiktoken's batches.",
        prepare_speed.table,
    ),
    "writing": (
        "**Writing.** Bits per byte beside coders that know the train split; passages beside people's, from the test "
        "split, with means and people's 1st to 99th percentile. Coherent: between these by every measure.",
        writing.table,
    ),
    "torture": ("**Torture.** A run that is killed, stopped and damaged, beside an unbroken one.", torture.table),
}
BEGIN, END = "<!-- results -->", "<!-- /results -->"


@dataclass(frozen=True)
class TableConfig:
    """The keys of bench.table."""

    write: bool = False  # put the tables into the README
    check: bool = False  # fail unless the README shows them already
    readme: str = "README.md"  # holds the lines <!-- results --> and <!-- /results -->

    def problems(self) -> list[str]:
        """What is wrong with these values, a line each."""
        return ["write, check: choose one"] if self.write and self.check else []


def tables() -> str:
    """A section for each kind of result: its table, the verdict on the targets, and the commands that measured it."""
    results = [common.read_result(path) for path in sorted(common.RESULTS.glob("*.json"))]
    sections = []
    for kind, (heading, table) in SECTIONS.items():
        if not (found := [r for r in results if r.get("kind") == kind]):
            continue
        lines = [heading, "", table(found), ""]
        reference = [r for r in found if kind == "train_speed" and "robopoet" in r["config"]]  # whose targets they are
        lines += [f"- {verdict}" for r in reference for verdict in train_speed.verdicts(r)]
        lines += [f"- {remark}" for r in found if kind == "sample_speed" for remark in sample_speed.remarks(r)]
        lines += [
            f"- `{r['command']}`: {r['machine']['device']}, {r['machine']['threads']} threads, "
            f"torch {r['machine']['torch']}, {r['date']}"
            for r in found
        ]
        sections.append("\n".join(lines) + "\n")
    return "\n".join(sections)


def main(cfg: TableConfig) -> None:
    """Print the tables, put them into the README, or see that it shows them; raises ConfigError when it doesn't."""
    if not cfg.write and not cfg.check:
        return print(tables(), end="")
    readme = Path(cfg.readme)
    text = readme.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ConfigError(f"{readme}: lacks the lines {BEGIN} and {END}, between which the tables go")
    wanted = f"{before}{BEGIN}\n{tables()}{END}{after}"
    if cfg.check and text != wanted:
        raise ConfigError(f"{readme}: does not show what bench/results holds; run python -m bench.table --write")
    if cfg.write:
        readme.write_text(wanted, encoding="utf-8")


if __name__ == "__main__":
    configurator.launch(main, TableConfig)
