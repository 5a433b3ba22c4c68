"""Judge what a model writes: its bits per byte beside classical coders', its passages beside people's.

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
from bench import coders
from bench.common import evaluate_checkpoint, markdown, origin, write_result
from configurator import bounds
from robopoet.errors import CheckpointError, DataError
from robopoet.text import tokenizer
from robopoet.text.batches import EvalPlan, Meta, find_dataset, open_split, read_meta
from robopoet.text.tokenizer import Tokenizer
from robopoet.training.evaluate import compare_tags
from robopoet.weights import checkpoint
from robopoet.writing.originality import Originality, read_texts
from robopoet.writing.passage import Settings
from sample import Poet

HUMAN_PASSAGES = 500  # of each style at most; they overlap where a style's test text is short
LOOP_WORDS = 50  # within which a sequence that begins three times is a loop
Measures = dict[str, float | None]  # of one passage; None where a measure does not apply


@dataclass(frozen=True)
class WritingConfig:
    """The keys of bench.writing."""

    checkpoint: str = "out/demo/best.pt"  # the model
    passages: int = 50  # that it writes in each style
    max_new_tokens: int = 200  # tokens of each, and of each passage of the test split beside them
    temperature: float = Settings.temperature  # below 1: bolder towards the likely
    device: str = "auto"  # auto (cuda, then mps, then cpu), cpu, cuda, cuda:N, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of weights when writing; auto: the fastest
    out: str = ""  # name of the result (writing_RUN_DEVICE unless given)

    def problems(self) -> list[str]:
        """What is wrong with these values, a line each."""
        return bounds(self, "passages max_new_tokens", 1) + bounds(self, "temperature", 0)


# ---------------------------------------------------------------------------------------------------------------------
# measures of a passage


def words_of(text: str) -> list[str]:
    """The words of a text: letters alone, in lower case."""
    return re.findall(r"[^\W\d_]+", text.lower())


def distinct(words: list[str], n: int) -> float:
    """Distinct n-grams as a share of all (Li et al. 2016, arXiv:1510.03055); 0 if there is none."""
    grams = list(zip(*(words[i:] for i in range(n)), strict=False))
    return len(set(grams)) / len(grams) if grams else 0.0


def words_before_loop(words: list[str]) -> int:
    """The words before the first loop, all if there is none.

    A loop is a sequence of four words that comes again right behind itself, or that comes three times within
    LOOP_WORDS words, the last time whole; it begins where the sequence came the first of these times.
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
    """Each speaker's line with the line behind it: the first of a paragraph, in capitals, no ACT or SCENE.

    A passage's last line may be cut short, so it is no speaker's.
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
    """Whether a speaker's line, with a speech behind it, begins at least every other paragraph."""
    return 2 * sum(_speaks(after) for _, after in speaker_lines(text)) >= text.count("\n\n") + 1


def _speaks(after: str) -> bool:
    return bool(after) and not _is_name(after)


def measure(text: str, vocabulary: set[str], names: set[str], copied: int) -> Measures:
    """All measures of one passage.

    vocabulary: the words of the training text. names: its speakers, none if the style is no drama. copied: characters
    of the passage's longest run that stands there.
    """
    words = words_of(text)
    speakers = speaker_lines(text) if names else []
    return {
        "real_words": sum(word in vocabulary for word in words) / max(len(words), 1),
        "repeated_4_grams": 1 - distinct(words, 4),
        **{f"distinct_{n}": distinct(words, n) for n in (1, 2, 3)},
        "longest_copy_characters": copied,
        "known_speakers": sum(name in names for name, _ in speakers) / len(speakers) if speakers else None,
        "speakers_who_speak": sum(_speaks(after) for _, after in speakers) / len(speakers) if speakers else None,
        "words_before_loop": words_before_loop(words),
    }


def ranges(passages: list[Measures]) -> dict[str, dict[str, float]]:
    """Mean, 1st and 99th percentile of each measure over the passages that it applies to, if it applies to any."""
    found = {}
    for name in passages[0]:
        if values := [passage[name] for passage in passages if passage[name] is not None]:
            p1, p99 = np.percentile(values, [1, 99]).tolist()
            found[name] = {"mean": float(np.mean(values)), "p1": p1, "p99": p99}
    return found


def outside(passage: Measures, human: dict[str, dict[str, float]]) -> list[str]:
    """The measures by which a passage lies beyond people's 1st or 99th percentile."""
    return [
        name
        for name, value in passage.items()
        if name in human and value is not None and not human[name]["p1"] <= value <= human[name]["p99"]
    ]


def human_passages(ids: np.ndarray, spans: list[tuple[int, int]], tok: Tokenizer, length: int) -> list[str]:
    """Texts of `length` tokens that begin where a line begins, spread evenly over the spans, HUMAN_PASSAGES at most.

    ids: (n,) int64 of a split. spans: its documents, each with its last token, which may be <|endoftext|>, left out.
    Raises DataError when no document is long enough.
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
# bits per byte


class Texts:
    """A split by style: `ids` (n,) int64, `text` and `targets` of each style, `size` in bytes of a style's targets.

    targets: the places that a model's loss is over, all but each document's first; as every token of ours they include
    <|endoftext|>, which has no bytes. Raises DataError when the bins can't be used.
    """

    def __init__(self, folder: Path, name: str, meta: Meta, tok: Tokenizer):
        documents = meta.splits[name].documents
        texts = read_texts(folder, name)
        self.ids = np.fromfile(folder / f"{name}.bin", "<u2").astype(np.int64)
        self.styles = list(dict.fromkeys(doc.style for doc in documents))
        lengths = tokenizer.token_bytes(tok)[self.ids]
        self.text, self.spans, self.targets, self.size = {}, {}, {}, {}
        for style in self.styles:
            of_style = [i for i, doc in enumerate(documents) if doc.style == style]
            self.text[style] = "".join(texts[i] for i in of_style)
            self.spans[style] = [(documents[i].start, documents[i].stop) for i in of_style]
            self.targets[style] = np.concatenate([np.arange(start + 1, stop) for start, stop in self.spans[style]])
            self.size[style] = int(lengths[self.targets[style]].sum())
        self.whole = "".join(texts)


def bits_per_byte(
    known: Texts, val: Texts, test: Texts, evaluated: dict[str, Any], vocab_size: int
) -> list[dict[str, Any]]:
    """What each coder takes for the test split, by its bytes: all of it at once, and each style's.

    evaluated: the model's loss on it. Orders of PPMd and the n-grams are those that do best on the val split.
    """
    bits = {style: loss / math.log(2) * len(test.targets[style]) for style, loss in evaluated["loss_by_style"].items()}
    by_style = {style: bits[style] / test.size[style] for style in bits}
    found = [{"coder": "RoboPoet", "bpb": evaluated["bpb"], "bpb_by_style": by_style}]

    n_grams = [coders.KneserNey(known.ids, vocab_size, order) for order in (3, 4, 5)]
    best = min(n_grams, key=lambda model: model.bits(known.ids, val.ids).sum())
    each = best.bits(known.ids, test.ids)
    bits = {style: each[targets].sum() for style, targets in test.targets.items()}
    by_style = {style: bits[style] / test.size[style] for style in bits}
    bpb = sum(bits.values()) / sum(test.size.values())
    found.append({"coder": f"Kneser-Ney, {best.order} tokens", "bpb": bpb, "bpb_by_style": by_style})

    text = known.whole.encode()
    ppmds = {order: coders.ppmd(text, order) for order in (4, 6, 8, 10, 12)}
    order = min(ppmds, key=lambda order: ppmds[order](val.whole.encode()))
    named = {f"PPMd, order {order}": ppmds[order], "xz -9e": coders.xz(text), "zstd -22": coders.zstd(text)}
    for name, coder in named.items():
        each = {style: coder(part.encode()) / len(part.encode()) for style, part in test.text.items()}
        bpb = coder(test.whole.encode()) / len(test.whole.encode())
        found.append({"coder": name, "bpb": bpb, "bpb_by_style": each})
    return found


# ---------------------------------------------------------------------------------------------------------------------


def judge(
    written: list[str], human: list[str], vocabulary: set[str], names: set[str], originality: Originality
) -> dict[str, Any]:
    """The figures of a style: the measures of the model's passages and people's, and how many are coherent.

    Coherent is what lies between people's 1st and 99th percentile by every measure; so not all of theirs is.
    """

    def measures(passages: list[str]) -> list[Measures]:
        return [measure(passage, vocabulary, names, len(originality.check(passage).longest)) for passage in passages]

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


def main(cfg: WritingConfig) -> None:
    """Code the test split in all ways, write passages, judge them, print the figures and keep them."""
    # --- model and texts
    path = Path(cfg.checkpoint)
    saved, poet = checkpoint.load(path), Poet(cfg.checkpoint, cfg.device, cfg.dtype)
    folder = find_dataset(saved["config"]["dataset"])
    originality = Originality(folder, saved["text_sha256"])
    meta = read_meta(folder)
    known, val, test = (Texts(folder, name, meta, poet.tokenizer) for name in ("train", "val", "test"))

    # --- bits per byte
    model = checkpoint.build_model(saved, path).to(poet.machine.device)
    evaluated = evaluate_checkpoint(saved, path, model, "test", poet.machine)
    bpb = bits_per_byte(known, val, test, evaluated, meta.vocab_size)
    plan = EvalPlan(model.config.block_size, train.TrainConfig.batch_size)
    tagged = open_split(folder, "val", meta, plan.block_size, poet.machine.device)
    costs = compare_tags(model, tagged, meta.styles, plan, poet.machine).items()
    wrong_tags = [{"style": style, "tag": tag, "nats": more, "error": error} for (style, tag), (more, error) in costs]

    # --- passages
    first_special = len(poet.tokenizer.tokens)  # none is written, so that every passage has its full length
    poet.forbidden = torch.arange(first_special, model.config.vocab_size, device=poet.machine.device)
    vocabulary, names = set(words_of(known.whole)), {name for name, _ in speaker_lines(known.whole)}
    styles = {}
    settings = {"max_new_tokens": cfg.max_new_tokens, "until": "tokens", "temperature": cfg.temperature}
    settings = dataclasses.asdict(Settings(**settings))
    for style in test.styles:
        written = poet.write(n=cfg.passages, **settings | {"style": style if style in poet.styles else ""})
        human = human_passages(test.ids, test.spans[style], poet.tokenizer, cfg.max_new_tokens)
        speakers = names if is_drama(known.text[style]) else set()
        styles[style] = judge(written, human, vocabulary, speakers, originality)

    run = path.parent.name
    result = origin("writing", poet.machine) | {"run": run, "settings": settings, "bpb": bpb, "styles": styles}
    result |= {"wrong_tags": wrong_tags}
    print(table([result]))
    write_result(result, cfg.out or f"writing_{run}_DEVICE")


COLUMNS = {  # a measure -> its heading, and how its figures are shown
    "real_words": ("Real words", ".1%"),
    "repeated_4_grams": ("Repeated 4-grams", ".1%"),
    "distinct_1": ("Distinct-1", ".2f"),
    "distinct_2": ("Distinct-2", ".2f"),
    "distinct_3": ("Distinct-3", ".2f"),
    "longest_copy_characters": ("Longest copy, characters", ".0f"),
    "known_speakers": ("Known speakers", ".0%"),
    "speakers_who_speak": ("Speakers who speak", ".0%"),
    "words_before_loop": ("Words before a loop", ".0f"),
}


def table(results: list[dict[str, Any]]) -> str:
    """The Markdown tables that show these results: bits per byte, passages, and what a wrong style's tag costs."""
    coded = [
        [
            r["run"] * (entry is r["bpb"][0]),
            entry["coder"],
            f"{entry['bpb']:.3f}",
            ", ".join(f"{style} {bpb:.3f}" for style, bpb in entry["bpb_by_style"].items()),
        ]
        for r in results
        for entry in r["bpb"]
    ]
    passages = []
    for r in results:
        for style, figures in r["styles"].items():
            first = [r["run"] * (style == next(iter(r["styles"]))), style]
            for writer in ("model", "people"):
                found, show = figures[writer], _mean_of if writer == "model" else _range_of
                cells = [show(found[name], form) if name in found else "" for name, (_, form) in COLUMNS.items()]
                named = f"model, temperature {r['settings']['temperature']:g}" if writer == "model" else writer
                passages.append([*first, named, *cells, f"{figures['coherent'][writer]:.0%}"])
                first = ["", ""]
    tags = [
        [
            r["run"] * (cost is r["wrong_tags"][0]),
            cost["style"],
            cost["tag"],
            f"{cost['nats']:+.3f} ± {cost['error']:.3f}",
        ]
        for r in results
        for cost in r["wrong_tags"]
    ]
    headings = [heading for heading, _ in COLUMNS.values()]
    return "\n\n".join(
        [
            markdown(["Run", "Coder", "Test bits/byte", "By style"], coded),
            markdown(["Run", "Style", "Writer", *headings, "Coherent"], passages),
            markdown(["Run", "Val text of", "Under the tag of", "Nats/token more, and standard error"], tags),
        ]
    )


def _mean_of(figure: dict[str, float], form: str) -> str:
    return f"{figure['mean']:{form}}"


def _range_of(figure: dict[str, float], form: str) -> str:
    return f"{figure['mean']:{form}} ({figure['p1']:{form}} to {figure['p99']:{form}})"


if __name__ == "__main__":
    configurator.launch(main, WritingConfig, DataError, CheckpointError, positional="checkpoint")
