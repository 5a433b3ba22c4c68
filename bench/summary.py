"""What bench.table writes into the README: a few rows of results, where RoboPoet loses, and the lines of each file."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.common import bullets, markdown, spread
from bench.learn import times_sooner

ROOT = Path(__file__).parents[1]
Results = list[dict[str, Any]]
ORDER = ("min", "median", "max")

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
    "robopoet/writing": "generation, the sampler, passages, sessions, originality",
    "robopoet/serving": "many requests in one step of the model, behind an API",
    "robopoet": "fast operations, the machine, CUDA graphs, typed input",
}


def find(results: Results, kind: str, **keys: Any) -> Results:
    """The results of a kind that were measured on a CPU and have these values, in the machine's keys or their own."""
    found = [r for r in results if r["kind"] == kind and not r["machine"].get("memory_gb")]
    return [r for r in found if all((r["machine"] | r).get(key) == value for key, value in keys.items())]


def main_rows(results: Results) -> list[list[str]]:
    """The README's rows: RoboPoet, nanoGPT, nanoGPT tuned by hand, transformers; in brackets RoboPoet's lead."""
    rows = []
    for config in ("robopoet_adamw", "gpt2"):
        for r in find(results, "train_speed", config=config, dtype="bfloat16")[:1]:
            cells = {name == "nanoGPT": _lead(p["tok_per_sec"], p["ratio"]) for name, p in r["peers"].items()}
            size = f"train {r['parameters'] / 1e6:,.1f}M parameters, tokens/s"
            rows.append([size, _whole(r["tok_per_sec"]), cells.get(True, ""), cells.get(False, ""), ""])
    for r in find(results, "learn", config="robopoet"):
        if r.get("goal") and None not in r["goal"]["seconds"]:
            ours, theirs, loss = (spread(r["goal"][key]) for key in ("seconds", "peer_seconds", "loss"))
            cells = [_whole(ours), _lead(theirs, times_sooner(r)), "", ""]
            rows.append([f"seconds to val loss {loss['median']:.2f}", *cells])
    learned = [r["ours"] for r in find(results, "learn", corpus="robopoet") if "test_bpb" in r["ours"]]
    for ours in sorted(learned, key=lambda ours: ours["bpb"]["median"])[:1]:
        shown = " / ".join(f"{ours[key]['median']:.2f}" for key in ("bpb", "test_bpb"))
        rows.append(["least bits per byte, val / test", shown, "", "", ""])
    for r in find(results, "sample_speed", model="robopoet")[:1]:
        for case in r["cases"][:2]:
            speed, ratio = case["speed"], case["ratio"]
            peers = [_lead(speed[name], ratio[name]) if name in ratio else "" for name in ("nanoGPT", "transformers")]
            what = "a passage" if case["passages"] == 1 else f"{case['passages']} at once"
            rows.append([f"generate {what}, tokens/s", _whole(speed["RoboPoet"]), peers[0], "", peers[1]])
    return rows


def _whole(figure: dict[str, float]) -> str:
    return f"{figure['median']:,.0f}"


def _lead(figure: dict[str, float], ratio: dict[str, float]) -> str:
    return f"{_whole(figure)} ({ratio['median']:.1f}x)"


def losses(results: Results) -> Iterator[str]:
    """Where RoboPoet loses, leads by little or proves little, a line each."""
    if not any(r["machine"].get("memory_gb") for r in results):
        yield "No GPU has run it yet: every figure here is a CPU's. `python -m bench.gpu` is ready for the first."
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
    """The README's rows of results, and where RoboPoet loses."""
    parts = []
    if rows := main_rows(results):
        machine = next(r["machine"] for kind in ("train_speed", "sample_speed", "learn") for r in find(results, kind))
        header = [f"{machine['device']}, {machine['threads']} threads", "RoboPoet", "nanoGPT", "tuned by hand"]
        parts.append(markdown([*header, "transformers"], rows))
    parts.append(f"**Where it loses, or proves little**\n\n{bullets(losses(results))}")
    return "\n\n".join(parts) + "\n"


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
