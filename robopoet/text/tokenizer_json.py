"""Hugging Face's tokenizer.json: write one for a tokenizer of ours, or read one that is like GPT-2's or SmolLM's."""

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import msgspec

from robopoet import files
from robopoet.errors import DataError
from robopoet.text.tokenizer import (
    MOST_IDS,
    PATTERN,
    SMOLLM_PATTERN,
    UNKNOWN,
    BPETokenizer,
    Saved,
    Tokenizer,
    from_json,
)

LIKE_GPT2 = "it must be one like GPT-2's"

# GPT-2's files show each byte as one character: printable bytes as themselves, the others from U+0100 on.
_printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
_others = iter(range(256, 512))
CHAR_OF_BYTE = {byte: chr(byte if byte in _printable else next(_others)) for byte in range(256)}
BYTE_OF_CHAR = {char: byte for byte, char in CHAR_OF_BYTE.items()}
# control characters but for line ends and tabs, and bytes that begin no character so far
RARE_BYTES = sorted({*range(32), 127, 0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100)} - {*b"\t\n\r"})


# ---------------------------------------------------------------------------------------------------------------------
# writing


def to_huggingface(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of a tokenizer.json that gives the same ids."""
    if isinstance(tokenizer, BPETokenizer):
        vocab = {show(token): id for id, token in enumerate(tokenizer.tokens)}
        model = {"type": "BPE", "vocab": vocab, "merges": merges(tokenizer)}
        split = {"type": "Split", "pattern": {"Regex": tokenizer.pattern}, "behavior": "Isolated", "invert": False}
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        pre_tokenizer, decoder = {"type": "Sequence", "pretokenizers": [split, level]}, level
    else:  # each character is a "word"
        vocab = {char: id for id, char in enumerate(tokenizer.chars)} | tokenizer.specials
        model = {"type": "WordLevel", "vocab": vocab, "unk_token": UNKNOWN}
        split = {"type": "Split", "pattern": {"Regex": "[\\s\\S]"}, "behavior": "Isolated", "invert": False}
        pre_tokenizer, decoder = split, {"type": "Fuse"}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": id, "content": name, **flags} for name, id in tokenizer.specials.items()],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }


def show(token: bytes) -> str:
    """A token as GPT-2's files show it: a character for each byte."""
    return "".join(map(CHAR_OF_BYTE.__getitem__, token))


def merges(tokenizer: BPETokenizer) -> list[list[str]]:
    """For each token of several bytes, in order, the two tokens that merge into it."""
    ranks = {token: rank for rank, token in enumerate(tokenizer.tokens)}
    found = []
    for token in tokenizer.tokens:
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:  # encode the token as BPE does, up to the last merge
            at = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], math.inf))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            found.append([show(part) for part in parts])
    return found


# ---------------------------------------------------------------------------------------------------------------------
# reading


@dataclass(frozen=True)
class Added:
    """A special token."""

    id: files.Count
    content: str


@dataclass(frozen=True)
class Regex:
    """The pattern that a pre-tokenizer splits text by."""

    Regex: str = ""


@dataclass(frozen=True)
class Step:
    """A pre-tokenizer."""

    type: str
    pattern: Regex = Regex()
    add_prefix_space: bool = False
    use_regex: bool = True
    individual_digits: bool = False


@dataclass(frozen=True)
class PreTokenizer(Step):
    """One pre-tokenizer, or a sequence of them."""

    pretokenizers: tuple[Step, ...] | None = None


@dataclass(frozen=True)
class Model:
    """The vocabulary, and the pairs of tokens that merge, in order."""

    vocab: Annotated[dict[str, files.Count], msgspec.Meta(max_length=MOST_IDS)]
    type: str = "BPE"
    merges: Annotated[tuple[str | tuple[str, str], ...], msgspec.Meta(max_length=MOST_IDS)] = ()


@dataclass(frozen=True)
class TokenizerJson:
    """The keys we read of a tokenizer.json."""

    model: Model
    added_tokens: Annotated[tuple[Added, ...], msgspec.Meta(max_length=MOST_IDS)] = ()
    pre_tokenizer: PreTokenizer | None = None
    normalizer: Any = None


class Foreign(NamedTuple):
    """A tokenizer from elsewhere. ids: for each id of ours the one that it has there, -1 for none."""

    tokenizer: Tokenizer
    ids: list[int]


def from_huggingface(raw: bytes | str) -> Foreign:
    """The tokenizer that a tokenizer.json describes.

    Raises DataError unless to_huggingface wrote it or it is like GPT-2's: byte-level, its ids in the order of the
    merges.
    """
    saved = files.decode_json(raw, TokenizerJson, "tokenizer.json", DataError, LIKE_GPT2)
    model, specials = saved.model, {token.content: token.id for token in saved.added_tokens}
    ids = model.vocab | specials
    names = sorted(ids, key=ids.__getitem__)
    if [ids[name] for name in names] != list(range(len(names))):
        raise _unlike("its ids are not 0, 1, 2 and so on, each once", "tokenizer.json")
    if model.type == "BPE":
        pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else merge for merge in model.merges]
        return byte_level("tokenizer.json", names, specials.keys(), pairs, _pattern(saved))
    pieces = [name for name in names if name not in specials]
    if model.type != "WordLevel" or any(len(piece) != 1 for piece in pieces):
        raise _unlike("it is neither BPE nor one id for each character", "tokenizer.json")
    return _build("tokenizer.json", names, {"kind": "char", "chars": "".join(pieces)}, pieces, specials.keys())


def byte_level(
    where: str, names: list[str], specials: Collection[str], pairs: Iterable[tuple[str, ...]], pattern: str
) -> Foreign:
    """A byte-level BPE tokenizer; where: what an error names.

    names: each id's, as GPT-2's files show it. pairs: those that merge, in order. A byte that hardly any text has, and
    the tokenizer lacks (SmolLM's lacks 21), gets an id. Raises DataError unless the ids are in the order of the merges.
    """
    pieces = [name for name in names if name not in specials]
    single = [piece for piece in pieces if len(piece) == 1]
    if pieces[len(single) :] != ["".join(pair) for pair in pairs if len(pair) == 2] or pieces[: len(single)] != single:
        raise _unlike("its ids are not in the order of its merges", where)
    if unknown := set("".join(pieces)) - BYTE_OF_CHAR.keys():
        raise _unlike(f"{min(unknown)!r} stands for no byte", where)
    added = [CHAR_OF_BYTE[byte] for byte in RARE_BYTES if CHAR_OF_BYTE[byte] not in pieces[: len(single)]]
    pieces[len(single) : len(single)] = added
    tokens = ["".join(chr(BYTE_OF_CHAR[char]) for char in piece) for piece in pieces]
    return _build(where, names, {"kind": "bpe", "pattern": pattern, "tokens": tokens}, pieces, specials)


def _pattern(saved: TokenizerJson) -> str:
    """The pattern that text is split by before merging; raises DataError if more is done to the text than that."""
    pre = saved.pre_tokenizer or PreTokenizer("")
    steps = (pre,) if pre.pretokenizers is None else pre.pretokenizers
    patterns = [step.pattern.Regex for step in steps if step.type == "Split"]
    patterns = patterns or [PATTERN for step in steps if step.type == "ByteLevel" and step.use_regex]
    if patterns == [PATTERN] and steps[0].type == "Digits" and steps[0].individual_digits:
        steps, patterns = steps[1:], [SMOLLM_PATTERN]
    if {step.type for step in steps} - {"Split", "ByteLevel"} or len(patterns) != 1 or saved.normalizer:
        raise _unlike("it cuts text in another way", "tokenizer.json")
    if any(step.add_prefix_space for step in steps):
        raise _unlike("it puts a space before every text", "tokenizer.json")
    return patterns[0]


def _build(
    where: str, names: list[str], saved: dict[str, Any], pieces: list[str], specials: Collection[str]
) -> Foreign:
    """The tokenizer of these pieces, in our order, and of the specials in theirs."""
    last = [name for name in names if name in specials]
    tokenizer = files.convert(saved | {"specials": last}, Saved, where, DataError, LIKE_GPT2)
    ids = {name: id for id, name in enumerate(names)}
    return Foreign(from_json(tokenizer), [ids.get(name, -1) for name in [*pieces, *last]])


def _unlike(why: str, where: str) -> DataError:
    return DataError(f"{where}: {why}; {LIKE_GPT2}")
