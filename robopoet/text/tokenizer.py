"""Tokenizers: byte-level BPE of our own training, GPT-2's, or single characters; each is plain JSON when saved, ours or
Hugging Face's.

Ids run: pieces of text first, special tokens last. Specials exist only as ids: text that spells one is ordinary text.
"""

import codecs
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
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
