"""Compare a model's bits per byte with classical coders', and its passages with people's.

python -m bench.writing out/demo/best.pt
"""

import collections
import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

import configurator
import train
from bench.coders import Texts, bits_per_byte
from bench.common import evaluate_checkpoint, markdown, origin, progress, write_result
from model import GPT
from robopoet.errors import DataError, bounds
from robopoet.machine import Machine
from robopoet.text.dataset import SPLITS, find_dataset, read_meta
from robopoet.text.tokenizer import Tokenizer
from robopoet.text.windows import EvalPlan, Split, eval_batches, open_split
from robopoet.weights import checkpoint
from robopoet.writing.originality import Originality
from robopoet.writing.passage import Settings
from sample import Poet

HUMAN_PASSAGES = 500  # per style at most; they overlap where a style's test text is short
LOOP_WORDS = 50  # a sequence that begins three times within so many words is a loop
Measures = dict[str, float | None]  # one passage's; None where a measure does not apply


@dataclass(frozen=True)
class WritingConfig:
    """The keys of bench.writing."""

    checkpoint: str = "out/demo/best.pt"  # the model
    passages: int = 50  # passages to generate in each style
    max_new_tokens: int = 200  # tokens of each, and of each passage of the test split
    temperature: float = Settings.temperature  # below 1: likely tokens become likelier
    repetition_penalty: float = Settings.repetition_penalty  # above 1: tokens already in the text become less likely
    max_copy: int = Settings.max_copy  # never so many words in a row of the training text (0: off)
    device: str = "auto"  # auto (cuda, then mps, then cpu), cpu, cuda, cuda:N, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # dtype of the weights; auto: the fastest here
    out: str = ""  # name of the result (writing_RUN_DEVICE unless given)

    def problems(self) -> list[str]:
        """What is wrong with these values, a line each."""
        return bounds(self, "passages max_new_tokens", 1) + bounds(self, "temperature", 0)


# ---------------------------------------------------------------------------------------------------------------------
# measures of a passage


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, letters only."""
    return re.findall(r"[^\W\d_]+", text.lower())


def dictionary(vocabulary: set[str]) -> set[str]:
    """The words of the language, among those that have a dictionary here, whose dictionary knows most of these."""
    from spellchecker import SpellChecker

    languages = (SpellChecker(language) for language in SpellChecker.languages())
    return set(max(languages, key=lambda found: len(found.known(vocabulary))).word_frequency.words())


def distinct(words: list[str], n: int) -> float:
    """Distinct n-grams as a share of all (Li et al. 2016, arXiv:1510.03055); 0 without any."""
    grams = list(zip(*(words[i:] for i in range(n)), strict=False))
    return len(set(grams)) / len(grams) if grams else 0.0


def words_before_loop(words: list[str]) -> int:
    """The number of words before the first loop, or of all words without one.

    A loop is a sequence of four words that repeats immediately, or that occurs three times within LOOP_WORDS words. It
    begins at the first of these occurrences.
    """
    places = collections.defaultdict(list)
    for start in range(len(words) - 3):
        seen = places[tuple(words[start : start + 4])]
        seen.append(start)
        if start - 4 in seen:
            return start - 4
        if len(seen) >= 3 and start + 4 - seen[-3] <= LOOP_WORDS:
            return seen[-3]
    return len(words)


def speaker_lines(text: str) -> list[tuple[str, str]]:
    """Each speaker's line, paired with the line after it.

    A speaker's line is the first of its paragraph, in capitals, and not an ACT or SCENE. A passage's last line doesn't
    count: it may be cut short.
    """
    lines = ["", *text.split("\n")]
    return [
        (line, after)
        for before, line, after in zip(lines, lines[1:], lines[2:], strict=False)
        if not before and _is_name(line)
    ]


def _is_name(line: str) -> bool:
    return line.isupper() and len(line) > 1 and "[" not in line and not re.match(r"(ACT|SCENE)\b", line)


def is_drama(text: str) -> bool:
    """Whether at least every other paragraph begins with a speaker's line and a speech."""
    return 2 * sum(_speaks(after) for _, after in speaker_lines(text)) >= text.count("\n\n") + 1


def _speaks(after: str) -> bool:
    return bool(after) and not _is_name(after)


def measure(text: str, vocabulary: set[str], language: set[str], names: set[str], copied: int) -> Measures:
    """All measures of one passage.

    vocabulary: the words of the training text. language: those of a dictionary. names: the text's speakers; empty
    unless the style is drama. copied: how long the passage's longest run from the training text is, in characters.
    """
    words = words_of(text)
    speakers = speaker_lines(text) if names else []
    return {
        "real_words": sum(word in vocabulary for word in words) / max(len(words), 1),
        "invented_words": sum(word not in vocabulary and word not in language for word in words) / max(len(words), 1),
        "repeated_4_grams": 1 - distinct(words, 4),
        **{f"distinct_{n}": distinct(words, n) for n in (1, 2, 3)},
        "longest_copy_characters": copied,
        "known_speakers": sum(name in names for name, _ in speakers) / len(speakers) if speakers else None,
        "speakers_who_speak": sum(_speaks(after) for _, after in speakers) / len(speakers) if speakers else None,
        "words_before_loop": words_before_loop(words),
    }


def ranges(passages: list[Measures]) -> dict[str, dict[str, float]]:
    """Mean, 1st and 99th percentile of each measure, over the passages that it applies to."""
    found = {}
    for name in passages[0]:
        if values := [passage[name] for passage in passages if passage[name] is not None]:
            p1, p99 = np.percentile(values, [1, 99]).tolist()
            found[name] = {"mean": float(np.mean(values)), "p1": p1, "p99": p99}
    return found


def outside(passage: Measures, human: dict[str, dict[str, float]]) -> list[str]:
    """The measures by which a passage lies outside people's 1st to 99th percentile."""
    return [
        name
        for name, value in passage.items()
        if name in human and value is not None and not human[name]["p1"] <= value <= human[name]["p99"]
    ]


def human_passages(ids: np.ndarray, spans: list[tuple[int, int]], tok: Tokenizer, length: int) -> list[str]:
    """At most HUMAN_PASSAGES texts of `length` tokens that begin with a line, spread evenly over the spans.

    ids: (n,) int64 of a split. spans: its documents; a passage never includes a span's last token, which may be
    <|endoftext|>. Raises DataError when no document is long enough.
    """
    ends_line = np.zeros(tok.vocab_size, bool)
    ends_line[: len(tok.tokens)] = [token.endswith(b"\n") for token in tok.tokens]
    places = [
        place
        for start, stop in spans
        for place in range(start, stop - length)
        if place == start or ends_line[ids[place - 1]]
    ]
    if not places:
        raise DataError(f"max_new_tokens: found {length}, but no text of the test split is longer; lower it")
    places = places[:: math.ceil(len(places) / HUMAN_PASSAGES)]
    return [tok.decode_bytes(ids[place : place + length].tolist()).decode(errors="replace") for place in places]


# ---------------------------------------------------------------------------------------------------------------------


def judge(
    written: list[str],
    human: list[str],
    vocabulary: set[str],
    language: set[str],
    names: set[str],
    originality: Originality,
) -> dict[str, Any]:
    """A style's figures: the measures of the model's passages and of people's, and the share that is coherent.

    A passage is coherent if it lies within people's 1st to 99th percentile by every measure; so not all of theirs are.
    """

    def measures(passages: list[str]) -> list[Measures]:
        lengths = [len(originality.check(passage).longest) for passage in passages]
        return [
            measure(passage, vocabulary, language, names, copied)
            for passage, copied in zip(passages, lengths, strict=True)
        ]

    of_model, of_people = measures(written), measures(human)
    people = ranges(of_people)
    faults = [outside(passage, people) for passage in of_model]
    return {
        "passages": {"model": len(written), "people": len(human)},
        "model": ranges(of_model),
        "people": people,
        "outside": {name: sum(name in found for found in faults) / len(faults) for name in people},
        "coherent": {
            "model": faults.count([]) / len(faults),
            "people": [outside(passage, people) for passage in of_people].count([]) / len(of_people),
        },
    }


@torch.no_grad()
def compare_tags(
    model: GPT, split: Split, tags: dict[str, int], plan: EvalPlan, machine: Machine
) -> dict[tuple[str, str], tuple[float, float]]:
    """What a wrong tag costs: (style, another style) -> nats/token more under the other's tag, and its standard error.

    tags: style -> id. Means over windows; the standard error is that of the difference between the same windows.
    """
    names = list(tags)
    style_of = torch.tensor([names.index(style) for style in split.styles])
    # for each style and tag: windows, sum and sum of squares of the differences between their mean losses
    sums = torch.zeros(3, len(names), len(names), dtype=torch.float64)
    tagged = [dataclasses.replace(split, tags=np.full_like(split.tags, tag)) for tag in tags.values()]
    for right, *others in zip(*(eval_batches(each, plan, machine.device) for each in (split, *tagged)), strict=True):
        with machine.autocast():
            loss, *losses = (model(b.inputs, b.targets, reduction="none")[1].sum(1) for b in (right, *others))
        more = (torch.stack(losses, dim=1) - loss[:, None]) / (right.targets >= 0).sum(1, keepdim=True)  # (rows, tags)
        more = more.cpu().double()
        per_row = torch.stack([torch.ones_like(more), more, more**2])
        sums.index_add_(1, style_of[torch.from_numpy(right.span)], per_row)
    n, total, square = machine.all_reduce(sums)
    mean = total / n
    error = ((square / n - mean**2).clamp(min=0) / n).sqrt()
    pairs = [(i, j) for i in range(len(names)) for j in range(len(names)) if i != j and n[i, j]]
    return {(names[i], names[j]): (mean[i, j].item(), error[i, j].item()) for i, j in pairs}


def main(cfg: WritingConfig) -> None:
    """Code the test split, generate passages, judge them, print tables and write the result."""
    # --- model and texts
    path = Path(cfg.checkpoint)
    saved, poet = checkpoint.load(path), Poet(cfg.checkpoint, cfg.device, cfg.dtype)
    folder = find_dataset(saved["config"]["dataset"])
    originality = Originality(folder, saved["text_sha256"], saved.get("identity"))
    meta = read_meta(folder)
    known, val, test = (Texts(folder, name, meta, poet.tokenizer) for name in SPLITS)

    # --- bits per byte
    model = checkpoint.build_model(saved, path).to(poet.machine.device)
    evaluated = evaluate_checkpoint(saved, path, model, "test", poet.machine)
    bpb = bits_per_byte(known, val, test, evaluated, meta.vocab_size)
    plan = EvalPlan(model.config.block_size, train.TrainConfig.batch_size)
    tagged = open_split(folder, "val", meta, plan.block_size, poet.machine.device)
    costs = compare_tags(model, tagged, meta.styles, plan, poet.machine) if meta.styles else {}
    wrong_tags = [
        {"style": style, "tag": tag, "nats": more, "error": error} for (style, tag), (more, error) in costs.items()
    ]

    # --- passages
    first_special = len(poet.tokenizer.tokens)  # forbidden, so that every passage has its full length
    poet.forbidden = torch.arange(first_special, model.config.vocab_size, device=poet.machine.device)
    vocabulary, names = set(words_of(known.text)), {name for name, _ in speaker_lines(known.text)}
    language = dictionary(vocabulary)
    styles = {}
    keys = ("max_new_tokens", "temperature", "repetition_penalty", "max_copy")
    chosen = {key: getattr(cfg, key) for key in keys}
    settings = dataclasses.asdict(Settings(until="tokens", **chosen))
    for style in progress(test.styles, "styles"):
        written = poet.write(n=cfg.passages, **settings | {"style": style if style in poet.styles else ""})
        human = human_passages(test.ids, test.spans[style], poet.tokenizer, cfg.max_new_tokens)
        speakers = names if is_drama(known.text_of[style]) else set()
        styles[style] = judge(written, human, vocabulary, language, speakers, originality)

    run = path.parent.name
    result = origin("writing", poet.machine) | {"run": run, "settings": settings, "bpb": bpb, "styles": styles}
    result |= {"wrong_tags": wrong_tags}
    print(table([result]))
    write_result(result, cfg.out or f"writing_{run}_DEVICE")


MEASURES = {  # a measure -> its name in the table, and the format of its figures
    "real_words": ("words of the book", ".1%"),
    "invented_words": ("neither in it nor in a dictionary", ".1%"),
    "repeated_4_grams": ("repeated 4-grams", ".1%"),
    "distinct_1": ("distinct-1", ".2f"),
    "distinct_2": ("distinct-2", ".2f"),
    "distinct_3": ("distinct-3", ".2f"),
    "longest_copy_characters": ("longest copy, chars", ".0f"),
    "known_speakers": ("known speakers", ".0%"),
    "speakers_who_speak": ("speakers who speak", ".0%"),
    "words_before_loop": ("words before a loop", ".0f"),
}

SETTINGS = {"temperature": 1.0, "repetition_penalty": 1.0, "max_copy": 0}  # when off; rows of the table unless all are


def table(results: list[dict[str, Any]]) -> str:
    """The Markdown tables of these results: bits per byte, passages, and what a wrong style's tag costs."""
    corpora: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for r in results:
        corpora.setdefault(tuple(r["styles"]), []).append(r)
    tables = [coders_table(found) for found in corpora.values()]
    for style in dict.fromkeys(style for r in results for style in r["styles"]):
        alike: dict[str, list[dict[str, Any]]] = {}  # runs that are compared with the same people's passages
        for r in results:
            if style in r["styles"]:
                alike.setdefault(repr(r["styles"][style]["people"]), []).append(r)
        tables += [passages_table(style, found) for found in alike.values()]
    tagged = [r for r in results if r["wrong_tags"]]
    return "\n\n".join([*tables, *([tags_table(tagged)] if tagged else [])])


def coders_table(results: list[dict[str, Any]]) -> str:
    """Bits per byte of the test split: each run's, then the classical coders'."""
    styles = dict.fromkeys(style for r in results for style in r["styles"])
    ours, theirs = [], []
    for r in results:
        for entry in r["bpb"]:
            cells = [entry["bpb"], *(entry["bpb_by_style"].get(style) for style in styles)]
            row = ["" if bpb is None else f"{bpb:.3f}" for bpb in cells]
            found, name = (ours, f"RoboPoet, {r['run']}") if entry["coder"] == "RoboPoet" else (theirs, entry["coder"])
            if [name, *row] not in found:
                found.append([name, *row])
    return markdown(["Test bits/byte", "all", *styles], ours + theirs)


def passages_table(style: str, results: list[dict[str, Any]]) -> str:
    """Each run's settings and the mean measures of its passages in a style, beside people's and their range."""
    people = results[0]["styles"][style]["people"]
    rows = []
    for key, off in SETTINGS.items():
        values = [r["settings"].get(key, off) for r in results]
        if set(values) != {off}:
            rows.append([key, *(f"{value:g}" for value in values), "", ""])
    for measure_name, (name, form) in MEASURES.items():
        if measure_name in people:
            models = [r["styles"][style]["model"].get(measure_name) for r in results]
            cells = [f"{found['mean']:{form}}" if found else "" for found in models]
            mean, low, high = (f"{people[measure_name][key]:{form}}" for key in ("mean", "p1", "p99"))
            rows.append([name, *cells, mean, f"{low} to {high}"])
    coherent = [r["styles"][style]["coherent"] for r in results]
    shares = [*(found["model"] for found in coherent), coherent[0]["people"]]
    rows.append(["**in human range**", *(f"**{share:.0%}**" for share in shares), ""])
    return markdown([f"Style: {style}", *(r["run"] for r in results), "people", "98% of them"], rows)


def tags_table(results: list[dict[str, Any]]) -> str:
    """The nats per token that a style's val text costs more under another style's tag, with standard errors."""
    results = list({r["run"]: r for r in results}.values())
    costs = [{(cost["style"], cost["tag"]): cost for cost in r["wrong_tags"]} for r in results]
    rows = []
    for style, tag in dict.fromkeys(pair for found in costs for pair in found):
        cells = [found.get((style, tag)) for found in costs]
        rows.append([style, tag, *(f"{c['nats']:+.3f} ± {c['error']:.3f}" if c else "" for c in cells)])
    return markdown(["Val text of", "under the tag of, nats/token", *(r["run"] for r in results)], rows)


if __name__ == "__main__":
    configurator.launch(main, WritingConfig, positional="checkpoint")
