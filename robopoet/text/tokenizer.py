"""Tokenizers: byte-level BPE of our own training, GPT-2's, or single characters; each is plain JSON when saved, ours or
Hugging Face's.

Ids run: pieces of text first, special tokens last. Specials exist only as ids: text that spells one is ordinary text.
"""

import codecs
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, TypeVar

import msgspec
import numpy as np
import tiktoken

from robopoet import untrusted
from robopoet.errors import DataError

END = "<|endoftext|>"
UNKNOWN = "<|unk|>"

# How text is cut before merging, as GPT-2 does: contractions, then words, numbers and punctuation, each with the space
# before it, then other white space.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# the same in tiktoken's words
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
PATTERNS = {  # that a saved tokenizer may have: of another, nobody knows whether it leaves text out or ever ends
    PATTERN,
    GPT2_PATTERN,
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",  # GPT-2's own
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",  # GPT-4's
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s",  # the same in tiktoken's words
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",  # Qwen's
}
PIECE_CHARS = 25_000  # tiktoken panics on a match of about a million characters; 25,000 are at most 100 KB
BATCH_CHARS = 250_000  # pieces that are encoded in one call: some hundredths of a second, in which other threads run
LEARNED_PIECES = 1_000  # how many rustbpe holds at a time: at most 100 MB
CUT = "\0<|cut|>"  # stands between the pieces of a call
MOST_IDS = 2**20
SINGLE_BYTES = {bytes([byte]) for byte in range(256)}

Key = TypeVar("Key")
Names = Annotated[tuple[str, ...], msgspec.Meta(max_length=MOST_IDS)]


class Saved(msgspec.Struct, frozen=True, tag_field="kind"):
    """A tokenizer as meta.json and checkpoints hold it; n_pieces: how many of its ids stand for text."""

    @property
    def vocab_size(self) -> int:
        """How many ids it has."""
        return self.n_pieces + len(self.specials)

    @property
    def special_ids(self) -> dict[str, int]:
        """Its special tokens: name -> id."""
        return {name: self.n_pieces + i for i, name in enumerate(self.specials)}

    def to_json(self) -> dict[str, Any]:
        """The same as plain dicts, lists and texts."""
        return msgspec.json.decode(msgspec.json.encode(self))


class SavedBPE(Saved, tag="bpe"):
    """A BPETokenizer; the bytes of its tokens are written as Latin-1."""

    pattern: str
    tokens: Names
    specials: Names

    @property
    def n_pieces(self) -> int:
        return len(self.tokens)

    def __post_init__(self) -> None:
        check_names(self.specials)
        if self.pattern not in PATTERNS:
            raise ValueError("its pattern is none of those that GPT-2's or GPT-4's tokenizers cut text by")
        known = {token.encode("latin-1") for token in self.tokens}
        if len(known) != len(self.tokens) or b"" in known or not known.issuperset(SINGLE_BYTES):
            raise ValueError("its tokens are not all 256 bytes and longer ones, each once")


class SavedChar(Saved, tag="char"):
    """A CharTokenizer."""

    chars: str
    specials: Names

    @property
    def n_pieces(self) -> int:
        return len(self.chars)

    def __post_init__(self) -> None:
        check_names(self.specials)
        self.chars.encode()
        if len(set(self.chars)) != len(self.chars):
            raise ValueError("a character comes twice")


def check_names(specials: tuple[str, ...]) -> None:
    """Raise ValueError unless special tokens have names, which are text, each once."""
    "".join(specials).encode()  # half a surrogate pair is not text
    if len(set(specials)) != len(specials) or "" in specials:
        raise ValueError("a special token has no name, or two have the same")


class BPETokenizer:
    """Byte-level BPE: encodes any valid Unicode text and gives it back unchanged.

    tokens: the bytes of each id, in order of merging (Sennrich et al. 2016, arXiv:1508.07909; bytes as in GPT-2).
    specials: the names of the ids after those.
    """

    def __init__(self, tokens: list[bytes], specials: Iterable[str], pattern: str = PATTERN):
        self.tokens, self.pattern = tokens, pattern
        self.specials = {name: len(tokens) + i for i, name in enumerate(specials)}
        self.vocab_size = len(tokens) + len(self.specials)
        ranks = {token: rank for rank, token in enumerate(tokens)}
        cut = {CUT: len(tokens)}
        self._tiktoken = tiktoken.Encoding("robopoet", pat_str=pattern, mergeable_ranks=ranks, special_tokens=cut)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, specials: Iterable[str]) -> "BPETokenizer":
        """Learn merges from `texts` until there are `vocab_size` ids, specials included.

        Raises DataError when the texts hold too few distinct pieces for that many.
        """
        try:
            import rustbpe
        except ImportError:
            raise DataError("tokenizer: bpe needs rustbpe: pip install rustbpe; or use --tokenizer=char") from None
        specials = list(specials)
        learner = rustbpe.Tokenizer()
        wanted = vocab_size - len(specials)
        if wanted < 256:
            raise DataError(
                f"vocab_size: found {vocab_size}, must be at least {256 + len(specials)}: bytes and specials"
            )
        pieces = (piece for text in texts for piece in _pieces(text))
        learner.train_from_iterator(pieces, wanted, buffer_size=LEARNED_PIECES, pattern=PATTERN)
        tokens = [bytes(token) for token, _ in sorted(learner.get_mergeable_ranks(), key=lambda item: item[1])]
        if len(tokens) < wanted:
            raise DataError(
                f"vocab_size: found {vocab_size}, but this text can carry at most {len(tokens) + len(specials)}; "
                "lower it or add text"
            )
        return cls(tokens, specials)

    @classmethod
    def gpt2(cls, specials: Iterable[str]) -> "BPETokenizer":
        """GPT-2's own ids (50,256 and <|endoftext|>), then `specials`; its table is downloaded once by tiktoken."""
        try:
            encoding = tiktoken.get_encoding("gpt2")
        except Exception as e:  # whatever the network library of the day raises
            raise DataError(
                f"tokenizer: GPT-2's table could not be downloaded ({type(e).__name__}); connect once, "
                "or set TIKTOKEN_CACHE_DIR to a folder that holds it, or use --tokenizer=bpe"
            ) from None
        tokens = [encoding.decode_single_token_bytes(i) for i in range(encoding.eot_token)]
        return cls(tokens, [END, *(name for name in specials if name != END)], GPT2_PATTERN)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; raises DataError on a lone surrogate, which no UTF-8 file can hold."""
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise DataError(f"character {e.start} is half a surrogate pair, which is not text; remove it") from None
        return [id for ids in self.encode_pieces(list(_pieces(text))) for id in ids.tolist()]

    def encode_pieces(self, pieces: list[str]) -> list[np.ndarray]:
        """The ids of each piece (of PIECE_CHARS at most), (n,) uint32, in one call that lets other threads run."""
        joined = CUT.join(pieces)
        if joined.count(CUT) >= len(pieces):  # one of them spells it
            return [self._tiktoken.encode_to_numpy(piece, disallowed_special=()) for piece in pieces]
        ids = self._tiktoken.encode_to_numpy(joined, allowed_special={CUT}, disallowed_special=())
        cuts = np.flatnonzero(ids == len(self.tokens)).tolist()
        return [ids[start + 1 : stop] for start, stop in pairwise([-1, *cuts, len(ids)])]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that `ids` stand for; specials stand for none."""
        return b"".join(self.tokens[id] for id in ids if id < len(self.tokens))

    def unknown(self, text: str) -> str:
        """The characters of `text` that have no id: none, as every byte has one."""
        return ""

    def saved(self) -> SavedBPE:
        """All there is to it."""
        return SavedBPE(self.pattern, tuple(token.decode("latin-1") for token in self.tokens), tuple(self.specials))

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON."""
        return self.saved().to_json()


class CharTokenizer:
    """One id a character, in order of code point, as nanoGPT's character-level data sets have it.

    An unknown character becomes <|unk|> where that is among the specials, and is left out where it is not.
    """

    def __init__(self, chars: str, specials: Iterable[str]):
        self.chars = chars
        self.specials = {name: len(chars) + i for i, name in enumerate(specials)}
        self.vocab_size = len(chars) + len(self.specials)
        self.tokens = [char.encode() for char in chars]
        self._id_of = np.full(0x110000, self.specials.get(UNKNOWN, -1), dtype=np.int32)  # by code point
        self._id_of[_code_points(chars)] = np.arange(len(chars))

    @classmethod
    def train(cls, texts: Iterable[str], specials: Iterable[str]) -> "CharTokenizer":
        """One id for each character in `texts`, and <|unk|> beside the other specials where there are any."""
        specials = list(specials)
        return cls("".join(sorted(set().union(*texts))), [*specials, UNKNOWN] if specials else [])

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`."""
        return self.encode_pieces([text])[0].tolist()

    def encode_pieces(self, pieces: list[str]) -> list[np.ndarray]:
        """The ids of each piece: (n,) int32."""
        found = [self._id_of[_code_points(piece)] for piece in pieces]
        return found if UNKNOWN in self.specials else [ids[ids >= 0] for ids in found]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The UTF-8 bytes that `ids` stand for; specials stand for none."""
        return b"".join(self.tokens[id] for id in ids if id < len(self.tokens))

    def unknown(self, text: str) -> str:
        """The characters of `text` that have no id, each once, in order."""
        known = set(self.chars)
        return "".join(dict.fromkeys(char for char in text if char not in known))

    def saved(self) -> SavedChar:
        """All there is to it."""
        return SavedChar(self.chars, tuple(self.specials))

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON."""
        return self.saved().to_json()


Tokenizer = BPETokenizer | CharTokenizer


def encode_all(tokenizer: Tokenizer, texts: Iterable[tuple[Key, str]]) -> Iterator[tuple[Key, np.ndarray]]:
    """Encode texts on all cores, some MB of them at a time: a text's key and its ids, (n,) integers.

    A long text comes in several turns, one after the other, which together are what `encode` gives.
    """
    n_threads = os.cpu_count() or 1
    with ThreadPoolExecutor(n_threads) as pool:
        pending: deque[tuple[list[Key], Future[list[np.ndarray]]]] = deque()
        for keys, pieces in _batches(texts):
            pending.append((keys, pool.submit(tokenizer.encode_pieces, pieces)))
            if len(pending) > 2 * n_threads:  # so that no thread waits for the next text to be read
                keys, future = pending.popleft()
                yield from zip(keys, future.result(), strict=True)
        for keys, future in pending:
            yield from zip(keys, future.result(), strict=True)


def _batches(texts: Iterable[tuple[Key, str]]) -> Iterator[tuple[list[Key], list[str]]]:
    """Pieces of about BATCH_CHARS in all, each with the key of its text."""
    keys, pieces, size = [], [], 0
    for key, text in texts:
        for piece in _pieces(text):
            keys.append(key)
            pieces.append(piece)
            size += len(piece)
            if size >= BATCH_CHARS:
                yield keys, pieces
                keys, pieces, size = [], [], 0
    yield keys, pieces


def from_json(saved: Any) -> Tokenizer:
    """The tokenizer that `saved` or `to_json` wrote; raises DataError when it is not one."""
    saved = untrusted.convert(saved, SavedBPE | SavedChar, "tokenizer", DataError, "is damaged; run prepare.py again")
    if isinstance(saved, SavedChar):
        return CharTokenizer(saved.chars, saved.specials)
    return BPETokenizer([token.encode("latin-1") for token in saved.tokens], saved.specials, saved.pattern)


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face's tokenizer.json

_visible = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that GPT-2's files show as they are
_others = iter(range(256, 512))
CHAR_OF_BYTE = {byte: chr(byte if byte in _visible else next(_others)) for byte in range(256)}
BYTE_OF_CHAR = {char: byte for byte, char in CHAR_OF_BYTE.items()}


def to_huggingface(tokenizer: Tokenizer) -> dict[str, Any]:
    """What stands in a tokenizer.json that gives the same ids; characters are its "words"."""
    if isinstance(tokenizer, BPETokenizer):
        names = ["".join(map(CHAR_OF_BYTE.__getitem__, token)) for token in tokenizer.tokens]
        model = {"type": "BPE", "vocab": {name: id for id, name in enumerate(names)}, "merges": _merges(tokenizer)}
        cut = {"type": "Split", "pattern": {"Regex": tokenizer.pattern}, "behavior": "Isolated", "invert": False}
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        pre_tokenizer, decoder = {"type": "Sequence", "pretokenizers": [cut, level]}, level
    else:
        vocab = {char: id for id, char in enumerate(tokenizer.chars)} | tokenizer.specials
        model = {"type": "WordLevel", "vocab": vocab, "unk_token": UNKNOWN}
        cut = {"type": "Split", "pattern": {"Regex": "[\\s\\S]"}, "behavior": "Isolated", "invert": False}
        pre_tokenizer, decoder = cut, {"type": "Fuse"}
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


def _merges(tokenizer: BPETokenizer) -> list[list[str]]:
    """The two tokens that each token of several bytes is merged from, in order."""
    ranks = {token: rank for rank, token in enumerate(tokenizer.tokens)}
    merges = []
    for token in tokenizer.tokens:
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            at = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], math.inf))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            merges.append(["".join(map(CHAR_OF_BYTE.__getitem__, part)) for part in parts])
    return merges


LIKE_GPT2 = "it must be one like GPT-2's"


@dataclass(frozen=True)
class Added:
    """A special token of a tokenizer.json."""

    id: untrusted.Count
    content: str


@dataclass(frozen=True)
class Regex:
    """Where text is cut."""

    Regex: str = ""


@dataclass(frozen=True)
class Step:
    """A pre-tokenizer of a tokenizer.json."""

    type: str
    pattern: Regex = Regex()
    add_prefix_space: bool = False
    use_regex: bool = True


@dataclass(frozen=True)
class PreTokenizer(Step):
    """One, or several one after the other."""

    pretokenizers: tuple[Step, ...] | None = None


@dataclass(frozen=True)
class Merges:
    """The model of a tokenizer.json: its ids, and which two make which."""

    vocab: Annotated[dict[str, untrusted.Count], msgspec.Meta(max_length=MOST_IDS)]
    type: str = "BPE"
    merges: Annotated[tuple[str | tuple[str, str], ...], msgspec.Meta(max_length=MOST_IDS)] = ()


@dataclass(frozen=True)
class TokenizerJson:
    """What is read of a tokenizer.json."""

    model: Merges
    added_tokens: Annotated[tuple[Added, ...], msgspec.Meta(max_length=MOST_IDS)] = ()
    pre_tokenizer: PreTokenizer | None = None
    normalizer: Any = None


def from_huggingface(raw: bytes | str) -> Tokenizer:
    """The tokenizer that a tokenizer.json describes.

    Raises DataError unless it is to_huggingface's or like GPT-2's: bytes, then merges in the order of their ids, then
    special tokens.
    """
    saved = untrusted.decode_json(raw, TokenizerJson, "tokenizer.json", DataError, LIKE_GPT2)
    model, specials = saved.model, sorted(saved.added_tokens, key=lambda token: token.id)
    names = {token.content: token.id for token in specials}
    vocab = sorted((id, name) for name, id in model.vocab.items() if name not in names)
    pieces = [name for _, name in vocab]
    if [id for id, _ in vocab] + [token.id for token in specials] != list(range(len(pieces) + len(specials))):
        raise _unlike("its special tokens are not the last")
    if model.type == "WordLevel" and all(len(piece) == 1 for piece in pieces):
        return _from_huggingface({"kind": "char", "chars": "".join(pieces), "specials": list(names)})
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.merges]
    single = [piece for piece in pieces if len(piece) == 1]
    if model.type != "BPE" or pieces != single + ["".join(merge) for merge in merges if len(merge) == 2]:
        raise _unlike("its ids are not in the order of its merges")
    pre = saved.pre_tokenizer or PreTokenizer("")
    steps = (pre,) if pre.pretokenizers is None else pre.pretokenizers
    patterns = [step.pattern.Regex for step in steps if step.type == "Split"]
    patterns = patterns or [PATTERN for step in steps if step.type == "ByteLevel" and step.use_regex]
    if {step.type for step in steps} - {"Split", "ByteLevel"} or len(patterns) != 1 or saved.normalizer:
        raise _unlike("it cuts text in another way")
    if any(step.add_prefix_space for step in steps):
        raise _unlike("it puts a space before every text")
    if unknown := set("".join(pieces)) - BYTE_OF_CHAR.keys():
        raise _unlike(f"{min(unknown)!r} stands for no byte")
    tokens = ["".join(chr(BYTE_OF_CHAR[char]) for char in piece) for piece in pieces]
    return _from_huggingface({"kind": "bpe", "pattern": patterns[0], "tokens": tokens, "specials": list(names)})


def _from_huggingface(saved: dict[str, Any]) -> Tokenizer:
    return from_json(untrusted.convert(saved, SavedBPE | SavedChar, "tokenizer.json", DataError, LIKE_GPT2))


def _unlike(why: str) -> DataError:
    return DataError(f"tokenizer.json: {why}; {LIKE_GPT2}")


def style_token(style: str) -> str:
    """The special token that stands at the head of a window written in `style`."""
    return f"<|{style}|>"


def styles(tokenizer: Tokenizer) -> dict[str, int]:
    """The styles the tokenizer has a tag for: name -> id; a special token of another form, as <pad>, is none."""
    tags = {name: id for name, id in tokenizer.specials.items() if name not in (END, UNKNOWN)}
    return {style: id for name, id in tags.items() if (style := name[2:-2]) and name == style_token(style)}


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """How many bytes of text each id stands for: (vocab_size,) int64, 0 for specials."""
    lengths = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    lengths[: len(tokenizer.tokens)] = [len(token) for token in tokenizer.tokens]
    return lengths


class StreamDecoder:
    """Turns ids into text as they come, holding back the bytes of a character until it is whole."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Iterable[int], final: bool = False) -> str:
        """The text that `ids` complete; `final` also gives what an unfinished character leaves (U+FFFD)."""
        return self._utf8.decode(self._tokenizer.decode_bytes(ids), final)


def _pieces(text: str) -> Iterable[str]:
    """Cut `text` into pieces of at most PIECE_CHARS, where PATTERN would cut too if there is such a place."""
    start = 0
    while start < len(text):
        stop = start + PIECE_CHARS
        if stop < len(text):
            stop = _last_cut(text, start, stop, _ends_word) or _last_cut(text, start, stop, _ends_text) or stop
        yield text[start:stop]
        start = stop


def _last_cut(text: str, start: int, stop: int, cuts: Callable[[str, str], bool]) -> int:
    """The last place at which `cuts` holds for the characters around it, or 0."""
    return next((i for i in range(stop, start, -1) if cuts(text[i - 1], text[i])), 0)


def _ends_word(before: str, after: str) -> bool:
    """Each of PATTERNS cuts here: behind a word or number before what is neither, and before a space behind none."""
    if after == " ":
        return not before.isspace()
    return before.isalnum() and not after.isalnum() and (after.isspace() or after.isprintable())  # else: not known yet


def _ends_text(before: str, after: str) -> bool:
    """GPT-2's pattern cuts here: before white space behind none; GPT-4's may keep a line end with what it ends."""
    return after in "\n\r\t\v\f\x85\xa0\u3000" and not before.isspace()


def _code_points(text: str) -> np.ndarray:
    """The number of each character: (len(text),) uint32."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
