"""Llamas from GGUF files, such as SmolLM2's: the header is read within bounds, then one tensor after another.

The package gguf dequantises. Its GGUFReader is left out: a vocabulary takes it seconds, and an array that claims to be
long, all memory. The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import os
import re
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import msgspec
import numpy as np
import torch

from model import GPTConfig
from robopoet import files
from robopoet.errors import CheckpointError, DataError, describe, shorten
from robopoet.text import tokenizer_json
from robopoet.text.dataset import MAX_VOCAB_SIZE
from robopoet.text.tokenizer import PATTERNS
from robopoet.weights.gguf import LAYOUTS
from robopoet.weights.header import config_entries, credit, printable
from robopoet.weights.huggingface import HEADER_BYTES, give_tokenizer
from robopoet.weights.layout import Weights, without_memory

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MOST_VALUES = 2**17  # in an array; SmolLM2's has 48,900 merges
MOST_TENSORS = 2**14
STRING, ARRAY = 8, 9  # types of a value; the others are numbers: type -> numpy's
NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
TENSOR_TYPES = "F32 F16 BF16 Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q4_K Q5_K Q6_K".split()
NORMAL = 1  # the type of a token that stands for text
# llama.cpp's name for how text is cut -> a pattern: of several that it stands for, the first, as in our tokenizers
PRES = {name: pattern for pattern, name in reversed(PATTERNS.items())}
FITTING = "it must be a Llama like SmolLM2"


# ---------------------------------------------------------------------------------------------------------------------
# the file


class Tensor(NamedTuple):
    """Where a tensor is. shape: as torch has it. kind: GGML's number for its type. start: in bytes, of the data."""

    shape: tuple[int, ...]
    kind: int
    start: int


class GGUFHeader:
    """Metadata and tensors of a GGUF file `f`, read from its start; raises ValueError if it is damaged or too large.

    metadata: key -> number, text or list. tensors: by name. data: where the tensors begin, in bytes.
    """

    def __init__(self, f: BinaryIO):
        self._raw, self._at = f.read(HEADER_BYTES), 0
        if self._take(4) != MAGIC:
            raise ValueError("it does not begin with GGUF")
        if (version := self._integer(4)) not in VERSIONS:
            raise ValueError(f"its version of GGUF is {version}, must be 2 or 3")
        n_tensors, n_keys = self._integer(8), self._integer(8)
        if n_tensors > MOST_TENSORS:
            raise ValueError(f"it claims {n_tensors:,} tensors, must have at most {MOST_TENSORS:,}")
        self.metadata = {self._text(): self._value(self._integer(4)) for _ in range(n_keys)}
        self.tensors = {self._text(): self._tensor() for _ in range(n_tensors)}
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1:
            raise ValueError(f"general.alignment: found {shorten(repr(alignment))}, must be a size in bytes")
        self.data = -(-self._at // alignment) * alignment

    def _take(self, size: int) -> bytes:
        part = self._raw[self._at : self._at + size]
        if len(part) < size:
            raise ValueError(f"it is truncated, or its header has over {HEADER_BYTES:,} bytes")
        self._at += size
        return part

    def _integer(self, size: int) -> int:
        return int.from_bytes(self._take(size), "little")

    def _text(self) -> str:
        return self._take(self._integer(8)).decode()

    def _numbers(self, kind: int, count: int) -> list[int | float | bool]:
        if kind not in NUMBERS:
            raise ValueError(f"it holds a value of type {kind}, which GGUF does not have here")
        dtype = np.dtype(NUMBERS[kind])
        return np.frombuffer(self._take(dtype.itemsize * count), dtype, count).tolist()

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._text()
        if kind != ARRAY:
            return self._numbers(kind, 1)[0]
        kind, count = self._integer(4), self._integer(8)
        if count > MOST_VALUES:
            raise ValueError(f"it claims an array of {count:,} values, must have at most {MOST_VALUES:,}")
        return [self._text() for _ in range(count)] if kind == STRING else self._numbers(kind, count)

    def _tensor(self) -> Tensor:
        if (n_dims := self._integer(4)) > 4:
            raise ValueError(f"it claims a tensor of {n_dims} dimensions, must have at most 4")
        shape = tuple(self._integer(8) for _ in range(n_dims))[::-1]
        return Tensor(shape, self._integer(4), self._integer(8))


# ---------------------------------------------------------------------------------------------------------------------
# the model


class Metadata(msgspec.Struct, frozen=True):
    """What a file says of a Llama and its tokenizer, as far as it matters here."""

    n_layer: int = msgspec.field(name="llama.block_count")
    block_size: int = msgspec.field(name="llama.context_length")
    n_embd: int = msgspec.field(name="llama.embedding_length")
    n_inner: int = msgspec.field(name="llama.feed_forward_length")
    n_head: int = msgspec.field(name="llama.attention.head_count")
    norm_eps: float = msgspec.field(name="llama.attention.layer_norm_rms_epsilon")
    model: str = msgspec.field(name="tokenizer.ggml.model")
    tokens: tuple[str, ...] = msgspec.field(name="tokenizer.ggml.tokens")
    merges: tuple[str, ...] = msgspec.field(name="tokenizer.ggml.merges", default=())
    types: tuple[int, ...] = msgspec.field(name="tokenizer.ggml.token_type", default=())
    pre: str = msgspec.field(name="tokenizer.ggml.pre", default="")
    n_kv_head: int | None = msgspec.field(name="llama.attention.head_count_kv", default=None)
    rope_theta: float = msgspec.field(name="llama.rope.freq_base", default=10_000.0)
    rope_dims: int | None = msgspec.field(name="llama.rope.dimension_count", default=None)
    key_size: int | None = msgspec.field(name="llama.attention.key_length", default=None)
    value_size: int | None = msgspec.field(name="llama.attention.value_length", default=None)
    vocab_size: int | None = msgspec.field(name="llama.vocab_size", default=None)
    title: str = msgspec.field(name="general.name", default="a model without a name")
    licence: str = msgspec.field(name="general.license", default="unknown")


_KEYS = {field.name: field.encode_name for field in msgspec.structs.fields(Metadata)}
_SIZES = "n_layer block_size n_embd n_inner n_head n_kv_head rope_theta".split()


def is_gguf(path: Path) -> bool:
    """Whether a regular file begins as GGUF files do, or has their extension."""
    if not os.path.isfile(path):
        return False
    if path.suffix.lower() == ".gguf":
        return True
    try:
        with open(path, "rb") as f:
            return f.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def load_gguf(path: Path) -> dict[str, Any]:
    """Read a GGUF file; returns what our own checkpoints hold: model, model_args, model_extra, tokenizer, licences.

    Raises CheckpointError when it is damaged or not such a model, or the package gguf is not installed.
    """
    size = files.check_regular(path, CheckpointError)
    try:
        with open(path, "rb") as f:
            header = GGUFHeader(f)
            found = read_metadata(header.metadata)
            config = read_config(found)
            weights = _read_tensors(f, size, header, _shapes(config))
    except ImportError:
        raise CheckpointError(f"{path}: to read GGUF takes the package gguf: pip install gguf") from None
    except OSError as e:
        raise CheckpointError(f"{path}: {e.strerror}") from None
    except ValueError as e:
        raise CheckpointError(f"{path}: {'; '.join(map(shorten, str(e).splitlines()))}") from None
    if ": " in found.licence:  # a file of ours, which names what each is of
        licences = [*map(printable, found.licence.split("; "))]
    else:
        licences = [credit(found.title, found.licence)]
    content: dict[str, Any] = {
        "model": LAYOUTS["llama"].ours(weights, config),
        **config_entries(config),
        "licences": licences,
    }
    try:
        pairs = [tuple(pair.split(" ")) for pair in found.merges]
        specials = {name for name, kind in zip(found.tokens, found.types, strict=True) if kind != NORMAL}
        give_tokenizer(
            content, tokenizer_json.byte_level("its tokenizer", [*found.tokens], specials, pairs, PRES[found.pre])
        )
    except DataError as e:
        raise CheckpointError(f"{path}: {e}") from None
    content["model"]["lm_head.weight"] = content["model"]["transformer.wte.weight"]
    return content


def read_metadata(metadata: dict[str, Any]) -> Metadata:
    """The keys that matter; raises ValueError on another architecture, a missing key, or one that has no place here."""
    if (kind := metadata.get("general.architecture")) != "llama":
        raise ValueError(f"general.architecture: found {shorten(repr(kind))}, must be 'llama'")
    try:
        found = msgspec.convert(metadata, Metadata)
    except msgspec.ValidationError as e:
        raise ValueError(f"{describe(e)}; {FITTING}") from None
    hs, n_tokens = found.n_embd // max(found.n_head, 1), len(found.tokens)
    allowed = {
        "model": ("gpt2",),  # byte-level BPE, whatever it was trained for
        "pre": tuple(PRES),
        "rope_dims": (None, hs),
        "key_size": (None, hs),
        "value_size": (None, hs),
        "vocab_size": (None, n_tokens),
    }
    problems = [
        f"{_KEYS[name]}: found {shorten(repr(value))}, must be {' or '.join(map(repr, filter(None, values)))}"
        for name, values in allowed.items()
        if (value := getattr(found, name)) not in values
    ]
    if not math.isclose(found.norm_eps, 1e-5, rel_tol=1e-6):  # a float32
        problems.append(f"{_KEYS['norm_eps']}: found {found.norm_eps:g}, must be 1e-05")
    if n_tokens > MAX_VOCAB_SIZE:
        problems.append(f"{_KEYS['tokens']}: found {n_tokens:,}, must be at most {MAX_VOCAB_SIZE:,}: ids are uint16")
    if len(found.types) != n_tokens:
        problems.append(f"{_KEYS['types']}: found {len(found.types):,}, must be one for each of {n_tokens:,} tokens")
    for key in metadata:
        if key.startswith("llama.") and key not in _KEYS.values():  # another way to compute, such as rope.scaling
            problems.append(f"{key}: found {shorten(repr(metadata[key]))}, must not be there; {FITTING}")
    if problems:
        raise ValueError("\n".join(problems))
    return found


def read_config(found: Metadata) -> GPTConfig:
    """The model's shape; raises ValueError, which names the file's keys, if there is no such model."""
    shape = {name: getattr(found, name) for name in _SIZES}
    try:
        llama = {"bias": False, "norm": "rmsnorm", "mlp": "swiglu", "positions": "rotary"}
        return GPTConfig(**shape, **llama, vocab_size=len(found.tokens))
    except ValueError as e:
        raise ValueError(re.sub(r"\w+", lambda word: _KEYS.get(word[0], word[0]), str(e))) from None


def _shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of a Llama."""
    first, layers = LAYOUTS["llama"].theirs(without_memory(config, 1)), min(config.n_layer, MOST_TENSORS)
    return {
        name.replace("blk.0.", f"blk.{i}."): tuple(weight.shape)
        for name, weight in first.items()
        for i in range(layers if name.startswith("blk.0.") else 1)  # a file may claim any number
    }


def _read_tensors(f: BinaryIO, size: int, header: GGUFHeader, shapes: dict[str, tuple[int, ...]]) -> Weights:
    """Each tensor in float32; size: the file's, in bytes. Raises ValueError unless they are of these shapes."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    tensors, untied = header.tensors, "output.weight"
    shapes = shapes | ({untied: shapes["token_embd.weight"]} if untied in tensors else {})
    if missing := shapes.keys() - tensors.keys():
        raise ValueError(f"has no tensor {min(missing)}; {FITTING}")
    if extra := tensors.keys() - shapes.keys():
        raise ValueError(f"has a tensor {shorten(min(extra))}, which has no place here; {FITTING}")
    types = {GGMLQuantizationType[name].value: GGMLQuantizationType[name] for name in TENSOR_TYPES}
    places: dict[str, tuple[int, int]] = {}
    used = 0
    for name, shape in shapes.items():
        tensor = tensors[name]
        if tensor.shape != shape:
            raise ValueError(f"{name}: found shape {tensor.shape}, must be {shape}")
        if tensor.kind not in types:
            known = {kind.value: kind.name for kind in GGMLQuantizationType}
            raise ValueError(
                f"{name}: found type {known.get(tensor.kind, tensor.kind)}, must be one of {', '.join(TENSOR_TYPES)}"
            )
        n_values, n_bytes = GGML_QUANT_SIZES[types[tensor.kind]]  # each block's
        if shape[-1] % n_values:
            raise ValueError(f"{name}: its rows of {shape[-1]} are no multiple of {n_values}, as its type needs")
        places[name] = header.data + tensor.start, math.prod(shape) // n_values * n_bytes
        used += places[name][1]
        if sum(places[name]) > size:
            raise ValueError(f"is truncated: {name} ends at byte {sum(places[name]):,}, the file at {size:,}")
        if used > size:
            raise ValueError(f"its tensors overlap: they claim {used:,} bytes, the file has {size:,}")
    weights: Weights = {}
    for name, (start, n_bytes) in places.items():
        f.seek(start)
        raw, shape = np.fromfile(f, np.uint8, n_bytes), shapes[name]
        rows = raw.reshape(math.prod(shape[:-1]), -1)
        weights[name] = torch.from_numpy(dequantize(rows, types[tensors[name].kind]).reshape(shape))
    output = weights.pop(untied, None)
    if output is not None and not torch.equal(output, weights["token_embd.weight"]):
        raise ValueError(f"{untied}: is not token_embd.weight; the output must be tied to the embeddings")
    return weights
