"""nanoGPT's meta.pkl: the characters of its character-level data sets, read without running any code in the pickle."""

import io
import os
import pickle
import pickletools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec

from robopoet import files
from robopoet.errors import CheckpointError, describe
from robopoet.files import Count
from robopoet.text import tokenizer
from robopoet.text.tokenizer import SavedChar

META_BYTES = 2**20  # room for 59,000 characters
PLAIN_OPCODES = {  # pickle's opcodes for numbers, strings, tuples, lists and dicts
    *"PROTO FRAME STOP MARK MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET NONE NEWTRUE NEWFALSE".split(),
    *"BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE SHORT_BINBYTES BINBYTES".split(),
    *"EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS".split(),
}
NOT_A_META = "is not a meta.pkl of nanoGPT's"


@dataclass(frozen=True)
class NanoGPTMeta:
    """The one key we read of meta.pkl: the character of each id."""

    itos: dict[Count, Annotated[str, msgspec.Meta(min_length=1, max_length=1)]]


def find_alphabet(dataset: str, path: Path) -> tokenizer.Tokenizer | None:
    """The character tokenizer of nanoGPT's checkpoint at `path`, from its meta.pkl; None if there is no such file.

    Looks beside the checkpoint, then where nanoGPT keeps the file: in data/`dataset` of the same checkout. Raises
    CheckpointError when the file is damaged.
    """
    for place in (path.parent / "meta.pkl", path.absolute().parent.parent / "data" / dataset / "meta.pkl"):
        if os.path.isfile(place):
            return _read_meta(place)
    return None


def _read_meta(path: Path) -> tokenizer.Tokenizer:
    raw = files.read_bytes(path, CheckpointError, META_BYTES)
    try:
        value = _unpickle(raw)
    except Exception as e:  # on a damaged pickle the unpickler may raise anything
        raise CheckpointError(f"{path}: {NOT_A_META} ({describe(e)})") from None
    itos = files.convert(value, NanoGPTMeta, path, CheckpointError, f"it {NOT_A_META}").itos
    if sorted(itos) != list(range(len(itos))):
        raise CheckpointError(f"{path}: {NOT_A_META} (its ids are not 0 to {len(itos) - 1})")
    saved: dict[str, Any] = {"kind": "char", "chars": "".join(itos[id] for id in range(len(itos))), "specials": []}
    return tokenizer.from_json(files.convert(saved, SavedChar, path, CheckpointError, f"it {NOT_A_META}"))


def _unpickle(raw: bytes) -> Any:
    """Load a pickle of plain values; raises ValueError on any other opcode, or on a memo index beyond the file's size.

    The unpickler allocates its memo up to the largest index, so a few bytes could claim gigabytes.
    """
    for opcode, argument, _ in pickletools.genops(raw):
        if opcode.name not in PLAIN_OPCODES or (opcode.name == "LONG_BINPUT" and (argument or 0) > len(raw)):
            raise ValueError(f"it holds more than plain values ({opcode.name})")
    return _PlainUnpickler(io.BytesIO(raw)).load()


class _PlainUnpickler(pickle.Unpickler):
    """Refuses every class and function, so that no code can run."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}")
