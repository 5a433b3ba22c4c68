"""What bench.table writes into the README: a few rows of results, where RoboPoet loses, and the lines of each file."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.common import markdown, spread
from bench.learn import times_sooner

ROOT = Path(__file__).parents[1]
Results = list[dict[str, Any]]
ORDER = ("min", "median", "max")
PEERS = ("nanoGPT", "tuned", "transformers")

FILES = {  # in reading order: a file or a folder -> what it does
    "model.py": "GPT-2's architecture: forward pass, loss, KV cache",
    "train.py": "the config, the step, the training loop",
    "sample.py": "text from a trained model: its config and `main`",
    "serve.py": "OpenAI's completions over HTTP: its config and `main`",
    "prepare.py": "books -> token ids: `train.bin`, `val.bin`, `meta.json`",
    "configurator.py": "dataclass <- YAML <- `--key=value`, checked",
    "robopoet/text": "corpora, cleaning, tokenizers, batches",
    "robopoet/training": "behind the loop: optimizers, evaluation, log, resuming",
    "robopoet/weights": "checkpoints: ours, nanoGPT's, Hugging Face's",
    "robopoet/weights/poet.js": "the page's model and sampler, in JavaScript",
    "robopoet/weights/poet.html": "the page",
    "robopoet/writing": "generation, the sampler, passages, sessions, originality",
    "robopoet/serving": "many requests in one step of the model, behind an API",
    "robopoet": "fast operations, the machine, CUDA graphs, typed input",
}


def find(results: Results, kind: str, **keys: Any) -> Results:
    """The results of a kind that were measured on a CPU and have these values, in the machine's keys or their own."""
    found = [r for r in results if r["kind"] == kind and not r["machine"].get("memory_gb")]
    return [r for r in found if all((r["machine"] | r).get(key) == value for key, value in keys.items())]


def main_rows(results: Results) -> list[list[str]]:
    """The README's rows: RoboPoet's figure, its lead over each of PEERS, and where that lead is least."""
    rows = []
    for config in ("robopoet_adamw", "gpt2"):
        by_machine = {}
        for r in sorted(find(results, "train_speed", config=config), key=lambda r: r["machine"]["dtype"] == "float32"):
            leads = {name if name == "nanoGPT" else "tuned": p["ratio"] for name, p in r["peers"].items()}
            by_machine.setdefault(r["machine"]["device"], (r["tok_per_sec"], leads))  # bfloat16 where there is any
            size = f"train {r['parameters'] / 1e6:,.1f}M, tokens/s"
        rows += [_row(size, by_machine)] if by_machine else []
    sooner = [
        r for r in find(results, "learn", config="robopoet") if r.get("goal") and None not in r["goal"]["seconds"]
    ]
    for r in sooner:
        ours, loss = (spread(r["goal"][key]) for key in ("seconds", "loss"))
        by_machine = {r["machine"]["device"]: (ours, {"nanoGPT": times_sooner(r)})}
        rows.append(_row(f"seconds to val loss {loss['median']:.2f}", by_machine))
    for passages in (1, 32):
        by_machine = {}
        for r in find(results, "sample_speed", model="robopoet"):
            case = next(case for case in r["cases"] if case["passages"] == passages)  # the shortest
            by_machine.setdefault(r["machine"]["device"], (case["speed"]["RoboPoet"], case["ratio"]))
        what = "a passage" if passages == 1 else f"{passages} at once"
        rows += [_row(f"write {what}, tokens/s", by_machine)] if by_machine else []
    learned = [r["ours"] for r in find(results, "learn", corpus="robopoet") if "test_bpb" in r["ours"]]
    for ours in sorted(learned, key=lambda ours: ours["bpb"]["median"])[:1]:
        shown = " / ".join(f"{ours[key]['median']:.2f}" for key in ("bpb", "test_bpb"))
        seeds = len(ours["curves"])
        what = f"least bits/byte, {seeds} seed{'s' * (seeds > 1)}"
        rows.append([what, shown, *[""] * len(PEERS), ""])
    return rows


def _row(what: str, by_machine: dict[str, tuple[dict[str, float], dict[str, dict[str, float]]]]) -> list[str]:
    """What was measured on each machine, and the leads there, as ranges of medians; the machine of the least lead."""
    cells = [_range([ours["median"] for ours, _ in by_machine.values()], ",.0f")]
    for peer in PEERS:
        cells.append(_range([leads[peer]["median"] for _, leads in by_machine.values() if peer in leads], ".1f", "x"))
    least = min(by_machine, key=lambda device: by_machine[device][1]["nanoGPT"]["median"])
    return [what, *cells, re.sub(r"\(R\)|AMD |Intel|Processor", "", least).strip()]


def _range(values: list[float], form: str, unit: str = "") -> str:
    """The least and the largest of some values, one of them if they look the same, or nothing without any."""
    ends = dict.fromkeys(f"{value:{form}}" for value in (min(values), max(values))) if values else ()
    return "–".join(ends) + unit * bool(ends)


def losses(results: Results) -> Iterator[str]:
    """Where RoboPoet loses, leads by little or proves little, a line each."""
    yield from _training_losses(find(results, "train_speed"))
    yield from _sampling_losses(find(results, "sample_speed"))
    yield from _writing_losses(find(results, "writing"))
    for short, new in zip(find(results, "demo", run="short"), find(results, "demo", run="short_anew"), strict=False):
        bpb = f"{new['val']['bpb']:.2f} bits per byte; from a trained model's weights, {short['val']['bpb']:.2f}"
        yield f"A short book from scratch ends at {bpb}."
    for r in sorted(find(results, "ranks"), key=lambda r: r["speedup"]["median"])[:1]:
        speedup = r["speedup"]["median"]
        yield (
            f"{r['ranks']} ranks with a core each train {speedup:.2f} times as fast as one: {speedup / r['ranks']:.0%} "
            "of the ideal."
        )
    if single := [r for r in find(results, "learn") if r["peer"] and len(r["peer"]["curves"]) == 1]:
        corpora = " and ".join(dict.fromkeys(r["corpus"] for r in single))
        float32 = [times_sooner(r)["median"] for r in single if r["machine"]["dtype"] == "float32"]
        lead = f"; ours in float32 leads it by {min(float32):.1f}x" if float32 else ""
        yield f"nanoGPT learned from {corpora} with one seed only{lead}."


def _training_losses(results: Results) -> Iterator[str]:
    """What bench.train_speed found: how far laps differ, float32, nanoGPT tuned by hand, and memory."""
    runs = [(r["config"], r["machine"]["dtype"], name, r, peer) for r in results for name, peer in r["peers"].items()]
    leads = {(config, dtype, name): peer["ratio"] for config, dtype, name, _, peer in runs}
    half, full = (leads.get(("robopoet_adamw", dtype, "nanoGPT")) for dtype in ("bfloat16", "float32"))
    if half and full:
        low, middle, high, float32 = (f"{ratio:.1f}x" for ratio in (*map(half.get, ORDER), full["median"]))
        yield (
            f"The lead of {middle} varies from {low} to {high}, because the machine is shared; with ours in "
            f"float32, as nanoGPT is on a CPU, it is {float32}."
        )
    leads_by_machine = [(peer["ratio"]["median"], r["machine"]) for _, _, name, r, peer in runs if name == "nanoGPT"]
    lead, machine = min(leads_by_machine, key=lambda found: found[0], default=(math.inf, {}))
    if lead < 1.5:
        yield f"In {machine['dtype']} on an {machine['device']}, training leads nanoGPT's by {lead:.1f}x only."
    if tuned := {key: ratio["median"] for key, ratio in leads.items() if key[2] != "nanoGPT"}:
        config, dtype, name = least = min(tuned, key=lambda key: tuned[key])
        yield f"{name}, is only {tuned[least]:.1f}x behind on {config} in {dtype}."
    less = [
        f"{dtype} {peer['peak_mem_mb']:,.0f} MB, ours {r['peak_mem_mb']:,.0f}"
        for _, dtype, _, r, peer in runs
        if peer["peak_mem_mb"] < r["peak_mem_mb"]
    ]
    if less:
        yield f"Compiled, nanoGPT needs less memory: {'; '.join(less)}."


def _sampling_losses(results: Results) -> Iterator[str]:
    """What bench.sample_speed found: the start, and the first token."""
    for r in results:
        if "start_s" in r and r["model"] == "robopoet":
            start, torch_s = r["start_s"]["median"], r["import_torch_s"]["median"]
            yield f"`sample.py` takes {start:.1f} s for one token, {torch_s:.1f} s of them to import torch."
    first = [case["first_token_ms"] for r in results for case in r["cases"] if "nanoGPT" in case["first_token_ms"]]
    first = [(ms["RoboPoet"]["median"], ms["nanoGPT"]["median"]) for ms in first]
    if first and (worst := max(first, key=lambda ms: ms[0] / ms[1]))[0] > 0.95 * worst[1]:
        yield f"The first token of a passage is no faster than nanoGPT's: {worst[0]:.1f} ms against {worst[1]:.1f} ms."


def _writing_losses(results: Results) -> Iterator[str]:
    """What bench.writing found: the share of coherent passages, by style, the lowest first."""
    shares: dict[str, list[dict[str, float]]] = {}
    for r in results:
        for style, figures in r["styles"].items():
            shares.setdefault(style, []).append(figures["coherent"])
    below = []
    for style, found in sorted(shares.items(), key=lambda item: min(share["model"] for share in item[1])):
        models, people = sorted(share["model"] for share in found), max(share["people"] for share in found)
        if models[0] < people:
            ends = dict.fromkeys(f"{share:.0%}" for share in (models[0], models[-1]))
            below.append(f"{style} {' to '.join(ends)} (human text: {people:.0%})")
    if below:
        yield f"Share of passages within the human range by every measure: {', '.join(below)}."


def results_block(results: Results) -> str:
    """The README's rows of results, and what they leave open."""
    parts = []
    if rows := main_rows(results):
        parts.append(markdown(["", "RoboPoet", *(f"/ {peer}" for peer in PEERS), "least on"], rows))
    weak = "[Where it loses, or proves little](bench/RESULTS.md#where-it-loses-or-proves-little)."
    if not any(r["machine"].get("memory_gb") for r in results):
        weak = f"**No GPU has run it yet**: these are CPUs; `python -m bench.gpu` is ready for the first.\n{weak}"
    return "\n\n".join([*parts, weak]) + "\n"


def lines_of(name: str) -> int:
    """The lines of a file, or of the Python files directly in a folder."""
    path = ROOT / name
    files = [path] if path.is_file() else path.glob("*.py")
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)


def files_block() -> str:
    """The README's table of files in reading order."""
    rows = []
    for name, what in FILES.items():
        shown = f"`{name}`" if (ROOT / name).is_file() else f"`{name}/`"
        rows.append([shown, f"{lines_of(name):,}", what])
    return markdown(["Read in this order", "Lines", ""], rows) + "\n"


def alike(old: str, new: str) -> bool:
    """Whether two tables of files have the same rows, with lines that differ by less than a tenth."""
    number = re.compile(r"\| +([\d,]+) +\|")
    counts = [[int(count.replace(",", "")) for count in number.findall(block)] for block in (old, new)]
    masked = [re.sub(r" +|-+", " ", number.sub("|", block)) for block in (old, new)]
    return masked[0] == masked[1] and all(abs(a - b) <= b / 10 for a, b in zip(*counts, strict=True))
