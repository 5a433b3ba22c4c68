"""What docs/search.py finds for one book, beside what train.py --minutes chooses for it in the same time.

python -m bench.search data/unseen --book=botchan --minutes=0.67 --trials=20
"""

import itertools
import tempfile
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import configurator
from bench.books import call
from bench.common import evaluate_test, markdown, origin, progress, reporting, show, spread, write_result
from robopoet import files
from robopoet.errors import ConfigError, bounds
from robopoet.machine import find_machine
from robopoet.text import corpus
from robopoet.training.history import read_records
from train import TrainConfig

KEYS = tuple(yaml.safe_load((files.HOME / "config" / "sweep.yaml").read_text(encoding="utf-8"))["parameters"])


@dataclass(frozen=True)
class SearchConfig:
    """The keys of bench.search."""

    corpus: str = "data/unseen"  # folder of a corpus.yaml
    book: str = "botchan"  # style of the text there that is learned
    minutes: float = 0.67  # how long each run trains
    trials: int = 20  # runs of the search
    seeds: int = 3  # runs of what --minutes chooses and of what was found, by turns, with seeds that no trial had
    out: str = ""  # name of the result (search_DEVICE unless given)

    def problems(self) -> list[str]:
        """What is wrong with these values, a line each."""
        return bounds(self, "minutes", 0) + bounds(self, "trials seeds", 1)


def main(cfg: SearchConfig) -> None:
    """Search, train again with what was found and without, print a table and write the result."""
    machine = find_machine("cpu", "auto")
    documents = corpus.documents(corpus.read_manifest(Path(cfg.corpus)))
    text = next((doc.text for doc in documents if doc.style == cfg.book), None)
    if text is None:
        raise ConfigError(f"book: found {cfg.book}; no text of {cfg.corpus} has that style")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path, data, runs = folder / f"{cfg.book}.txt", folder / "bins", folder / "out" / "search"
        path.write_bytes(text.encode())
        call("prepare.py", path, f"--out={data}", "--tokenizer=bpe")
        keys = [f"--dataset={data}", f"--minutes={cfg.minutes}", "--init_from=scratch", "--sample_tokens=0"]
        with reporting(lambda: f"trials: {len(list(runs.glob('*/config.yaml')))} of {cfg.trials} begun"):
            call("docs/search.py", cfg.trials, *keys, cwd=folder)
        trials = [reached(run) for run in sorted(runs.iterdir(), key=lambda run: int(run.name)) if is_whole(run)]
        best = min(trials, key=lambda trial: trial["val"])
        ways = {"dial": [], "found": [f"--{key}={best[key]}" for key in KEYS]}
        again: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
        for seed in progress(range(1, cfg.seeds + 1), "seeds"):
            for way, settings in ways.items():
                out = folder / f"{way}{seed}"
                call("train.py", *keys, *settings, f"--seed={seed}", f"--out_dir={out}")
                again[way].append(reached(out) | {"test": evaluate_test(out / "best.pt", machine)["bpb"]})
    result = origin("search", machine) | {"book": cfg.book, "bytes": len(text.encode()), "minutes": cfg.minutes}
    result |= {"trials": trials, "failed": cfg.trials - len(trials)} | again
    print(table([result]))
    write_result(result, cfg.out or "search_DEVICE")


def is_whole(run: Path) -> bool:
    """Whether a trial's run was evaluated, so did not fail."""
    return (run / "best.pt").exists()


def reached(run: Path) -> dict[str, Any]:
    """The lowest bits per byte of a run's val split, and its values for the keys that are searched."""
    cfg = configurator.parse(TrainConfig, [str(run / "config.yaml")])
    values = {key: getattr(cfg, key) for key in KEYS} | {"learning_rate": cfg.peak_lr}
    return {"val": min(record.bpb for record in read_records(run) if record.kind == "eval")} | values


def table(results: list[dict[str, Any]]) -> str:
    """The Markdown tables of these results: a row for each quantity, what --minutes chose beside what was found."""
    tables = []
    for r in results:
        lowest = list(itertools.accumulate((trial["val"] for trial in r["trials"]), min))
        after = [n for n in (1, 5, 10, len(lowest)) if n <= len(lowest)]
        said = f"{r['book']}: {r['bytes']:,} bytes; minutes: {r['minutes']:g} a run; val after so many trials: "
        said += ", ".join(f"{n}: {lowest[n - 1]:.3f}" for n in dict.fromkeys(after))
        said += f"; {r['failed']} more failed" if r["failed"] else ""
        rows = [[f"bits/byte, {split}"] for split in ("val", "test")] + [[f"`{key}`"] for key in KEYS]
        for way in (r["dial"], r["found"]):
            cells = [show(spread([run[split] for run in way]), ".3f") for split in ("val", "test")]
            for key in KEYS:
                values = (run[key] for run in way)
                shown = (f"{value:.2g}" if isinstance(value, float) else str(value) for value in values)
                cells.append(" or ".join(dict.fromkeys(shown)))
            rows = [[*row, cell] for row, cell in zip(rows, cells, strict=True)]
        tables.append(textwrap.fill(said, 100) + "\n\n" + markdown(["", "--minutes alone", "found"], rows))
    return "\n\n".join(tables)


if __name__ == "__main__":
    configurator.launch(main, SearchConfig, positional="corpus")
