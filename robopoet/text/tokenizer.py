"""Tokenizers: byte-level BPE trained on the corpus, GPT-2's, or single characters. Each is saved as plain JSON.

The ids of text come first, the ids of special tokens last. A special token exists only as an id: text that spells its
name is ordinary text.
"""

import codecs
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from typing import Annotated, Any, TypeVar

import msgspec
import numpy as np
import tiktoken

from robopoet import files
from robopoet.errors import DataError

END = "<|endoftext|>"
UNKNOWN = "<|unk|>"
CHAT = "<|im_start|>", "<|im_end|>"  # around each message, in models that have learned to chat

# How text is cut before merging, as in GPT-2: contractions; words, numbers and punctuation, each with the space before
# it; other white space.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# the same as tiktoken writes it
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# SmolLM's: digits one by one, and white space before a digit stays together
SMOLLM_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++|\p{N}| ?[^\s\p{L}\p{N}]++|\s++$|\s++(?=\p{N})|\s+(?!\S)|\s"
# that a saved tokenizer may have (an unknown one might drop text, or backtrack forever) -> llama.cpp's name for it
PATTERNS = {
    PATTERN: "gpt-2",
    GPT2_PATTERN: "gpt-2",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": "gpt-2",  # as in GPT-2's code
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": "llama-bpe",  # GPT-4's
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s": "llama-bpe",  # the same as tiktoken writes it
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",  # Qwen's
    SMOLLM_PATTERN: "smollm",
}
PIECE_CHARS = 25_000  # tiktoken panics on a match of about a million characters; 25,000 are at most 100 KB
BATCH_CHARS = 250_000  # encoded in one call, which takes some hundredths of a second and lets other threads run
TRAIN_PIECES = 1_000  # pieces that rustbpe holds at a time: at most 100 MB
SEPARATOR = "\0<|cut|>"  # between the pieces of a call
MOST_IDS = 2**20
SINGLE_BYTES = {bytes([byte]) for byte in range(256)}

Key = TypeVar("Key")
Names = Annotated[tuple[str, ...], msgspec.Meta(max_length=MOST_IDS)]


class _Saved(msgspec.Struct, frozen=True, tag_field="kind"):
    """A tokenizer as it stands in meta.json and in checkpoints: the `tokens` of text, then the `specials`."""

    @property
    def tokens(self) -> Sequence[str]:
        raise NotImplementedError

    @property
    def specials(self) -> Sequence[str]:
        raise NotImplementedError

    def __post_init__(self) -> None:
        "".join(self.specials).encode()  # raises on half a surrogate pair
        if len(set(self.specials)) != len(self.specials) or "" in self.specials:
            raise ValueError("a special token has no name, or two have the same")

    @property
    def vocab_size(self) -> int:
        """The number of ids."""
        return len(self.tokens) + len(self.specials)

    @property
    def special_ids(self) -> dict[str, int]:
        """Special tokens: name -> id."""
        return {name: len(self.tokens) + i for i, name in enumerate(self.specials)}

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists and strings."""
        return msgspec.json.decode(msgspec.json.encode(self))


class SavedBPE(_Saved, frozen=True, tag="bpe"):
    """A BPETokenizer. tokens: each token's bytes, decoded as Latin-1 so that JSON can hold them."""

    pattern: str
    tokens: Names
    specials: Names

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pattern not in PATTERNS:
            raise ValueError("its pattern is not one that GPT-2's, GPT-4's, Qwen's or SmolLM's tokenizer cuts text by")
        known = {token.encode("latin-1") for token in self.tokens}
        if len(known) != len(self.tokens) or b"" in known or not known.issuperset(SINGLE_BYTES):
            raise ValueError("its tokens are not all 256 bytes and longer ones, each once")


class SavedChar(_Saved, frozen=True, tag="char"):
    """A CharTokenizer."""

    chars: str
    specials: Names

    @property
    def tokens(self) -> str:
        """Each character is one."""
        return self.chars

    def __post_init__(self) -> None:
        super().__post_init__()
        self.chars.encode()
        if len(set(self.chars)) != len(self.chars):
            raise ValueError("a character appears twice")


Saved = SavedBPE | SavedChar


def fitting_vocab_size(n_bytes: int) -> int:
    """The size of the vocabulary that a text of so many bytes carries well: "One dial" in bench/LOG.md."""
    return min(max(100 * round(15 * (n_bytes / 125_000) ** 0.57), 500), 32_000)


class _Tokenizer:
    """What both kinds have in common; each has its own encode, encode_pieces and unknown.

    saved: as meta.json and checkpoints hold it. tokens: the bytes of each id of text. specials: name -> id.
    """

    def __init__(self, saved: Saved, tokens: list[bytes]):
        self.saved, self.tokens = saved, tokens
        self.specials, self.vocab_size = saved.special_ids, saved.vocab_size

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that `ids` stand for; specials stand for none."""
        return b"".join(self.tokens[id] for id in ids if id < len(self.tokens))

    def to_json(self) -> dict[str, Any]:
        """`saved` as plain JSON."""
        return self.saved.to_json()


class BPETokenizer(_Tokenizer):
    """Byte-level BPE: any valid Unicode text survives encoding and decoding unchanged.

    tokens: the bytes of each id, in order of merging (Sennrich et al. 2016, arXiv:1508.07909; on bytes, as in GPT-2).
    specials: the names of the ids after those.
    """

    def __init__(self, tokens: list[bytes], specials: Iterable[str], pattern: str = PATTERN):
        saved = SavedBPE(pattern, tuple(token.decode("latin-1") for token in tokens), tuple(specials))
        super().__init__(saved, tokens)
        self.pattern = pattern
        ranks = {token: rank for rank, token in enumerate(tokens)}
        special = {SEPARATOR: len(tokens)}
        self._tiktoken = tiktoken.Encoding("robopoet", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, specials: Iterable[str], or_fewer: bool = False
    ) -> "BPETokenizer":
        """Learn merges from `texts` until there are `vocab_size` ids, special tokens included.

        Raises DataError when the texts have too few different words for that many, unless `or_fewer`, or rustbpe is
        not installed.
        """
        try:
            import rustbpe
        except ImportError:
            raise DataError("tokenizer: bpe needs rustbpe: pip install rustbpe; or use --tokenizer=char") from None
        specials = list(specials)
        trainer = rustbpe.Tokenizer()
        wanted = max(vocab_size - len(specials), 256 if or_fewer else 0)
        if wanted < 256:
            raise DataError(
                f"vocab_size: found {vocab_size}, must be at least {256 + len(specials)}: bytes and specials"
            )
        pieces = (piece for text in texts for piece in _pieces(text))
        trainer.train_from_iterator(pieces, wanted, buffer_size=TRAIN_PIECES, pattern=PATTERN)
        tokens = [bytes(token) for token, _ in sorted(trainer.get_mergeable_ranks(), key=lambda item: item[1])]
        if len(tokens) < wanted and not or_fewer:
            raise DataError(
                f"vocab_size: found {vocab_size}, but this text can carry at most {len(tokens) + len(specials)}; "
                "lower it or add text"
            )
        return cls(tokens, specials)

    @classmethod
    def gpt2(cls, specials: Iterable[str]) -> "BPETokenizer":
        """GPT-2's ids (50,256 and <|endoftext|>), then `specials`; tiktoken downloads the table once.

        Raises DataError when that fails.
        """
        try:
            encoding = tiktoken.get_encoding("gpt2")
        except Exception as e:  # many classes, and they change with the network library
            raise DataError(
                f"tokenizer: GPT-2's vocabulary could not be downloaded ({type(e).__name__}); connect once, "
                "or set TIKTOKEN_CACHE_DIR to a folder that holds it, or use --tokenizer=bpe"
            ) from None
        tokens = [encoding.decode_single_token_bytes(i) for i in range(encoding.eot_token)]
        return cls(tokens, [END, *(name for name in specials if name != END)], GPT2_PATTERN)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`; raises DataError on a lone surrogate, which no UTF-8 file can hold."""
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise DataError(f"character {e.start} is a lone surrogate, which UTF-8 can't encode; remove it") from None
        return [id for ids in self.encode_pieces(list(_pieces(text))) for id in ids.tolist()]

    def encode_pieces(self, pieces: list[str]) -> list[np.ndarray]:
        """The ids of each piece, (n,) uint32, in one call that lets other threads run.

        pieces: of at most PIECE_CHARS characters each.
        """
        joined = SEPARATOR.join(pieces)
        if joined.count(SEPARATOR) >= len(pieces):  # a piece holds the separator
            return [self._tiktoken.encode_to_numpy(piece, disallowed_special=()) for piece in pieces]
        ids = self._tiktoken.encode_to_numpy(joined, allowed_special={SEPARATOR}, disallowed_special=())
        cuts = np.flatnonzero(ids == len(self.tokens)).tolist()
        return [ids[start + 1 : stop] for start, stop in pairwise([-1, *cuts, len(ids)])]

    def unknown(self, text: str) -> str:
        """The characters of `text` that have no id: none, since every byte has one."""
        return ""


class CharTokenizer(_Tokenizer):
    """One id per character, in order of code point, as in nanoGPT's character-level data sets.

    An unknown character becomes <|unk|>, or is dropped if <|unk|> is not among the specials.
    """

    def __init__(self, chars: str, specials: Iterable[str]):
        super().__init__(SavedChar(chars, tuple(specials)), [char.encode() for char in chars])
        self.chars = chars
        self._id_of = np.full(0x110000, self.specials.get(UNKNOWN, -1), dtype=np.int32)  # indexed by code point
        self._id_of[_code_points(chars)] = np.arange(len(chars))

    @classmethod
    def train(cls, texts: Iterable[str], specials: Iterable[str]) -> "CharTokenizer":
        """One id for each character in `texts`; <|unk|> is added if there are special tokens at all."""
        specials = list(specials)
        return cls("".join(sorted(set().union(*texts))), [*specials, UNKNOWN] if specials else [])

    def encode(self, text: str) -> list[int]:
        """The ids of `text`."""
        return self.encode_pieces([text])[0].tolist()

    def encode_pieces(self, pieces: list[str]) -> list[np.ndarray]:
        """The ids of each piece: (n,) int32."""
        found = [self._id_of[_code_points(piece)] for piece in pieces]
        return found if UNKNOWN in self.specials else [ids[ids >= 0] for ids in found]

    def unknown(self, text: str) -> str:
        """The characters of `text` that have no id, each once, in order of appearance."""
        known = set(self.chars)
        return "".join(dict.fromkeys(char for char in text if char not in known))


Tokenizer = BPETokenizer | CharTokenizer


def encode_all(tokenizer: Tokenizer, texts: Iterable[tuple[Key, str]]) -> Iterator[tuple[Key, np.ndarray]]:
    """Encode (key, text) pairs on all cores; yields (key, ids) in order, ids as (n,) integers.

    Holds a few MB of text at a time. A long text is yielded in consecutive parts, which joined are what `encode`
    returns.
    """
    n_threads = os.cpu_count() or 1
    with ThreadPoolExecutor(n_threads) as pool:
        pending: deque[tuple[list[Key], Future[list[np.ndarray]]]] = deque()
        for keys, pieces in _batches(texts):
            pending.append((keys, pool.submit(tokenizer.encode_pieces, pieces)))
            if len(pending) > 2 * n_threads:  # enough to keep every thread busy
                keys, future = pending.popleft()
                yield from zip(keys, future.result(), strict=True)
        for keys, future in pending:
            yield from zip(keys, future.result(), strict=True)


def _batches(texts: Iterable[tuple[Key, str]]) -> Iterator[tuple[list[Key], list[str]]]:
    """Batches of pieces, about BATCH_CHARS characters each, with the key of each piece's text."""
    keys, pieces, size = list[Key](), list[str](), 0
    for key, text in texts:
        for piece in _pieces(text):
            keys.append(key)
            pieces.append(piece)
            size += len(piece)
            if size >= BATCH_CHARS:
                yield keys, pieces
                keys, pieces, size = list[Key](), list[str](), 0
    yield keys, pieces


def from_json(saved: Any) -> Tokenizer:
    """The tokenizer that `saved` or `to_json` returned; raises DataError when it is damaged."""
    saved = files.convert(saved, Saved, "tokenizer", DataError, "is damaged; run prepare.py again")
    if isinstance(saved, SavedChar):
        return CharTokenizer(saved.chars, saved.specials)
    return BPETokenizer([token.encode("latin-1") for token in saved.tokens], saved.specials, saved.pattern)


def style_token(style: str) -> str:
    """The name of a style's tag: the special token that a window of this style begins with."""
    return f"<|{style}|>"


def styles(tokenizer: Tokenizer) -> dict[str, int]:
    """The styles that have a tag: name -> id of the tag. A special token of another form, like <pad>, is no tag."""
    tags = {name: id for name, id in tokenizer.specials.items() if name not in (END, UNKNOWN, *CHAT)}
    return {style: id for name, id in tags.items() if (style := name[2:-2]) and name == style_token(style)}


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """How many bytes of text each id stands for: (vocab_size,) int64, 0 for special tokens."""
    lengths = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    lengths[: len(tokenizer.tokens)] = [len(token) for token in tokenizer.tokens]
    return lengths


class StreamDecoder:
    """Decodes ids one by one, holding back the bytes of a character until all of them are there.

    skip: how many bytes are left out before the others.
    """

    def __init__(self, tokenizer: Tokenizer, skip: int = 0):
        self._tokenizer, self.skip = tokenizer, skip
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Iterable[int]) -> str:
        """The text that `ids` complete; bytes that can't be a character become U+FFFD."""
        raw = self._tokenizer.decode_bytes(ids)
        raw, self.skip = raw[self.skip :], max(self.skip - len(raw), 0)
        return self._utf8.decode(raw)


def _pieces(text: str) -> Iterable[str]:
    """Cut `text` into pieces of at most PIECE_CHARS, if possible where the tokenizer's pattern cuts it anyway."""
    start = 0
    while start < len(text):
        stop = start + PIECE_CHARS
        if stop < len(text):
            stop = _last_cut(text, start, stop, _ends_word) or _last_cut(text, start, stop, _ends_text) or stop
        yield text[start:stop]
        start = stop


def _last_cut(text: str, start: int, stop: int, cuts: Callable[[str, str], bool]) -> int:
    """The last place in text[start:stop] where `cuts(before, after)` holds for the characters beside it, or 0."""
    return next((i for i in range(stop, start, -1) if cuts(text[i - 1], text[i])), 0)


def _ends_word(before: str, after: str) -> bool:
    """True where all PATTERNS cut between two characters: after a word or number, and before the first space."""
    if after == " ":
        return not before.isspace()
    is_known = after.isspace() or after.isprintable()  # Unicode versions differ on unassigned characters
    return before.isalnum() and not after.isalnum() and is_known


def _ends_text(before: str, after: str) -> bool:
    """True where GPT-2's pattern cuts: before white space. GPT-4's may keep a line end with the text before it."""
    return after in "\n\r\t\v\f\x85\xa0\u3000" and not before.isspace()


def _code_points(text: str) -> np.ndarray:
    """The code point of each character: (len(text),) uint32."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
